"""Where rows come from: files, folders, hub data sets and generators, as rows that remember file and line.

file        .jsonl .json (an array, or JSON lines in spite of the name) .csv .tsv .parquet .arrow, also with .gz
folder      all such files in it, in order of name; `split` chooses a subfolder or the files of that name
hub id      `owner/name`, read with `datasets`; `options` are passed on (`name`, `revision`, `data_files`)
generator   `file.py:function`, called with `options` in a child process that has a time limit
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from align.data.audit import Refusal
from align.errors import DataError, SetupError
from align.recipe.schema import DataSource

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".feather")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_SPLITS = ("train", "test", "validation", "valid", "val", "dev", "eval")


@dataclass(frozen=True, slots=True)
class Row:
    """One row. origin: "file:line", or "file row n" (from 0) where a file has no lines. number: in its source."""

    values: dict[str, Any]
    origin: str
    number: int


Item = Row | Refusal  # a line that is not valid JSON is a refusal with its place; reading goes on


@dataclass(frozen=True)
class Opened:
    """A source that was found: how to read it, and the hash of what it holds."""

    path: str
    files: tuple[Path, ...] = ()
    hub: Any = None  # a datasets.Dataset

    def digest(self) -> str:
        """SHA-256 of the bytes (files), or of the data set's fingerprint (hub)."""
        h = hashlib.sha256()
        for file in self.files:
            h.update(file.name.encode())
            with file.open("rb") as f:
                h.update(hashlib.file_digest(f, "sha256").digest())
        if self.hub is not None:
            h.update(self.hub._fingerprint.encode())
        return h.hexdigest()

    def rows(self, limit: int | None = None) -> Iterator[Item]:
        """Rows in order, numbered through all files, at most `limit` of them (refused lines count)."""
        items = self._hub_rows() if self.hub is not None else (i for f in self.files for i in read_file(f))
        for number, item in enumerate(islice(items, limit)):
            if isinstance(item, Refusal):
                yield Refusal(item.origin, number, item.reason)
            else:
                yield Row(item.values, item.origin, number)

    def _hub_rows(self) -> Iterator[Item]:
        for n, values in enumerate(self.hub):
            yield Row(dict(values), f"{self.path} row {n}", n)


def open_source(
    source: DataSource, *, folder: Path | None = None, cache: Path | None = None, limit: int | None = None
) -> Opened:
    """Find a source without reading its rows (a generator is run, up to `limit` rows).

    folder: what relative paths are relative to. cache: where generated rows are kept; None keeps them in a temporary
    folder for as long as the process lives. Raises DataError where nothing is found.
    """
    from align.data import generators

    if generators.is_generator(source.path):
        file = generators.run(source, folder=folder, cache=cache, limit=limit)
        return Opened(source.path, (file,))
    path = Path(source.path) if folder is None else folder / source.path
    if source.options and path.exists():
        raise DataError(
            f"`options` ({', '.join(source.options)}) on files",
            where=path,
            remedy="only generators (file.py:function) and hub data sets take options; leave them out",
        )
    if path.is_dir():
        return Opened(source.path, _folder_files(path, source.split))
    if path.is_file():
        if source.split is not None:
            raise DataError(
                f"`split: {source.split}` on a single file",
                where=path,
                remedy="`split` chooses within a folder or a hub data set; name the split's own file instead",
            )
        _suffix(path)
        return Opened(source.path, (path,))
    if is_hub_id(source.path):
        return Opened(source.path, hub=_load_hub(source))
    raise _missing(path)


def is_hub_id(path: str) -> bool:
    """Whether a path that does not exist may be meant as a hub data set."""
    return _HUB_ID.fullmatch(path) is not None and not path.removesuffix(".gz").endswith(SUFFIXES)


def _missing(path: Path) -> DataError:
    import difflib

    names = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, names, n=1)
    if near:
        remedy = f"did you mean {path.parent / near[0]}?"
    elif not path.parent.is_dir():
        remedy = f"the folder {path.parent} does not exist either; paths in a recipe are relative to the recipe's file"
    else:
        remedy = "check `data.path`; paths in a recipe are relative to the recipe's file"
    return DataError("there is no such file or folder", where=path, remedy=remedy)


def _suffix(path: Path) -> str:
    name = path.name.removesuffix(".gz")
    for suffix in SUFFIXES:
        if name.endswith(suffix):
            return suffix
    raise DataError(
        f"unknown kind of data file {path.suffix!r}",
        where=path,
        remedy=f"known: {', '.join(SUFFIXES)} (also with .gz); a generator is written file.py:function",
    )


def _folder_files(folder: Path, split: str | None) -> tuple[Path, ...]:
    sub = folder / split if split else folder
    files = _data_files(sub) if sub.is_dir() else []
    if split and not files:
        files = [f for f in _data_files(folder) if _split_of(f) == split]
    if not split and not files:
        parts = sorted(p.name for p in folder.iterdir() if p.is_dir() and _data_files(p))
        if parts:
            raise DataError(
                f"the folder holds the splits {', '.join(parts)}", where=folder, remedy=f"choose: `split: {parts[0]}`"
            )
    if not files:
        what = f"no data files of split {split!r}" if split else "no data files"
        raise DataError(f"{what} in this folder", where=folder, remedy=f"known: {', '.join(SUFFIXES)}")
    splits = sorted({s for f in files if (s := _split_of(f)) in _SPLITS})
    if not split and len(splits) > 1:
        raise DataError(
            f"the folder holds the splits {', '.join(splits)}",
            where=folder,
            remedy=f"choose one: `split: {splits[-1]}`",
        )
    return tuple(files)


def _data_files(folder: Path) -> list[Path]:
    """Files in order of name. The .json files that `datasets` writes beside its .arrow files describe, not hold, rows."""
    files = sorted(p for p in folder.iterdir() if p.is_file() and p.name.removesuffix(".gz").endswith(SUFFIXES))
    return [p for p in files if p.name not in ("state.json", "dataset_info.json", "dataset_dict.json")]


def _split_of(file: Path) -> str:
    return re.split(r"[-_.]", file.name, maxsplit=1)[0]


def _load_hub(source: DataSource) -> Any:
    try:
        import datasets
    except ImportError as e:
        raise SetupError(f"hub data sets need the package `datasets`: {e}", remedy="pip install datasets") from e
    datasets.disable_progress_bars()
    options = dict(source.options)
    try:
        data = datasets.load_dataset(source.path, split=source.split, **options)
    except Exception as e:  # load_dataset raises anything from ConnectionError to its builders' own errors
        raise DataError(
            f"the hub data set cannot be loaded: {type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}",
            where=source.path,
            remedy="check the name (there is no such local file either), `split`, `options` and the network",
        ) from e
    if isinstance(data, dict):
        raise DataError(
            f"the data set has the splits {', '.join(data)}", where=source.path, remedy="choose one with `split:`"
        )
    return data


# ------------------------------------------------------------------------------------------------- reading files


def read_file(path: Path) -> Iterator[Item]:
    """Rows of one file. Raises DataError where the file cannot be read at all."""
    suffix = _suffix(path)
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
                yield Row(values, f"{path} row {number}", 0)
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


# ------------------------------------------------------------------------------------------------- columns


def apply_columns(rows: Sequence[Row], source: DataSource) -> list[dict[str, Any]]:
    """The rows under our names: `columns: {prompt: question}` renames question to prompt. Raises DataError."""
    if not source.columns:
        return [row.values for row in rows]
    found = {name for row in rows for name in row.values}
    for ours, theirs in source.columns.items():
        if rows and theirs not in found:
            raise DataError(
                f"`columns: {{{ours}: {theirs}}}`: there is no column {theirs!r} (found: {', '.join(sorted(found))})",
                where=source.path,
                remedy="name a column that is there",
            )
    taken = set(source.columns.values()) | set(source.columns)
    return [
        {ours: row.values.get(theirs) for ours, theirs in source.columns.items()}
        | {name: value for name, value in row.values.items() if name not in taken}
        for row in rows
    ]
