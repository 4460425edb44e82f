"""MOSS: `meta_instruction`, `chat: {turn_1: {Human, Inner Thoughts, Commands, Tool Responses, MOSS}, turn_2: ...}`.

Each text stands between MOSS's own marks (`<|Human|>: ...<eoh>`), which go; what is `None` in them is nothing. Inner
thoughts are the answer's thoughts. Commands are calls in a syntax of MOSS's own, whose tools no schema declares: such a
row is refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from align.data.formats.base import Layout, Row, tools_of, weight_of
from align.data.formats.messages import with_system
from align.data.records import Conversation, Message, Prompt, RowError, prompt_from

_MARKED = re.compile(r"\s*(?:<\|(?:Human|Inner Thoughts|Commands|Results|MOSS)\|>:)?(.*?)(?:<eo[a-z]>)?\s*", re.S)
_TURN = re.compile(r"turn_(\d+)")
_KEYS = frozenset({"Human", "Inner Thoughts", "Commands", "Tool Responses", "MOSS"})


def _plain(turn: Mapping[str, Any], key: str) -> str:
    """A text of a turn without its marks; "" where it is None."""
    value = turn.get(key)
    if value is not None and not isinstance(value, str):
        raise RowError(f"`{key}` of a turn must be text, got {value!r}")
    found = _MARKED.fullmatch(value or "")
    text = found[1].strip() if found else ""
    return "" if text == "None" and key not in ("Human", "MOSS") else text


def _turns(row: Row) -> tuple[Message, ...]:
    chat, turns = row["chat"], list[Message]()
    names = sorted((int(found[1]), name) for name in chat if (found := _TURN.fullmatch(name)))
    if [number for number, _ in names] != list(range(1, len(chat) + 1)):
        raise RowError(f"`chat` must hold turn_1, turn_2 and so on, got {', '.join(map(str, chat))}")
    for _, name in names:
        turn = chat[name]
        if not isinstance(turn, Mapping):
            raise RowError(f"`chat.{name}` must be an object")
        if _plain(turn, "Commands") or _plain(turn, "Tool Responses"):
            raise RowError(f"`chat.{name}` calls tools in MOSS's own syntax, which no schema declares")
        strange = sorted(turn.keys() - _KEYS)
        if strange:
            raise RowError(f"`chat.{name}` has {strange[0]!r}, which MOSS's turns do not have, and which nothing reads")
        if not isinstance(turn.get("Human"), str) or not isinstance(turn.get("MOSS"), str):
            raise RowError(f"`chat.{name}` needs the texts `Human` and `MOSS`")
        thoughts = _plain(turn, "Inner Thoughts")
        turns.append(Message("user", _plain(turn, "Human")))
        turns.append(Message("assistant", _plain(turn, "MOSS"), {"reasoning_content": thoughts} if thoughts else {}))
    meta = row.get("meta_instruction")
    return with_system({"system": meta} if isinstance(meta, str) else {}, tuple(turns))


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
