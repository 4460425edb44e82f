"""A row of a file, and what stands in the place of one that cannot be read."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from align.data.audit import Refusal
from align.errors import DataError

LONGEST_LINE = 256 << 20  # bytes of one row; images in it count


@dataclass(frozen=True, slots=True)
class Row:
    """One row. origin: "file:line", or "file row n" (from 0) where a file has no lines. number: in its source. folder:
    that of its file, to which paths in it are relative; None where rows come from no file. columnar: it was stored in
    columns, so that nulls in its structs may stand for fields that it never had. beside: what its file says beside its
    rows, and nothing reads."""

    values: dict[str, Any]
    origin: str
    number: int
    folder: Path | None = field(default=None, compare=False)
    columnar: bool = field(default=False, compare=False)
    beside: tuple[str, ...] = field(default=(), compare=False)


Item = Row | Refusal  # what cannot be a row is a refusal with its place; reading goes on


def refuse_twice(names: list[str], where: str | Path) -> None:
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise DataError(
            f"two columns are called {twice!r}, and one would hide the other", where=where, remedy="rename one of them"
        )
