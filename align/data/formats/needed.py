"""Columns that an answer depends on, by their names: what no layout and no guess leaves out unsaid."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from align.data.formats.base import Row, is_number
from align.data.unread import is_filled

NEEDED = frozenset({
    "context", "contexts", "passage", "passages", "document", "documents", "article", "paragraph", "background",
    "premise", "hypothesis", "choices", "options", "story", "table", "evidence", "facts", "history", "input", "inputs",
    "a", "b", "c", "d", "schema", "code", "image_description", "starter_code", "body", "instances", "scenario", "ctx",
    "support",
})  # fmt: skip
"""What an answer depends on: never left out of a guess unsaid."""
_CHOICES = re.compile(
    r"(choice|option|opt|alternative|ending)_?([a-z]|\d+)|(op|sol|ans)_?([a-h]|\d+)|"
    r"((answer|possible|multiple|mc)_)?(choices|options|alternatives|endings)|possible_answers"
)
_PLACE = re.compile(r"\(?([A-Ha-h]|\d{1,2})[.)]?")
_NUMBERED = re.compile(r"(.*?)_?([a-f]|\d)")
_ASKED = ("prompt", "query", "instruction", "src", "history")
"""Our fields of a question that is a text."""
ANSWERED = ("response", "output")
"""Our fields of an answer, which may be a number: its digits are the text."""


def plain_name(name: str) -> str:
    """A column's name in small letters, its words apart by `_`."""
    return re.sub(r"[\s-]+", "_", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name.strip())).lower()


def needed(name: str) -> bool:
    """Whether an answer may depend on a column of this name."""
    plain = plain_name(name)
    return plain in NEEDED or _CHOICES.fullmatch(plain) is not None


def asked_as_text(required: Collection[str]) -> str | None:
    """The field of these that a layout reads as the text of a question; None of layouts of messages."""
    return next((name for name in _ASKED if name in required and "instances" not in required), None)


def beside_text(read: Collection[str], asked: str, rows: Sequence[Row]) -> str | None:
    """A column that holds what an answer may depend on, in a row whose question is a text that does not hold it; None
    where there is none. read: fields that the layout reads."""
    for row in rows:
        question = row.get(asked)
        if isinstance(question, list) and asked == "src":
            question = "\n".join(str(one) for one in question)
        if not isinstance(question, str) or not question:
            continue
        for name, value in row.items():
            if name not in read and needed(name) and _holds(value) and not stands_in(value, question):
                return name
    return None


def stands_in(value: Any, question: Any) -> bool:
    """Whether a question that is a text holds a value already: all of a list's texts."""
    items = value if isinstance(value, list) else [value]
    return isinstance(question, str) and all(isinstance(one, str) and one in question for one in items)


def _holds(value: Any) -> bool:
    return isinstance(value, str | list | dict) and is_filled(value)


def names_one(answer: Any) -> bool:
    """Whether an answer may be the place of a choice: a number, its digits or a letter, as in `(b)` or `2.`."""
    return is_number(answer) or (isinstance(answer, str) and _PLACE.fullmatch(answer) is not None)


def choices_beside(answer: Any, shown: Mapping[str, Any], used: Collection[str]) -> str | None:
    """What may be the choices of which an answer names one: a list, an object, of which a text names only one whose
    keys are places, or texts whose names differ in their last letter or digit. shown: a value of each column; used:
    columns that are read."""
    left = {name: value for name, value in shown.items() if name not in used}
    for name, value in left.items():
        listed = isinstance(value, dict) and (is_number(answer) or all(map(names_one, value)))
        items = list(value.values()) if listed else value
        if isinstance(items, list) and len(items) > 1 and not any(isinstance(one, list) for one in items):
            return f"`{name}`"
    texts = [name for name, value in left.items() if isinstance(value, str)]
    stems = {name: found[1] for name in texts if (found := _NUMBERED.fullmatch(plain_name(name)))}
    several = next((stem for stem, count in Counter(stems.values()).items() if count > 1), None)
    if several is None:
        return None
    return " and ".join(f"`{name}`" for name, stem in stems.items() if stem == several)
