"""Where rows come from: files, folders, hub data sets and generators, as rows that remember file and line.

file        .jsonl .json (an array, or JSON lines in spite of the name) .csv .tsv .parquet .arrow, also with .gz; .txt,
            of which every line is a row's `text`
folder      all such files in it, in order of name; `split` chooses a subfolder or the files of that name, or an
            entry of its dataset_info.json (LLaMA-Factory, ms-swift)
hub id      `owner/name`, read with `datasets`; `options` are passed on (`name`, `revision`, `data_files`)
generator   `file.py:function`, called with `options` in a child process that has a time limit
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from align.data import generators
from align.data.audit import Refusal
from align.data.formats import row_function
from align.data.generator_child import REFUSED
from align.data.readers import SUFFIXES, TEXT, json_row, read_file, suffix_of
from align.data.records import RowError
from align.data.registries import Entry, entry_of
from align.data.rows import Item, Row
from align.data.values import problem_of
from align.errors import DataError, SetupError
from align.recipe.inputs import DataSource

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_SPLITS = ("train", "test", "validation", "valid", "val", "dev", "eval")


@dataclass(frozen=True)
class Opened:
    """A source that was found: how to read it, and the hash of what it holds. folder: of a generator's file. entry:
    what a folder says of these files. row_of: a user's function of each row. notes: for the report."""

    path: str
    files: tuple[Path, ...] = ()
    generated: bytes | None = None  # JSON lines
    hub: Any = None  # a datasets.Dataset
    folder: Path | None = None
    entry: Entry | None = None
    row_of: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None
    notes: tuple[str, ...] = ()

    def digest(self) -> str:
        """SHA-256 of the bytes (files), or of the data set's fingerprint (hub)."""
        h = hashlib.sha256()
        for file in self.files:
            h.update(file.name.encode())
            with file.open("rb") as f:
                h.update(hashlib.file_digest(f, "sha256").digest())
        h.update(self.generated or b"")
        if self.entry is not None:
            h.update(json.dumps(self.entry.said, sort_keys=True).encode())
        if self.hub is not None:
            h.update(self.hub._fingerprint.encode())
        return h.hexdigest()

    def rows(self, limit: int | None = None) -> Iterator[Item]:
        """Rows in order, numbered through all files, at most `limit` of them (refused lines count)."""
        if self.hub is not None:
            items = self._numbered(_undecoded(self.hub))
        elif self.generated is not None:
            items = self._generated(self.generated)
        else:
            items = (self.item(item, file) for file in self.files for item in read_file(file))
        for number, item in enumerate(islice(items, limit)):
            yield self.numbered(item, number)

    def item(self, item: Item, file: Path) -> Item:
        """An item of one of the files: beside it lie its media, and what the folder says of it is applied."""
        if not isinstance(item, Row):
            return item
        rewrite = self.entry.rewrite if self.entry is not None else None
        try:
            values = item.values if rewrite is None else rewrite(item.values)
        except (TypeError, AttributeError, LookupError) as error:
            return Refusal(item.origin, item.number, f"its messages have no roles as the folder names them: {error}")
        return replace(item, folder=file.parent, values=values)

    def numbered(self, item: Item, number: int) -> Item:
        """An item with its number in the source, its row as the user's function makes it."""
        if isinstance(item, Refusal):
            return replace(item, row=number)
        try:
            values = item.values if self.row_of is None else dict(self.row_of(item.values))
        except RowError as error:
            return Refusal(item.origin, number, str(error))
        return replace(item, number=number, values=values)

    def _numbered(self, rows: Iterable[Any]) -> Iterator[Item]:
        for n, values in enumerate(rows):
            origin, wrong = f"{self.path} row {n}", problem_of(values)
            if wrong is not None:
                yield Refusal(origin, n, wrong)
                continue
            yield Row(dict(values), origin, n, self.folder, columnar=self.hub is not None)

    def _generated(self, lines: bytes) -> Iterator[Item]:
        for n, line in enumerate(lines.splitlines()):
            origin = f"{self.path} row {n}"
            if line.startswith(REFUSED):
                yield Refusal(origin, n, str(json.loads(line[len(REFUSED) :])))
                continue
            item = json_row(line, origin)
            yield replace(item, folder=self.folder) if isinstance(item, Row) else item


def open_source(
    source: DataSource, *, folder: Path | None = None, cache: Path | None = None, limit: int | None = None
) -> Opened:
    """Find a source without reading its rows (a generator is run, up to `limit` rows).

    folder: what relative paths are relative to. cache: where generated rows are kept, if anywhere.
    Raises DataError where nothing is found, PluginError where `format:` is a user's and cannot be loaded.
    """
    return replace(_found(source, folder, cache, limit), row_of=row_function(source.format))


def _found(source: DataSource, folder: Path | None, cache: Path | None, limit: int | None) -> Opened:
    if generators.is_generator(source.path):
        rows = generators.run(source, folder=folder, cache=cache, limit=limit)
        return Opened(source.path, generated=rows, folder=generators.folder_of(source.path, folder))
    path = Path(source.path) if folder is None else folder / source.path
    if source.options and path.exists():
        raise DataError(
            f"`options` ({', '.join(source.options)}) on files",
            where=path,
            remedy="only generators (file.py:function) and hub data sets take options; leave them out",
        )
    if path.is_dir() and (entry := entry_of(path, source.split)) is not None:
        for file in entry.files:
            suffix_of(file)
        return Opened(source.path, entry.files, entry=entry)
    if path.is_dir():
        return Opened(source.path, _folder_files(path, source.split), notes=_beside(path, source.split))
    if path.is_file():
        if source.split is not None:
            raise DataError(
                f"`split: {source.split}` on a single file",
                where=path,
                remedy="`split` chooses within a folder or a hub data set; name the split's own file instead",
            )
        suffix_of(path)
        return Opened(source.path, (path,))
    if is_hub_id(source.path):
        return Opened(source.path, hub=_load_hub(source))
    raise _missing(path)


def is_hub_id(path: str) -> bool:
    """Whether a path that does not exist may be meant as a hub data set."""
    return _HUB_ID.fullmatch(path) is not None and not path.removesuffix(".gz").endswith(SUFFIXES)


def on_hub(source: DataSource, folder: Path | None) -> bool:
    """Whether a source is a hub data set: nothing of that name is here."""
    path = Path(source.path) if folder is None else folder / source.path
    return not path.exists() and is_hub_id(source.path)


def _missing(path: Path) -> DataError:
    if os.path.lexists(path):
        what = "a link to nothing, or to itself" if path.is_symlink() else "no file and no folder (a pipe or a device)"
        return DataError(f"this is {what}", where=path, remedy="write the rows to a file, and name that")
    names = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, names, n=1)
    if near:
        remedy = f"did you mean {path.parent / near[0]}?"
    elif not path.parent.is_dir():
        remedy = f"the folder {path.parent} does not exist either; paths in a recipe are relative to the recipe's file"
    else:
        remedy = "check `data.path`; paths in a recipe are relative to the recipe's file"
    return DataError("there is no such file or folder", where=path, remedy=remedy)


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


def _beside(folder: Path, split: str | None) -> tuple[str, ...]:
    """What is said of data in subfolders, which are not read."""
    sub = folder / split if split else folder
    if not sub.is_dir() or not _data_files(sub):
        return ()
    left = sorted(part.name for part in sub.iterdir() if part.is_dir() and _data_files(part))
    return (f"data files in subfolders are not read: {', '.join(left)} (`split` chooses one)",) if left else ()


def _data_files(folder: Path) -> list[Path]:
    """Files in order of name, without the .json files that `datasets` writes beside its .arrow files, and without text
    where others are: that is a licence or a note."""
    files = sorted(p for p in folder.iterdir() if p.is_file() and p.name.removesuffix(".gz").endswith(SUFFIXES))
    files = [p for p in files if p.name not in ("state.json", "dataset_info.json", "dataset_dict.json")]
    return [p for p in files if suffix_of(p) != TEXT] or files


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


def _undecoded(data: Any) -> Any:
    """A data set whose images are {bytes, path}, as they are stored: what decodes them is ours, with its limits."""
    from datasets.features.features import require_decoding

    if not any(require_decoding(feature) for feature in (data.features or {}).values()):
        return data
    return (row for table in data.with_format("arrow").iter(batch_size=64) for row in table.to_pylist())


def apply_columns(rows: Sequence[Row], source: DataSource) -> list[dict[str, Any]]:
    """The rows under our names (see `renamed`). Raises DataError."""
    return renamed([row.values for row in rows], source.columns, source.path)


def value_at(row: Mapping[str, Any], path: str) -> Any:
    """The value of a column, or of a field below it where the column's name has no dot; None where there is none."""
    if path in row:
        return row[path]
    value: Any = row
    for name in path.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def renamed(rows: Sequence[dict[str, Any]], columns: Mapping[str, str], where: str) -> list[dict[str, Any]]:
    """Rows under our names: `columns: {prompt: question}` renames question to prompt, and `{answer: reward_model.gold}`
    is what stands under `gold` of the object `reward_model`. Raises DataError."""
    if not columns:
        return list(rows)
    found = {name for row in rows for name in row}
    for ours, theirs in columns.items():
        if rows and theirs not in found and all(value_at(row, theirs) is None for row in rows):
            raise DataError(
                f"`columns: {{{ours}: {theirs}}}`: there is no column {theirs!r} (found: {', '.join(sorted(found))})",
                where=where,
                remedy=f"it maps our field to your column: `columns: {{{theirs}: {ours}}}`"
                if ours in found
                else "name a column that is there",
            )
    return under_our_names(rows, columns)


def under_our_names(rows: Sequence[dict[str, Any]], columns: Mapping[str, str]) -> list[dict[str, Any]]:
    """`renamed`, of rows of which some, or all, may lack a column that is mapped."""
    if not columns:
        return list(rows)
    taken = set(columns.values()) | set(columns)
    return [
        {ours: value_at(row, theirs) for ours, theirs in columns.items()}
        | {name: value for name, value in row.items() if name not in taken}
        for row in rows
    ]
