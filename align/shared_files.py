"""Paths on a cluster: what every node must see, and the driver's sources, which need not lie where it has them.

The driver copies the Python files beside the recipe into the run folder, under the names that they have on its machine.
An actor takes a file from there where its own node has none of that name, or another.
"""

from __future__ import annotations

import shutil
import socket
from collections.abc import Iterable
from pathlib import Path

from align.errors import RunFolderError

SOURCES = "sources"  # in the run folder


def require_shared(token: Path, *others: str | Path | None) -> None:
    """Raise RunFolderError where this node does not see `token`, the file that the driver put into the run folder, or
    one of `others` (model folders; None is skipped)."""
    node = socket.gethostname()
    if not token.is_file():
        raise RunFolderError(
            f"node {node} does not see the run folder",
            where=token.parent,
            remedy="use a shared path: output=<a folder that every node mounts>",
        )
    for path in others:
        if path is not None and not Path(path).exists():
            raise RunFolderError(
                f"node {node} does not see this path, and the driver does",
                where=path,
                remedy="use a shared path; for models of the hub, the same HF_HOME on every node",
            )


def keep_sources(files: Iterable[Path], run_folder: Path) -> None:
    """Copy the driver's files into the run folder, anew at each start."""
    shutil.rmtree(run_folder / SOURCES, ignore_errors=True)
    for file in files:
        copy = _copy_of(file, run_folder)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, copy)


def source_here(name: str, run_folder: Path) -> str:
    """A plugin's name (`/a/b.py`, `/a/b.py:function`; others stay as they are), or a folder of sources, for this node:
    where it does not hold what the driver has there, the driver's copy."""
    head, colon, attribute = name.rpartition(":")
    path = Path(head if head.endswith(".py") else name)
    copy = _copy_of(path, run_folder) if path.is_absolute() else path
    if not path.is_absolute() or not copy.exists() or _same(path, copy):
        return name
    return f"{copy}{colon}{attribute}" if head.endswith(".py") else str(copy)


def _copy_of(path: Path, run_folder: Path) -> Path:
    return run_folder / SOURCES / path.relative_to(path.anchor)


def _same(path: Path, copy: Path) -> bool:
    if copy.is_dir():
        return path.is_dir()
    return path.is_file() and path.read_bytes() == copy.read_bytes()
