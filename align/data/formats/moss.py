"""MOSS: `meta_instruction`, `chat: {turn_1: {Human, Inner Thoughts, Commands, Tool Responses, MOSS}, turn_2: ...}`.

Each text stands between MOSS's own marks (`<|Human|>: ...<eoh>`), which go; what is `None` in them is nothing. Inner
thoughts are the answer's thoughts. Commands are calls in a syntax of MOSS's own, whose tools no schema declares: such a
row is refused, as is one with a tool's answer that nothing called, with a turn that lacks a side or with a mark of
which turns are learnt. Other keys of a turn are named in the report.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from align.data.formats.base import Layout, Row, tools_of, weight_of
from align.data.formats.flags import FLAGS
from align.data.formats.messages import with_system
from align.data.records import Conversation, Message, Prompt, RowError, prompt_from
from align.data.unread import is_filled
from align.data.values import kind_of

_MARKS = {
    "Human": ("Human", "eoh"), "Inner Thoughts": ("Inner Thoughts", "eot"), "Commands": ("Commands", "eoc"),
    "Tool Responses": ("Results", "eor"), "MOSS": ("MOSS", "eom"),
}  # fmt: skip
"""Of a turn's texts: the marks that stand around each."""
_MARKED = {
    key: re.compile(rf"\s*(?:<\|{begin}\|>:)?(.*?)(?:<{end}>)?\s*", re.S) for key, (begin, end) in _MARKS.items()
}
_CONTEXT = ("system", "context")
_TURN = re.compile(r"turn_(\d+)")


def _plain(turn: Mapping[str, Any], key: str) -> str:
    """A text of a turn without its marks; "" where it is None."""
    value = turn.get(key)
    if value is not None and not isinstance(value, str):
        raise RowError(f"`{key}` of a turn must be text, got {value!r}")
    found = _MARKED[key].fullmatch(value or "")
    text = found[1].strip() if found else ""
    return "" if text == "None" and key not in ("Human", "MOSS") else text


def _turns(row: Row) -> tuple[Message, ...]:
    chat, turns = row["chat"], list[Message]()
    names = sorted((int(found[1]), name) for name in chat if (found := _TURN.fullmatch(name)))
    if [number for number, _ in names] != list(range(1, len(chat) + 1)):
        raise RowError(f"`chat` must hold turn_1, turn_2 and so on, got {', '.join(map(str, chat))}")
    for _, name in names:
        turn = chat[name]
        if not isinstance(turn, Mapping) or any(turn.get(key) is None for key in ("Human", "MOSS")):
            raise RowError(f"`chat.{name}` must be an object with what `Human` and `MOSS` say")
        left = _left(turn, name)
        if _plain(turn, "Commands"):
            raise RowError(f"`chat.{name}` calls tools in MOSS's own syntax, which no schema declares")
        if _plain(turn, "Tool Responses"):
            raise RowError(f"`chat.{name}` has `Tool Responses`, and calls no tool: the answer may depend on them")
        thoughts = _plain(turn, "Inner Thoughts")
        turns.append(Message("user", _plain(turn, "Human"), unread=left))
        turns.append(Message("assistant", _plain(turn, "MOSS"), {"reasoning_content": thoughts} if thoughts else {}))
    meta = row.get("meta_instruction")
    if meta is not None and not isinstance(meta, str):
        raise RowError(f"`meta_instruction` must be text, got {kind_of(meta)}")
    return with_system({"system": meta} if meta else {}, tuple(turns))


def _left(turn: Mapping[str, Any], name: str) -> tuple[str, ...]:
    """Keys of a turn that are not read, for the report. Raises RowError for those that would say how to read it."""
    left = [str(key) for key, value in turn.items() if key not in _MARKS and is_filled(value)]
    for key in left:
        if key in FLAGS or key.lower() in _CONTEXT:
            raise RowError(
                f"`chat.{name}` has `{key}`, which is no key of MOSS: write such rows as `messages`, where it is read"
            )
    return tuple(f"key {key!r} of a turn of `chat`" for key in left)


def _conversation(row: Row) -> Conversation:
    return Conversation((), _turns(row), tools_of(row), weight_of(row))


def _prompt(row: Row) -> Prompt:
    return prompt_from(_turns(row), (), tools_of(row))


def _fits(row: Row) -> bool:
    first = row["chat"].get("turn_1") if isinstance(row["chat"], Mapping) else None
    return isinstance(first, Mapping) and "Human" in first and "MOSS" in first


_NAME, _FORMATS, _REQUIRED, _OPTIONAL = "moss", ("moss",), frozenset({"chat"}), frozenset({"meta_instruction"})

LAYOUTS = (
    Layout(_NAME, _FORMATS, "conversation", _REQUIRED, _conversation, _OPTIONAL, fits=_fits, verbatim=True),
    Layout(_NAME, _FORMATS, "prompt", _REQUIRED, _prompt, _OPTIONAL, fits=_fits, verbatim=True),
)
