"""Files that rows name as their media, as a stage read them: a resumed run notices one that was edited since.

They are noted beside the stage's data report, `<stage>/<name>.media.json`, and not in run.json: there may be a million.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from align.stages.files import read_json, sha256_file, write_json

_SUFFIX = ".media.json"
_NAMED = 3  # files that a message names; the rest are counted


def note_media(folder: Path, name: str, files: Mapping[str, str]) -> None:
    """Write into a stage's folder what its rows `name` ("data", "eval") were read with: SHA-256 by path."""
    target = folder / f"{name}{_SUFFIX}"
    if files:
        write_json(target, {path: [sha, *_stat(Path(path))] for path, sha in sorted(files.items())})
    else:
        target.unlink(missing_ok=True)


def changed_media(folder: Path) -> list[str]:
    """What became of the media files of a stage since it read them, in words; [] where they are what they were.

    A file of the size and time that it had is not read again.
    """
    noted: dict[str, list[object]] = {}
    for path in sorted(folder.glob(f"*{_SUFFIX}")):
        noted |= read_json(path)
    found = [line for path, known in noted.items() if (line := _changed(Path(path), known))]
    more = [f"and {len(found) - _NAMED} more media files"] if len(found) > _NAMED else []
    return found[:_NAMED] + more


def _changed(path: Path, known: list[object]) -> str:
    sha, *stat = known
    if not path.is_file():
        return f"{path} is gone"
    return "" if stat == _stat(path) or sha256_file(path) == sha else f"{path} has another content"


def _stat(path: Path) -> list[int]:
    """Size in bytes and time of change in nanoseconds; zeros where it is gone already."""
    try:
        stat = path.stat()
    except FileNotFoundError:
        return [0, 0]
    return [stat.st_size, stat.st_mtime_ns]
