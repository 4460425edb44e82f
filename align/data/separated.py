"""Tables of text, CSV and TSV. The first line names the columns; one that does not is refused, not taken for names."""

from __future__ import annotations

import csv
import io
import re
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from align.data.audit import Refusal
from align.data.file_bytes import whole_text
from align.data.rows import LONGEST_LINE, Item, Row, refuse_twice
from align.data.values import problem_of
from align.errors import DataError

_SAMPLE = 1000  # rows among which a value of the first line is looked for
_NAMES = frozenset(
    {"id", "text", "label", "question", "answer", "prompt", "instruction", "input", "output", "messages"}
)
"""Words that no first row of values has: with one of them it names columns, whatever stands below."""


def read_csv(path: Path, delimiter: str) -> Iterator[Item]:
    """Cells are text, whatever they look like; empty cells are missing."""
    csv.field_size_limit(min(sys.maxsize, LONGEST_LINE))  # the library's own is 128 KiB, less than a long text
    text = whole_text(path)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header = _next(reader)
    if not header or isinstance(header, csv.Error):
        why = f"the first line is no CSV: {header}" if header else "the file is empty"
        raise DataError(why, where=f"{path}:1" if header else path, remedy="the first line must name the columns")
    refuse_twice(header, f"{path}:1")
    _refuse_unnamed(header, text, path, delimiter)
    words = re.fullmatch(r"\w+([;\t|,])\w+(?:\1\w+)*", header[0]) if len(header) == 1 else None
    if words is not None:
        other = words[1]
        raise DataError(
            f"its columns are divided by {other!r}, where it should have {delimiter!r}: {header[0]}",
            where=f"{path}:1",
            remedy="write it with tabs as .tsv, or with commas as .csv" if other != "\t" else "name it .tsv",
        )
    line = reader.line_num + 1
    while (cells := _next(reader)) is not None:
        origin, line = f"{path}:{line}", reader.line_num + 1
        if isinstance(cells, csv.Error):
            to = f" (to line {line - 1})" if origin != f"{path}:{line - 1}" else ""
            yield Refusal(origin, 0, f"not valid CSV{to}: {cells}; a quote that opens a cell must close it")
        elif cells and len(cells) != len(header):
            yield Refusal(origin, 0, f"{len(cells)} cells, but the header has {len(header)}")
        elif cells == header and len(header) > 1:
            yield Refusal(origin, 0, "the line names the columns again, as where files were joined")
        elif cells:
            values = {name: cell or None for name, cell in zip(header, cells, strict=True)}
            wrong = problem_of(values)
            yield Row(values, origin, 0) if wrong is None else Refusal(origin, 0, wrong)


def _next(reader: Any) -> list[str] | csv.Error | None:
    try:
        return next(reader, None)
    except csv.Error as e:
        return e


def _refuse_unnamed(header: list[str], text: str, path: Path, delimiter: str) -> None:
    """Raises DataError where the first line is a row: a text, or a value that its column has again further down."""
    data = next((cell for cell in header if len(cell) > 60 and cell.count(" ") > 6), None)
    why = f"{data[:40]!r}... is a text" if data is not None else None
    if data is None and len(header) > 1 and _NAMES.isdisjoint(cell.lower() for cell in header):
        rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        again = _again(header, rows)
        why = f"{again!r} is a value that further rows have in the same column" if again is not None else None
    if why is not None:
        raise DataError(
            f"the first line names no columns: {why}",
            where=f"{path}:1",
            remedy="write a line with the columns' names before it, such as label and text",
        )


def _again(header: list[str], rows: Any) -> str | None:
    """A cell of the first line that its column holds again; None where there is none."""
    try:
        seen = [cells for cells in islice(rows, 1, _SAMPLE) if len(cells) == len(header) and cells != header]
    except csv.Error:
        return None
    return next((name for n, name in enumerate(header) if name and any(cells[n] == name for cells in seen)), None)
