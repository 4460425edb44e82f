"""Folders that are complete or absent: written aside, flushed to disk, renamed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from align.errors import UserError

WEIGHT_SUFFIXES = (
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".gguf",
    ".onnx",
    ".h5",
    ".msgpack",
)
NOT_PART_OF_A_MODEL = (
    "adapter_config.json",
    "trainer_state.json",
    "merge_report.json",
    "export_report.json",
)


def require_free(folder: Path, what: str) -> None:
    """Raise UserError where `folder` already holds something; an empty folder is free."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(
            f"the {what} would be written to a folder that already exists",
            where=folder,
            remedy="remove it, or choose another place",
        )


@contextmanager
def written_aside(folder: Path, what: str = "model") -> Iterator[Path]:
    """Yield an empty folder beside `folder`; on success flush it and rename it to `folder`, on failure remove it.

    Raises UserError before anything is written where `folder` already holds files.
    """
    require_free(folder, what)
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    try:
        yield aside
        flush(aside)
        aside.rename(folder)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    sync_path(folder.parent)


def flush(folder: Path) -> None:
    """Have the disk hold every file below `folder`: a rename may survive a crash that its content does not."""
    for path in sorted(folder.rglob("*")):
        sync_path(path)
    sync_path(folder)


def sync_path(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def copy_all_but_weights(source: Path, target: Path) -> list[str]:
    """Copy what stands beside the weights: tokenizer, templates, generation config, processors, remote code.

    Left out: weights in any format and their index, hidden files, adapters and reports. Returns the names copied.
    """
    copied = []
    for path in sorted(source.iterdir()):
        name = path.name
        if path.is_dir():
            if name == "additional_chat_templates":
                shutil.copytree(path, target / name)
                copied.append(name)
            continue
        is_weights = name.endswith(WEIGHT_SUFFIXES) or name.endswith(".index.json")
        if is_weights or name.startswith(".") or name in NOT_PART_OF_A_MODEL or path.suffix in (".md", ".lock"):
            continue
        shutil.copy2(path, target / name)
        copied.append(name)
    return copied
