"""Folders outside the run folder that die with their process: each names its owner, and a later start sweeps those
whose owner was killed, with every process that still has a file open there."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from align.stages.files import read_json, write_json
from align.stages.processes import ProcessId, end, is_alive, this_process, users

MEMORY = Path("/dev/shm")
PREFIX = "align-"
_OWNER = "owner.json"


def owned_folder(root: Path) -> Path:
    """A new folder `root/align-<random>` that belongs to this process."""
    folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=root))
    write_json(folder / _OWNER, {**this_process().to_json(), "namespace": _namespace()})
    return folder


def sweep(*roots: Path) -> list[Path]:
    """Remove folders whose owner no longer lives, below the memory file system, the temporary folder and `roots`, and
    end who uses them: Ray's agents outlive a killed driver by a minute."""
    removed = []
    for root in (MEMORY, Path(tempfile.gettempdir()), *roots):
        for folder in root.glob(f"{PREFIX}*") if root.is_dir() else ():
            if not (folder / _OWNER).is_file():
                continue
            owner = read_json(folder / _OWNER)
            # a container may share this file system: its process numbers mean nothing here
            if owner["namespace"] == _namespace() and not is_alive(ProcessId.from_json(owner)):
                end(users(folder))
                shutil.rmtree(folder, ignore_errors=True)
                removed.append(folder)
    return removed


def _namespace() -> str:
    """Which set of process numbers this process lives in (one per container)."""
    link = Path("/proc/self/ns/pid")
    return os.readlink(link) if link.exists() else ""
