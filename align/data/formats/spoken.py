"""Turns as plain strings: ["how are you?", "fine", ...], the user first, as UltraChat and DailyDialog have them.
Nothing in the row says who speaks; that they alternate is told with the layout's name."""

from __future__ import annotations

from typing import Any

from align.data.formats.base import Layout, Row, tools_of, weight_of
from align.data.formats.messages import with_system
from align.data.records import Conversation, Message, Prompt, RowError, prompt_from

NAMES = ("messages", "conversations", "conversation", "chat", "dialog", "dialogue", "utterances")
"""Columns whose lists of strings are turns of two; under other names they may be anything: `turns` of MT-Bench are the
user's alone, `data` of UltraChat are two's."""


def are_spoken(value: Any) -> bool:
    """Whether a value is two strings or more, each of which could be a turn."""
    return isinstance(value, list) and len(value) > 1 and all(isinstance(item, str) for item in value)


def _turns(row: Row) -> tuple[Message, ...]:
    said = row["messages"]
    if not are_spoken(said):
        raise RowError("`messages` must be a list of two strings or more, as in most rows of its source")
    return with_system(row, tuple(Message(("user", "assistant")[n % 2], text) for n, text in enumerate(said)))


def _conversation(row: Row) -> Conversation:
    return Conversation((), _turns(row), tools_of(row), weight_of(row))


def _prompt(row: Row) -> Prompt:
    return prompt_from(_turns(row), (), tools_of(row))


def _fits(row: Row) -> bool:
    return are_spoken(row["messages"])


_NAME, _FORMATS, _READ = "strings in turn, the user's first", ("messages",), frozenset({"messages"})

LAYOUTS = (
    Layout(_NAME, _FORMATS, "conversation", _READ, _conversation, frozenset({"system"}), fits=_fits),
    Layout(_NAME, _FORMATS, "prompt", _READ, _prompt, frozenset({"system"}), fits=_fits),
)
