"""What was written: the files of a folder by size, SHA-256 and time, and whether they are that still."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from align.stages.files import sha256_and_sync, sha256_file, tree_files

Listing = Mapping[str, Mapping[str, Any]]
READ_BY_LOADERS = (".safetensors", ".json", ".jinja", ".py", ".model", ".bin", ".gguf", ".txt")
"""A file of these kinds that came later would be read with the others."""


def listing(folder: Path) -> dict[str, dict[str, Any]]:
    """Every file below `folder` by its relative name, forced to disk: bytes, sha256, changed (nanoseconds)."""
    return {path.relative_to(folder).as_posix(): _entry(path) for path in tree_files(folder)}


def _entry(path: Path) -> dict[str, Any]:
    sha, facts = sha256_and_sync(path), path.stat()
    return {"bytes": facts.st_size, "sha256": sha, "changed": facts.st_mtime_ns}


def read_listing(value: Any) -> Listing:
    """A listing as JSON gave it. Raises ValueError."""
    if not isinstance(value, dict):
        raise ValueError("list of files")
    for name, entry in value.items():
        known = isinstance(entry, dict) and type(entry.get("bytes")) is int and isinstance(entry.get("sha256"), str)
        if not known or entry["bytes"] < 0 or Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError(f"size and SHA-256 of {name}")
    return value


def difference(folder: Path, listed: Listing, *, thorough: bool = True) -> str | None:
    """What of `listed` is no longer as it was written, in words; None where all is.

    thorough: read every byte; else a file of the size and time that it had counts as the same.
    """
    for name, entry in listed.items():
        path = folder / name
        try:
            facts = path.stat()
            if facts.st_size != entry["bytes"]:
                return f"{name} has {facts.st_size} bytes, {entry['bytes']} were written"
            known = not thorough and facts.st_mtime_ns == entry.get("changed")
            if not known and sha256_file(path) != entry["sha256"]:
                return f"{name} is damaged: its SHA-256 differs from what was written"
        except OSError as error:
            return f"{name} cannot be read: {error.strerror or error}"
    return None


def additions(folder: Path, listed: Listing) -> list[str]:
    """Files that whoever loads the folder would read, and that were not written with it."""
    found = (path for path in tree_files(folder) if path.suffix in READ_BY_LOADERS)
    return [name for path in found if (name := path.relative_to(folder).as_posix()) not in listed]
