"""Rows of files of columns (Parquet, Arrow, Feather), from any row on."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from align.data.audit import Refusal
from align.data.file_bytes import whole_bytes
from align.data.rows import Item, Row, refuse_twice
from align.errors import DataError

SUFFIXES = (".parquet", ".arrow", ".feather")
_BATCH = 256  # rows that are Python objects at once, before they are rows


def read_arrow(path: Path, suffix: str, start: int = 0) -> Iterator[tuple[Item, int]]:
    """Rows from number `start` on, each with its number."""
    import pyarrow as pa

    number = start
    try:
        data = pa.BufferReader(whole_bytes(path)) if path.name.endswith(".gz") else pa.memory_map(str(path))
        for first, batch in _parquet_batches(data, start) if suffix == ".parquet" else _ipc_batches(data):
            if not first:
                refuse_twice(batch.schema.names, path)
            for begin in range(max(0, start - first), batch.num_rows, _BATCH):
                rows = _arrow_rows(batch.slice(begin, _BATCH), path, first + begin)
                yield from zip(rows, range(first + begin, first + batch.num_rows), strict=False)
                number = min(first + begin + _BATCH, first + batch.num_rows)
    except (pa.ArrowException, OSError, EOFError, zlib.error) as e:
        place = f" behind row {number - 1}" if number else ""
        said = str(e).splitlines()[0] if str(e) else type(e).__name__
        raise DataError(
            f"not a readable {suffix} file{place}: {said}", where=path, remedy="copy or write the file again"
        ) from e


def _arrow_rows(batch: Any, path: Path, first: int) -> Iterator[Item]:
    """Rows of a batch; a value that Python cannot hold (no UTF-8, a date beyond its years) is a refusal."""
    try:
        found: list[Any] = batch.to_pylist()
    except (ValueError, TypeError, ArithmeticError) as e:
        if batch.num_rows == 1:
            what = "not UTF-8 text" if isinstance(e, UnicodeDecodeError) else "a value that cannot be read"
            yield Refusal(f"{path} row {first}", 0, f"{what}: {e}")
            return
        for i in range(batch.num_rows):
            yield from _arrow_rows(batch.slice(i, 1), path, first + i)
        return
    for i, values in enumerate(found):
        yield Row(values, f"{path} row {first + i}", 0, columnar=True)


def _parquet_batches(data: Any, start: int) -> Iterator[tuple[int, Any]]:
    """Batches, each with the number of its first row; groups of rows that lie before `start` are not read."""
    import pyarrow.parquet as pq

    file = pq.ParquetFile(data)
    sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
    first, group = 0, 0
    while group < len(sizes) and first + sizes[group] <= start:
        first, group = first + sizes[group], group + 1
    for batch in file.iter_batches(batch_size=_BATCH, row_groups=range(group, len(sizes))):
        yield first, batch
        first += batch.num_rows


def _ipc_batches(data: Any) -> Iterator[tuple[int, Any]]:
    """Batches, each with the number of its first row. `datasets` writes the stream format, Feather and pyarrow the file
    format, under the same suffix."""
    import pyarrow as pa

    try:
        reader = pa.ipc.open_file(data)
        batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
    except pa.ArrowInvalid:
        data.seek(0)
        batches = iter(pa.ipc.open_stream(data))
    first = 0
    for batch in batches:
        yield first, batch
        first += batch.num_rows
