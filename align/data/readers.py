"""Rows of one file, each with the line it begins at. One function per kind of file, all of them generators."""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from align.data.audit import Refusal
from align.errors import DataError

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".feather")


@dataclass(frozen=True, slots=True)
class Row:
    """One row. origin: "file:line", or "file row n" (from 0) where a file has no lines. number: in its source. folder:
    that of its file, to which paths in it are relative; None where rows come from no file. columnar: it was stored in
    columns, so that nulls in its structs may stand for fields that it never had."""

    values: dict[str, Any]
    origin: str
    number: int
    folder: Path | None = field(default=None, compare=False)
    columnar: bool = field(default=False, compare=False)


Item = Row | Refusal  # a line that is not valid JSON is a refusal with its place; reading goes on


def suffix_of(path: Path) -> str:
    name = path.name.removesuffix(".gz")
    for suffix in SUFFIXES:
        if name.endswith(suffix):
            return suffix
    raise DataError(
        f"unknown kind of data file {path.suffix!r}",
        where=path,
        remedy=f"known: {', '.join(SUFFIXES)} (also with .gz); a generator is written file.py:function",
    )


def read_file(path: Path) -> Iterator[Item]:
    """Rows of one file. Raises DataError where the file cannot be read at all."""
    suffix = suffix_of(path)
    try:
        if suffix in (".parquet", ".arrow", ".feather"):
            yield from _read_arrow(path, suffix)
        elif suffix in (".csv", ".tsv"):
            yield from _read_csv(path, "\t" if suffix == ".tsv" else ",")
        elif suffix == ".json":
            yield from _read_json(path)
        else:
            yield from _read_jsonl(path)
    except UnicodeDecodeError as e:
        raise DataError(f"not UTF-8 text: {e.reason} at byte {e.start}", where=path, remedy="convert the file") from e
    except (EOFError, gzip.BadGzipFile) as e:
        raise DataError(f"the gzip file is damaged: {e}", where=path, remedy="copy the file again") from e


def _bytes(path: Path) -> bytes:
    data = path.read_bytes()
    return gzip.decompress(data) if path.name.endswith(".gz") else data


def _read_jsonl(path: Path) -> Iterator[Item]:
    # Not splitlines: JSON may hold U+2028 and other line separators of Unicode inside a string.
    for line, raw in enumerate(_bytes(path).split(b"\n"), start=1):
        if not raw.strip():
            continue
        origin = f"{path}:{line}"
        try:
            value = json.loads(raw.decode("utf-8-sig" if line == 1 else "utf-8"))
        except UnicodeDecodeError as e:
            yield Refusal(origin, 0, f"not UTF-8 text: {e.reason} at byte {e.start} of the line")
            continue
        except json.JSONDecodeError as e:
            yield Refusal(origin, 0, f"not valid JSON: {e.msg} at column {e.colno}")
            continue
        yield _object(value, origin)


def _object(value: Any, origin: str) -> Item:
    if isinstance(value, dict):
        return Row(value, origin, 0)
    return Refusal(origin, 0, f"a row must be a JSON object, got {type(value).__name__}")


_BLANK = re.compile(r"[\s,]*")


def _read_json(path: Path) -> Iterator[Item]:
    """An array of objects, or objects one after another. The line is where an object begins."""
    text = _bytes(path).decode("utf-8-sig")
    start = len(text) - len(text.lstrip())
    if text[start : start + 1] not in ("[", "{"):
        raise DataError("neither a JSON array nor JSON objects", where=f"{path}:1", remedy="use .jsonl for JSON lines")
    array = text[start] == "["
    decode = json.JSONDecoder().raw_decode
    position, line, counted = start + array, 1, 0
    while True:
        blank = _BLANK.match(text, position)
        position = blank.end() if blank else position
        line, counted = line + text.count("\n", counted, position), position
        if position >= len(text) or text[position] == "]":
            if array and position >= len(text):
                raise DataError("the JSON array is not closed", where=f"{path}:{line}", remedy="copy the file again")
            return
        try:
            value, position = decode(text, position)
        except json.JSONDecodeError as e:
            raise DataError(
                f"not valid JSON: {e.msg} at column {e.colno}", where=f"{path}:{e.lineno}", remedy="correct this line"
            ) from e
        yield _object(value, f"{path}:{line}")


def _read_csv(path: Path, delimiter: str) -> Iterator[Item]:
    """Cells are text; `true` and `false` (in any case) are booleans, empty cells are missing."""
    reader = csv.reader(io.StringIO(_bytes(path).decode("utf-8-sig"), newline=""), delimiter=delimiter)
    header = next(reader, None)
    if not header:
        raise DataError("the file is empty", where=path, remedy="the first line must name the columns")
    line = reader.line_num + 1
    for cells in reader:
        origin, line = f"{path}:{line}", reader.line_num + 1
        if not cells:
            continue
        if len(cells) != len(header):
            yield Refusal(origin, 0, f"{len(cells)} cells, but the header has {len(header)}")
            continue
        yield Row({name: _cell(cell) for name, cell in zip(header, cells, strict=True)}, origin, 0)


def _cell(cell: str) -> Any:
    return {"true": True, "false": False, "": None}.get(cell.lower(), cell)


def _read_arrow(path: Path, suffix: str) -> Iterator[Item]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        data = pa.BufferReader(_bytes(path)) if path.name.endswith(".gz") else pa.memory_map(str(path))
        if suffix == ".parquet":
            batches: Iterator[pa.RecordBatch] = pq.ParquetFile(data).iter_batches()
        else:
            batches = _ipc_batches(data)
        for batch in batches:
            for values in batch.to_pylist():
                yield Row(values, f"{path} row {number}", 0, columnar=True)
                number += 1
    except (pa.ArrowInvalid, OSError) as e:
        raise DataError(f"not a readable {suffix} file: {e}", where=path, remedy="copy or write the file again") from e


def _ipc_batches(data: Any) -> Iterator[Any]:
    """`datasets` writes the stream format, Feather and pyarrow the file format, under the same suffix."""
    import pyarrow as pa

    try:
        reader = pa.ipc.open_file(data)
    except pa.ArrowInvalid:
        data.seek(0)
        yield from pa.ipc.open_stream(data)
        return
    for i in range(reader.num_record_batches):
        yield reader.get_batch(i)
