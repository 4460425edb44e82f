"""One JSON object that holds the rows of a file: under a name, beside facts about them, or each under its id.

What stands beside the rows is of all of them. Where it says what they ask for, what they ask about or what they weigh,
the file is refused: no row would have it. All else is named in the report, with the rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from align.data.formats.flags import FLAGS
from align.data.formats.guess import QUESTIONS, read_under_a_guess
from align.data.formats.needed import plain_name
from align.data.unread import is_filled
from align.data.values import says_who, shown
from align.errors import DataError

_SPLITS = ("train", "training", "test", "testing", "validation", "valid", "val", "dev", "eval", "train_sft", "test_sft")
_WRAPPERS = ("data", "rows", "examples", "samples", "instances", "dataset", "questions", *_SPLITS)
_OF_EACH = frozenset({
    "instructions", "task_prefix", "prefix", "suffix", "template", "prompt_template", "definition", "content", "label",
    "labels", "task_instruction", "task_description", "meta_instruction", "tools", "preamble",
})  # fmt: skip
"""What may be of each row, beside the names of questions and of what an answer depends on."""


def rows_inside(value: Any, path: Path) -> list[tuple[Any, str, tuple[str, ...]]]:
    """(row, place, what stands beside the rows) of each row that an object holds under one name, or by their ids; none
    of an object that is a row. Raises DataError where what stands beside them is of each row."""
    if (name := wrapped(value)) is not None:
        beside = _beside(value, name, path)
        return [(row, f"{path} {name}[{n}]", beside) for n, row in enumerate(value[name])]
    return [(row, f"{path} {key}", ()) for key, row in value.items()] if are_keyed(value) else []


def _beside(value: Mapping[str, Any], name: str, path: Path) -> tuple[str, ...]:
    left = [other for other, one in value.items() if other != name and is_filled(one)]
    for other in left:
        plain = plain_name(other)
        if plain in QUESTIONS or plain in FLAGS or plain in _OF_EACH or read_under_a_guess(other):
            raise DataError(
                f"the file is one object: `{name}` holds its rows, and `{other}` beside it may be of each of them",
                where=path,
                remedy=f"write `{other}` into every row, or leave it out of the file",
            )
    return tuple(left)


def refuse_splits(value: Any, path: Path) -> None:
    """Raises DataError for an object of several sets of rows, of which one is meant, or of rows without names."""
    held = sets_of(value)
    if held and isinstance(next(iter(held.values()))[0], dict):
        raise DataError(
            f"the file holds the splits {', '.join(held)}, each a list of rows",
            where=path,
            remedy="write the one that is meant to a file of its own",
        )
    if held:
        first = next(iter(held.values()))[0]
        raise DataError(
            f"the rows of {', '.join(f'`{name}`' for name in held)} are lists without columns' names: {shown(first)}",
            where=path,
            remedy="write each as an object that names its values, such as text and label, one split a file",
        )


def sets_of(value: Any) -> dict[str, list[Any]]:
    """What an object holds that is nothing but several splits of rows, or lists in the place of rows; {} of others."""
    held = {name: rows for name, rows in value.items() if isinstance(rows, list) and rows}
    if not held or len(held) < len(value):
        return {}
    rows = list(chain(*held.values()))
    splits = len(held) > 1 and held.keys() <= {*_SPLITS} and all(isinstance(row, dict) for row in rows)
    bare = all(isinstance(row, list) and len(row) > 1 and not are_turns(row) for row in rows)
    return held if splits or (bare and _of_texts(rows)) else {}


def _of_texts(rows: list[Any]) -> bool:
    """Whether lists are rows of values, a text among them, and no bare turns of a chat."""
    return all(any(isinstance(cell, str) for cell in row) and len(row) == len(rows[0]) for row in rows)


def wrapped(value: Any) -> str | None:
    """The name under which an object holds rows, and nothing else that is a list or an object; None of a row."""
    held = [name for name, one in value.items() if isinstance(one, list | dict)] if isinstance(value, dict) else []
    rows = value[held[0]] if len(held) == 1 and held[0] in _WRAPPERS else None
    return held[0] if isinstance(rows, list) and rows and all(isinstance(row, dict) for row in rows) else None


def are_keyed(value: Any) -> bool:
    """Whether an object holds nothing but rows, each under its id (PubMedQA): several objects with a key in common,
    that are no messages."""
    rows = list(value.values()) if isinstance(value, dict) else []
    alike = len(rows) > 1 and all(isinstance(row, dict) and not says_who(row) for row in rows)
    return alike and bool(set(rows[0]).intersection(*rows[1:]))


def are_turns(value: Any) -> bool:
    """Whether a row is nothing but its list of messages (ColossalAI, xtuner)."""
    return isinstance(value, list) and bool(value) and all(isinstance(m, dict) and says_who(m) for m in value)
