"""The folder through which policy versions reach the engines of one machine: its memory file system where it has one.

A version is removed once it is superseded; the folder goes when the run ends.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from align.stages.owned import MEMORY, owned_folder


class PublicationFolder:
    """`folder(...)` is where a version is written; `supersede(newest)` deletes every older one."""

    def __init__(self, fallback: Path, *, shared: bool = False):
        """fallback: a folder of the run. shared: engines are on other nodes, which only a shared folder reaches."""
        in_memory = not shared and MEMORY.is_dir() and os.access(MEMORY, os.W_OK)
        fallback.mkdir(parents=True, exist_ok=True)
        self.root = owned_folder(MEMORY if in_memory else fallback)

    def folder(self, stage_id: str, version: int) -> Path:
        """Where to write this version; nothing is there yet."""
        path = self.root / f"{stage_id}-v{version:06d}"
        shutil.rmtree(path, ignore_errors=True)
        return path

    def supersede(self, newest: Path) -> None:
        """Delete every version but `newest`; called once every live engine holds it. Engines read a version's files
        when they load it and never again, whatever runs on it, and one that is restarted later loads `newest`."""
        for path in self.root.iterdir():
            if path.is_dir() and path != newest:
                shutil.rmtree(path)

    def close(self) -> None:
        shutil.rmtree(self.root, ignore_errors=True)
