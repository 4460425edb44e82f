"""What a layout is, and what its reader is made of.

A format file exports `LAYOUTS`. A layout says which kind of record it makes, which columns it needs and may use, and
converts one row. Which of them a source has is found in choosing.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from align.data.formats.arguments import COLUMNS as ARGUMENTS
from align.data.formats.arguments import arguments_of
from align.data.formats.tools import schemas_of
from align.data.records import (
    RECORDS,
    Content,
    Kind,
    MediaKind,
    MediaPart,
    Message,
    Prompt,
    Record,
    RowError,
    known_roles,
)

Row = Mapping[str, Any]

MEDIA: Mapping[str, MediaKind] = {
    "images": "image", "image": "image",
    "videos": "video", "video": "video",
    "audios": "audio", "audio": "audio",
}  # fmt: skip
"""Columns that hold media, one or a list of them."""
REJECTED_MEDIA: Mapping[str, MediaKind] = {
    "rejected_images": "image", "rejected_videos": "video", "rejected_audios": "audio",
}  # fmt: skip
"""What the rejected side of a pair shows instead (ms-swift)."""
COMMON = frozenset({"tools", "functions", "weight", "margin", *ARGUMENTS, *MEDIA, *REJECTED_MEDIA})
"""Columns that any layout may use."""


def _always(row: Row) -> bool:
    return True


@dataclass(frozen=True)
class Layout:
    """One way to write one kind of record in columns.

    name: for messages. formats: the names `format:` knows it by. kind: of record. required, optional: columns. read:
    makes the record. fits: whether a row with these columns is of this layout (message lists with role/content and with
    from/value have the same columns). gives_way: to any other that fits. verbatim: its columns are another project's,
    found as they are and never the target of `columns:` (of a prompt they are free to be a reward's).
    """

    name: str
    formats: tuple[str, ...]
    kind: Kind
    required: frozenset[str]
    read: Callable[[Row], Record]
    optional: frozenset[str] = frozenset()
    fits: Callable[[Row], bool] = _always
    gives_way: bool = False
    verbatim: bool = False

    def convert(self, row: Row) -> Record:
        """The row's record, with what any layout may say. Raises RowError."""
        record = self.read(row)
        if not isinstance(record, RECORDS[self.kind]):
            raise RowError(f"the layout {self.name} is of a {self.kind}, and read a {type(record).__name__}")
        if isinstance(record, Prompt) and record.reference_answer and row.get("continue_final_message") is True:
            raise RowError(
                "`continue_final_message` says that the last answer is only begun: say so in its message, with "
                "`prefix: true`, or leave the column out to have it taken off as the reference answer"
            )
        if arguments := arguments_of(row):
            record = replace(record, arguments=arguments)
        return replace(record, weight=weight_of(row)) if isinstance(record, Prompt) else record

    @property
    def columns(self) -> frozenset[str]:
        """Every column that it may read."""
        return self.required | self.optional | COMMON

    def describe(self) -> str:
        """Its name and columns, for a message."""
        optional = f" [{', '.join(sorted(self.optional))}]" if self.optional else ""
        return f"{self.name}: {', '.join(sorted(self.required))}{optional}"


# ------------------------------------------------------------------------------------------------- reading values


def text_of(row: Row, column: str) -> str:
    """A column that must be text."""
    value = row.get(column)
    if not isinstance(value, str):
        raise RowError(f"`{column}` must be text, got {_shown(value)}")
    return value


def optional_text(row: Row, column: str) -> str:
    return "" if row.get(column) is None else text_of(row, column)


def answer_of(row: Row, column: str, *, needed: bool = True) -> str:
    """An answer that must be text, or a number, whose digits are its text. needed: else "" where there is none."""
    value = row.get(column)
    if is_number(value):
        return str(value)
    return text_of(row, column) if needed else optional_text(row, column)


def is_number(value: Any) -> bool:
    """Whether a value is a finite number, which a truth value is not."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < float("inf")


def label_of(row: Row, column: str = "label") -> bool:
    """A label that must be a boolean, or a word that can mean nothing else. Numbers are refused: of a score, 0 is as
    often the middle as the worst."""
    value = row.get(column)
    if isinstance(value, str):
        value = _VERDICTS.get(re.sub(r"[\s-]+", "_", value.strip().lower()), value)
    if not isinstance(value, bool):
        number = isinstance(value, int | float)
        how = " (a number may be a score: a function of the row, `format: mine.py:rows`, can say what it means)"
        words = f"`{column}` must be true or false, or words such as good or bad, got {_shown(value)}"
        raise RowError(words + how * number)
    return value


_VERDICTS = {
    word: good
    for pair in (
        ("true", "false"), ("yes", "no"), ("good", "bad"), ("desirable", "undesirable"), ("chosen", "rejected"),
        ("accepted", "rejected"), ("preferred", "dispreferred"), ("thumbs_up", "thumbs_down"), ("like", "dislike"),
        ("upvote", "downvote"),
    )
    for word, good in zip(pair, (True, False), strict=True)
}  # fmt: skip


def margin_of(row: Row) -> float | None:
    """By how much a pair's chosen side is to score higher (a reward model's margin); None where the row has none."""
    return None if row.get("margin") is None else _number(row, "margin")


def weight_of(row: Row) -> float:
    """The sample weight of a row; 1 where there is none."""
    weight = 1.0 if row.get("weight") is None else _number(row, "weight")
    if weight < 0:
        raise RowError(f"`weight` must be a number >= 0, got {_shown(row['weight'])}")
    return weight


_NUMBER = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)?", re.A)


def _number(row: Row, column: str) -> float:
    """A finite number that float32, in which losses compute, can hold; of a CSV, its digits."""
    value = row[column]
    if isinstance(value, str) and _NUMBER.fullmatch(value.strip()):
        value = float(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < _LARGEST:
        raise RowError(f"`{column}` must be a number, got {_shown(value)}")
    return float(value)


_LARGEST = 3.4e38  # of float32


def tools_of(row: Row) -> tuple[Mapping[str, Any], ...]:
    """Tool schemas of `tools`, or of `functions` (OpenAI's older name), as functions that templates read."""
    given = [name for name in ("tools", "functions") if row.get(name)]
    if len(given) > 1:
        raise RowError("the row has `tools` and `functions`; one of them holds its tools")
    return schemas_of(row[given[0]], given[0]) if given else ()


def content_of(value: Any) -> Content:
    """A message's content: text, or text and media where content parts hold any. Raises RowError."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return joined([_part(part) for part in value])
    raise RowError(f"a message's content must be text or content parts, got {_shown(value)}")


def joined(parts: Iterable[str | MediaPart]) -> Content:
    """Parts as a content: neighbouring texts are one, and without media it is the text alone."""
    out: list[str | MediaPart] = []
    for part in parts:
        if isinstance(part, str) and out and isinstance(out[-1], str):
            out[-1] += part
        elif part != "":
            out.append(part)
    if all(isinstance(part, str) for part in out):
        return "".join(str(part) for part in out)
    return tuple(out)


_MEDIA_TYPES: Mapping[str, MediaKind] = {
    "image": "image", "image_url": "image", "input_image": "image",
    "video": "video", "video_url": "video",
    "audio": "audio", "audio_url": "audio", "input_audio": "audio",
}  # fmt: skip
_SOURCES = ("path", "url", "base64", "bytes")  # beside the type's own name, where a part may say what it shows


def _part(part: Any) -> str | MediaPart:
    if isinstance(part, str):
        return part
    if not isinstance(part, dict):
        raise RowError(f"a content part must be an object, got {_shown(part)}")
    part = {name: value for name, value in part.items() if value is not None}  # Arrow adds the fields of other parts
    kind = part.get("type") or next((name for name in ("text", *_MEDIA_TYPES) if name in part), None)
    if kind in ("text", "input_text", "output_text") and isinstance(part.get("text"), str):
        return str(part["text"])
    if isinstance(kind, str) and kind in _MEDIA_TYPES:
        return MediaPart(_MEDIA_TYPES[kind], _source(part, kind))
    raise RowError(f"a content part of type {kind!r} (known: text, image, image_url, video, audio)")


def _source(part: Mapping[str, Any], kind: str) -> Any:
    """What a part shows: OpenAI nests it ({image_url: {url}}), transformers writes image, path, url or base64."""
    named = next((part[name] for name in (kind, _MEDIA_TYPES[kind], *_SOURCES) if name in part), None)
    if isinstance(named, dict) and isinstance(named.get("url"), str):
        return named["url"]
    if isinstance(named, dict) and isinstance(named.get("data"), str):  # input_audio: {data, format}
        return f"data:audio/{named.get('format', 'wav')};base64,{named['data']}"
    if isinstance(named, str) and named == part.get("base64"):
        return f"data:{_MEDIA_TYPES[kind]}/*;base64,{named}"
    return named


def is_list_of(value: Any, *keys: str) -> bool:
    """A non-empty list whose first element has all these keys."""
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict) and all(k in value[0] for k in keys)


def checked(messages: Sequence[Message]) -> tuple[Message, ...]:
    known_roles(messages)
    return tuple(messages)


def _shown(value: Any) -> str:
    text = "nothing" if value is None else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
