"""The folder through which policy versions reach the engines of one machine: its memory file system where it has one.

Each run owns one folder, named by a random token, with the process that owns it written inside. A version is removed
once it is superseded; the folder goes when the run ends, and folders of dead runs are swept at the next start.
"""

from __future__ import annotations

import os
import shutil
import uuid
from pathlib import Path

from align.stages.files import read_json, write_json
from align.stages.processes import ProcessId, is_alive, this_process

MEMORY = Path("/dev/shm")
PREFIX = "align-"
OWNER = "owner.json"


class PublicationFolder:
    """`folder(version)` is where a version is written; `supersede(version)` deletes every older one."""

    def __init__(self, fallback: Path, *, shared: bool = False):
        """fallback: a folder of the run. shared: engines are on other nodes, which only a shared folder reaches."""
        in_memory = not shared and MEMORY.is_dir() and os.access(MEMORY, os.W_OK)
        self.root = (MEMORY if in_memory else fallback) / f"{PREFIX}{uuid.uuid4().hex[:12]}"
        self.root.mkdir(parents=True)
        write_json(self.root / OWNER, {**this_process().to_json(), "namespace": _namespace()})

    def folder(self, stage_id: str, version: int) -> Path:
        """Where to write this version; nothing is there yet."""
        path = self.root / f"{stage_id}-v{version:06d}"
        shutil.rmtree(path, ignore_errors=True)
        return path

    def supersede(self, newest: Path) -> None:
        """Delete every version but `newest`; called once all engines hold it and no request runs on an older one."""
        for path in self.root.iterdir():
            if path.is_dir() and path != newest:
                shutil.rmtree(path)

    def close(self) -> None:
        shutil.rmtree(self.root, ignore_errors=True)


def sweep(*roots: Path) -> list[Path]:
    """Remove publication folders whose owner no longer lives, below the memory file system and `roots`."""
    removed = []
    for root in (MEMORY, *roots):
        for folder in root.glob(f"{PREFIX}*") if root.is_dir() else ():
            if not (folder / OWNER).is_file():
                continue
            owner = read_json(folder / OWNER)
            # a container may share this memory file system: its process numbers mean nothing here
            if owner["namespace"] == _namespace() and not is_alive(ProcessId.from_json(owner)):
                shutil.rmtree(folder, ignore_errors=True)
                removed.append(folder)
    return removed


def _namespace() -> str:
    """Which set of process numbers this process lives in (one per container)."""
    link = Path("/proc/self/ns/pid")
    return os.readlink(link) if link.exists() else ""
