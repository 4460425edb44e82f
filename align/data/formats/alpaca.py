"""Alpaca: `instruction`, `input`, `output`, `history`, `system`; `chosen`/`rejected` or `kto_tag` for preferences.

As in LLaMA-Factory: the user's turn is the instruction and, where there is one, the input on the next line; `history`
is a list of [question, answer] that comes before it, whose answers are scored like every assistant turn.
"""

from __future__ import annotations

from collections.abc import Callable

from align.data.formats.base import Layout, Row, label_of, optional_text, text_of, tools_of, weight_of
from align.data.records import (
    Conversation,
    Kind,
    Message,
    Pair,
    Prompt,
    Record,
    RowError,
    Unpaired,
    assistant,
    prompt_from,
)

_OPTIONAL = frozenset({"input", "history", "system"})


def read_prompt(row: Row) -> tuple[Message, ...]:
    messages: list[Message] = []
    if system := optional_text(row, "system"):
        messages.append(Message("system", system))
    history = row.get("history") or ()
    for item in history if isinstance(history, list | tuple) else [history]:
        if not isinstance(item, list | tuple) or len(item) != 2 or not all(isinstance(x, str) for x in item):
            raise RowError("`history` must be a list of [question, answer]")
        messages += [Message("user", item[0]), Message("assistant", item[1])]
    question = "\n".join(part for part in (text_of(row, "instruction"), optional_text(row, "input")) if part)
    return (*messages, Message("user", question))


def _conversation(row: Row) -> Conversation:
    return Conversation((), read_prompt(row) + assistant(text_of(row, "output")), tools_of(row), weight_of(row))


def _pair(row: Row) -> Pair:
    chosen, rejected = assistant(text_of(row, "chosen")), assistant(text_of(row, "rejected"))
    return Pair(read_prompt(row), chosen, rejected, tools_of(row), weight_of(row))


def _unpaired(label: str) -> Callable[[Row], Unpaired]:
    def convert(row: Row) -> Unpaired:
        answer = assistant(text_of(row, "output"))
        return Unpaired(read_prompt(row), answer, label_of(row, label), tools_of(row), weight_of(row))

    return convert


def _prompt(row: Row) -> Prompt:
    return prompt_from(read_prompt(row), optional_text(row, "output"), tools_of(row))


def _layout(kind: Kind, convert: Callable[[Row], Record], *more: str) -> Layout:
    required = frozenset({"instruction", *more})
    return Layout("alpaca", ("alpaca",), kind, required, convert, (_OPTIONAL | {"output"}) - required)


LAYOUTS = (
    _layout("conversation", _conversation, "output"),
    _layout("pair", _pair, "chosen", "rejected"),
    _layout("unpaired", _unpaired("label"), "output", "label"),
    _layout("unpaired", _unpaired("kto_tag"), "output", "kto_tag"),
    _layout("prompt", _prompt),
)
