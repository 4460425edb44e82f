"""Files of one JSON object a line, written line by line: a kill tears the last line, and nothing else is ever torn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from align.errors import RunFolderError


def read_lines(path: Path, *, numbered: str | None = None) -> tuple[list[dict[str, Any]], bytes]:
    """The objects of every whole line in order, and what a torn last line left (b"" where there is none).

    numbered: a key that holds a whole number in every object.

    Raises RunFolderError with file and line where a line before it is not what was written.
    """
    *whole, torn = path.read_bytes().split(b"\n")
    found = []
    for number, line in enumerate(whole, start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            why = "nested too deep" if isinstance(error, RecursionError) else str(error)
            raise _damaged(path, number, why) from error
        if not isinstance(value, dict):
            raise _damaged(path, number, f"{type(value).__name__}, no object")
        if numbered is not None and (type(value.get(numbered)) is not int or value[numbered] < 0):
            raise _damaged(path, number, f"its {numbered!r} is {str(value.get(numbered))[:40]!r}")
        found.append(value)
    return found, torn


def _damaged(path: Path, line: int, why: str) -> RunFolderError:
    return RunFolderError(
        f"this line is damaged: {why}",
        where=f"{path}:{line}",
        remedy="restore the file from a copy, or move it away: the run goes on, and its curves begin where it does",
    )
