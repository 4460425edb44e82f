"""Folders outside the run folder that die with their process: each names its owner, and a later start sweeps those
whose owner was killed, with every process that still has a file open there.

The places are shared with everybody on the machine. Only folders of this user count, a link never does, and what
cannot be read is left alone.
"""

from __future__ import annotations

import os
import shutil
import socket
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from align.errors import AlignError
from align.stages.files import read_object, write_json
from align.stages.processes import NAMESPACE, ProcessId, end, here, is_alive, is_here, this_process, users

MEMORY = Path("/dev/shm")
PREFIX = "align-"
_OWNER = "owner.json"


def owned_folder(root: Path) -> Path:
    """A new folder `root/align-<random>` that belongs to this process, and that nobody else may look into."""
    folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=root))  # mode 0700
    write_json(folder / _OWNER, {**this_process().to_json(), "namespace": _namespace(), "machine": _machine()})
    return folder


def sweep(*roots: Path, say: Callable[[str], None] = lambda text: None) -> list[Path]:
    """Remove folders whose owner no longer lives, below the memory file system, the temporary folder and `roots`, and
    end who uses them: Ray's agents outlive a killed driver by a minute. say: is told what was left alone, and why."""
    removed = []
    for folder in _ours(MEMORY, Path(tempfile.gettempdir()), *roots):
        try:
            if _is_left(folder):
                end(users(folder))
                shutil.rmtree(folder, ignore_errors=True)
                removed.append(folder)
        except (AlignError, OSError, ValueError) as error:
            why = error.what if isinstance(error, AlignError) else str(error)
            say(f"left alone: {folder}, whose {_OWNER} cannot be used ({why}); remove it where no run is yours")
    return removed


def _ours(*roots: Path) -> Iterator[Path]:
    """Folders of this user (not links to some) with our prefix."""
    for root in dict.fromkeys(roots):
        try:
            found = sorted(entry.path for entry in os.scandir(root) if entry.name.startswith(PREFIX))
        except OSError:  # it is not there, or not ours to look into
            continue
        for path in found:
            try:
                facts = os.lstat(path)
            except OSError:  # it went meanwhile
                continue
            if stat.S_ISDIR(facts.st_mode) and facts.st_uid == os.geteuid():
                yield Path(path)


def _is_left(folder: Path) -> bool:
    """Whether the owner is known, and gone. Raises RunFolderError, OSError or ValueError where it cannot be told."""
    path = folder / _OWNER
    if not os.path.lexists(path):
        return False
    if path.is_symlink():
        raise ValueError("it is a link")
    found = read_object(path)
    owner = ProcessId.from_json(found)
    # a container may share this file system: its process numbers mean nothing here
    if is_here(owner) and found.get("namespace") == _namespace():
        return not is_alive(owner)
    boot = owner.where.partition("/")[0]
    return bool(boot) and boot != here().partition("/")[0] and found.get("machine") == _machine()


def _machine() -> str:
    """This machine over its restarts, for folders that outlive one."""
    file = Path("/etc/machine-id")
    return f"{socket.gethostname()}/{file.read_text(encoding='utf-8').strip() if file.is_file() else ''}"


def _namespace() -> str:
    """The set of process numbers alone, as versions before `processes.here` compare it."""
    return os.readlink(NAMESPACE) if NAMESPACE.exists() else ""
