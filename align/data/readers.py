"""Rows of one file, each with the line it begins at. One function per kind of file, all of them generators.

A row that cannot be read is a refusal with its place, whatever is wrong with it, and reading goes on; only what makes
the rest of a file unreadable is an error of the whole file. Text stays text: no cell of a CSV is guessed to be a
number, a date or a truth value, and no row decides how another is read.
"""

from __future__ import annotations

import gzip
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

from align.data.audit import Refusal
from align.data.columnar import SUFFIXES as COLUMNAR
from align.data.columnar import read_arrow
from align.data.containers import are_keyed, are_turns, refuse_splits, rows_inside, sets_of, wrapped
from align.data.file_bytes import open_bytes, refuse_pointer, refuse_utf16, whole_text
from align.data.rows import LONGEST_LINE, Item, Row
from align.data.separated import read_csv
from align.data.values import BadValue, Json, end_of_value, kind_of, says_who
from align.errors import DataError

TEXT = ".txt"
SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", *COLUMNAR, TEXT)
STREAMED = (".jsonl", ".ndjson", *COLUMNAR, TEXT)  # kinds that can be read from any place on


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
    """Rows of one file. Raises DataError where the file cannot be read at all, or from some line on."""
    suffix = suffix_of(path)
    with _told(path):
        if suffix == ".json" or _is_array(path, suffix):
            yield from _read_json(path)
        elif suffix in STREAMED:
            yield from (item for item, _ in read_from(path, Place()))
        else:
            yield from read_csv(path, "\t" if suffix == ".tsv" else ",")


@dataclass(frozen=True, slots=True)
class Place:
    """Where reading a file goes on. offset: bytes of its text that were read, or rows of one of columns; line: the
    number of the next line, of text."""

    offset: int = 0
    line: int = 1


def read_from(path: Path, place: Place) -> Iterator[tuple[Item, Place]]:
    """Rows of a file of JSON lines or columns from `place` on, each with where the next begins. Raises DataError."""
    suffix = suffix_of(path)
    assert suffix in STREAMED, "files of other kinds are read as a whole"
    with _told(path):
        if place == Place() and _is_array(path, suffix):
            raise DataError(
                "the file is one JSON array, and only lines can be read from any place on",
                where=f"{path}:1",
                remedy="write it as JSON lines, an object a line",
            )
        if suffix in COLUMNAR:
            for item, row in read_arrow(path, suffix, place.offset):
                yield item, Place(row + 1)
        else:
            yield from _lines(path, place, _text_row if suffix == TEXT else json_row)


@contextmanager
def _told(path: Path) -> Iterator[None]:
    """What makes a file unreadable, or the rest of it, as a DataError."""
    try:
        refuse_pointer(path)
        yield
    except (EOFError, gzip.BadGzipFile, zlib.error) as e:
        raise DataError(f"the gzip file is damaged: {e}", where=path, remedy="copy the file again") from e
    except OSError as e:
        raise DataError(f"cannot be read: {e.strerror or e}", where=path, remedy="check the file's rights") from e


def json_row(text: bytes | str, origin: str) -> Item:
    """A row from the JSON object that stands alone in `text`, or why it is none."""
    try:
        decoded = text if isinstance(text, str) else text.decode("utf-8")
        return _object(Json().loads(decoded), origin)
    except UnicodeDecodeError as e:
        return Refusal(origin, 0, f"not UTF-8 text: {e.reason} at byte {e.start} of the line")
    except BadValue as e:
        return Refusal(origin, 0, str(e))


def _text_row(text: bytes, origin: str) -> Item:
    """A line of plain text as a row with the column `text`."""
    try:
        return Row({"text": text.decode("utf-8").rstrip("\r\n")}, origin, 0)
    except UnicodeDecodeError as e:
        return Refusal(origin, 0, f"not UTF-8 text: {e.reason} at byte {e.start} of the line")


def _object(value: Any, origin: str) -> Item:
    if isinstance(value, dict):
        return Row(value, origin, 0)
    if are_turns(value):
        return Row({"messages": value}, origin, 0)
    several = isinstance(value, list) and value and all(isinstance(item, dict) for item in value)
    hint = " of objects: a file that is one list is named .json, and .jsonl has an object a line" if several else ""
    return Refusal(origin, 0, f"a row must be a JSON object, got {kind_of(value)}{hint}")


# ------------------------------------------------------------------------------------------------- JSON


def _lines(path: Path, place: Place, row_of: Callable[[bytes, str], Item] = json_row) -> Iterator[tuple[Item, Place]]:
    # Only b"\n" ends a line: JSON may hold U+2028 and other line separators of Unicode inside a string.
    line, offset = place.line - 1, place.offset
    with open_bytes(path) as f:
        f.seek(offset)
        while True:
            line += 1
            try:
                raw = f.readline(LONGEST_LINE + 1)
                whole = len(raw) <= LONGEST_LINE or raw.endswith(b"\n") or _skip_line(f)
            except (EOFError, gzip.BadGzipFile, zlib.error) as e:
                at = path if line == 1 else f"{path}:{line}"
                raise DataError(f"the gzip file is damaged: {e}", where=at, remedy="copy the file again") from e
            if not raw:
                return
            offset = offset + len(raw) if whole else f.tell()
            if line == 1:
                refuse_utf16(raw[:4], path)
                raw = raw.removeprefix(b"\xef\xbb\xbf")
            if not whole:
                item: Item = Refusal(f"{path}:{line}", 0, f"the line is longer than {LONGEST_LINE >> 20} MiB")
            elif raw.strip():
                item = row_of(raw, f"{path}:{line}")
            else:
                continue
            yield item, Place(offset, line + 1)


def _skip_line(f: IO[bytes]) -> bool:
    """Read past the rest of a line without holding it; False: the line was not whole."""
    while (more := f.readline(1 << 20)) and not more.endswith(b"\n"):
        pass
    return False


def _is_array(path: Path, suffix: str) -> bool:
    """Whether a file named as lines is one JSON array of rows. A line that is a row's own list of messages is none."""
    if suffix not in (".jsonl", ".ndjson"):
        return False
    with open_bytes(path) as f:
        first = f.readline(LONGEST_LINE).removeprefix(b"\xef\xbb\xbf").strip()
        more = bool(f.read(1 << 16).strip())
    if not first.startswith(b"["):
        return False
    try:
        value = Json().loads(first.decode("utf-8"))
    except (UnicodeDecodeError, BadValue):
        return more and first[-1:] in (b"[", b"{", b",")
    return not more and isinstance(value, list) and all(isinstance(row, dict) and not says_who(row) for row in value)


_BLANK = re.compile(r"[\s,]*")


def _read_json(path: Path) -> Iterator[Item]:
    """An array of objects, objects one after another, or one object that holds the array of rows beside facts about it
    ({"version": 1, "data": [...]}). The line is where an object begins."""
    text = whole_text(path)
    blank = _BLANK.match(text)
    start = blank.end() if blank else 0
    if text[start : start + 1] not in ("[", "{"):
        raise DataError("neither a JSON array nor JSON objects", where=f"{path}:1", remedy="use .jsonl for JSON lines")
    if _is_lines(text, start):
        yield from (item for item, _ in _lines(path, Place()))
        return
    array = text[start] == "["
    json, position, line, counted = Json(), start + array, 1, 0
    first = f"{path}:{1 + text.count(chr(10), 0, start)}"
    while True:
        blank = _BLANK.match(text, position)
        position = blank.end() if blank else position
        line, counted = line + text.count("\n", counted, position), position
        if position >= len(text) or text[position] == "]":
            _end_of_json(text, position, array, f"{path}:{line}")
            return
        origin = f"{path}:{line}"
        try:
            value, position = json.decode(text, position)
        except BadValue as e:
            if e.line is not None:  # where the object ends is not known
                raise DataError(str(e), where=f"{path}:{e.line}", remedy="correct this line") from e
            position = end_of_value(text, position)
            yield Refusal(origin, 0, str(e))
            continue
        if origin == first and not array and not text[position:].strip():
            refuse_splits(value, path)
            yield from _inside(value, path) or [_object(value, origin)]
            return
        yield _object(value, origin)


def _inside(value: Any, path: Path) -> list[Item]:
    found = [(_object(row, place), beside) for row, place, beside in rows_inside(value, path)]
    return [replace(item, beside=beside) if isinstance(item, Row) else item for item, beside in found]


def _is_lines(text: str, start: int) -> bool:
    """Whether the first object is alone in its line: then each line is a row of its own, as in .jsonl."""
    end = text.find("\n", start)
    try:
        value = Json().loads(text[start : len(text) if end < 0 else end])
        more = bool(end > 0 and text[end:].strip())
        if isinstance(value, dict):
            return more or (wrapped(value) is None and not are_keyed(value) and not sets_of(value))
        return more and are_turns(value)
    except BadValue as e:
        return text[start] == "{" and e.line is None


def _end_of_json(text: str, position: int, array: bool, where: str) -> None:
    if array and position >= len(text):
        raise DataError("the JSON array is not closed", where=where, remedy="copy the file again")
    if not array and position < len(text):
        raise DataError("not valid JSON: a `]` that closes nothing", where=where, remedy="correct this line")
    if array and text[position + 1 :].strip():
        raise DataError(
            "there is more text behind the end of the JSON array, which would not be read",
            where=where,
            remedy="write one array, or one object a line (.jsonl)",
        )
