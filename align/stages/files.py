"""Files that are whole or absent: JSON and folders are written aside, forced to disk and renamed."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from align.errors import RunFolderError
from align.oserrors import naming

_CHUNK = 1 << 22
RESTORE = "restore it from a copy, or start a new run: name=<another>"


def write_json(path: Path, value: Any) -> None:
    """Replace `path` by the JSON of `value`."""
    write_text(path, json.dumps(value, indent=1, allow_nan=True) + "\n")


def write_text(path: Path, text: str) -> None:
    """Replace `path` by `text`; a reader sees the old text or the new one, never a part."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Replace the content of `path`; where that fails (a full disk), it is what it was, and nothing is left beside."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with naming(path), aside.open("wb") as handle:
            handle.write(content)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(aside, path)
    except BaseException:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def read_json(path: Path) -> Any:
    """Raises RunFolderError where the file is there and holds no JSON: cut off, or damaged by something outside us."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise RunFolderError("it is damaged: nested too deep", where=path, remedy=RESTORE) from error
    except ValueError as error:  # JSON's and UTF-8's own errors are of this kind
        raise RunFolderError(f"it is damaged or cut off: {error}", where=path, remedy=RESTORE) from error


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object. Raises RunFolderError."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise RunFolderError(f"it is damaged: {type(value).__name__}, no object", where=path, remedy=RESTORE)
    return value


def make_folder(folder: Path) -> None:
    """Make a folder and those above it that are missing. Below a place that everybody may write to (the temporary
    folder), nobody else may look into them; elsewhere the user's umask decides."""
    missing = []
    while not os.path.lexists(folder):
        missing.append(folder)
        folder = folder.parent
    shared = any(place.stat().st_mode & stat.S_IWOTH for place in (folder.resolve(), *folder.resolve().parents))
    for new in reversed(missing):
        new.mkdir(mode=0o700 if shared else 0o777, exist_ok=True)
    if not missing and not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))


def require_place(folder: Path) -> None:
    """Raise RunFolderError where `make_folder` would fail, or nothing could be written; nothing is made."""
    place = folder
    while not os.path.lexists(place):
        place = place.parent
    other = "choose another place (output=<folder>)"
    if not place.is_dir():
        raise RunFolderError("it is no folder, and the run's own would be there", where=place, remedy=other)
    if not os.access(place, os.W_OK | os.X_OK):
        raise RunFolderError("it cannot be written to, and the run's folder would be there", where=place, remedy=other)


def sync_folder(folder: Path) -> None:
    """Force a folder's entries (names, renames) to disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_and_sync(path: Path) -> str:
    """Hash a file's content, having forced it to disk: what the hash promises is then what a reader will find."""
    digest = hashlib.sha256()
    with naming(path), path.open("rb") as handle:
        os.fsync(handle.fileno())
        while chunk := handle.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def sha256_file(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def tree_files(folder: Path) -> list[Path]:
    """Every regular file below `folder`, in order of its relative name."""
    return sorted(p for p in folder.rglob("*") if p.is_file())


def remove_folder(folder: Path) -> None:
    """Delete a folder so that a kill in between leaves a hidden remainder and never half a folder under its name."""
    if not folder.exists():
        return
    doomed = folder.with_name(f".removing-{folder.name}-{os.getpid()}")
    os.rename(folder, doomed)
    _remove(doomed)


def _remove(path: Path) -> None:
    """A folder with what is in it; a file or a link in its place alone."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def remove_leftovers(folder: Path) -> None:
    """Delete what a killed writer or remover left behind in `folder`."""
    for pattern in (".writing-*", ".removing-*"):
        for path in folder.glob(pattern):
            _remove(path)


@contextlib.contextmanager
def written_aside(target: Path) -> Iterator[Path]:
    """An empty folder beside `target` that takes its name when the block ends well, and vanishes when it does not."""
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_name(f".writing-{target.name}")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    try:
        with naming(aside):  # whatever writes there may not say which file a full disk refused
            yield aside
        put_in_place(aside, target)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def put_in_place(aside: Path, target: Path) -> None:
    """Rename `aside` to `target` (an older `target` is removed first) and force both names to disk."""
    for folder in (aside, *(p for p in aside.rglob("*") if p.is_dir())):
        sync_folder(folder)
    remove_folder(target)
    os.rename(aside, target)
    sync_folder(target.parent)
