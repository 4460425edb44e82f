"""ShareGPT: `conversations` of {from, value}; with `chosen`/`rejected` (LLaMA-Factory) or `kto_tag` for preferences.

LLaMA-Factory's `function_call` and `observation` turns become calls and tools' answers (messages.py).
"""

from __future__ import annotations

from typing import Any

from align.data.formats.base import (
    Layout,
    Row,
    is_list_of,
    label_of,
    tools_of,
    weight_of,
)
from align.data.formats.messages import read_messages, with_system
from align.data.records import Conversation, Message, Pair, Prompt, RowError, Unpaired, assistant, prompt_from

_OPTIONAL = frozenset({"system"})


def _answer(row: Row, column: str) -> tuple[Message, ...]:
    value = row.get(column)
    if isinstance(value, dict):
        return read_messages([value], column)
    return assistant(value) if isinstance(value, str) else read_messages(value, column)


def _layouts(column: str) -> tuple[Layout, ...]:
    def turns(row: Row) -> tuple[Message, ...]:
        return with_system(row, read_messages(row[column], column))

    def conversation(row: Row) -> Conversation:
        return Conversation((), turns(row), tools_of(row), weight_of(row))

    def pair(row: Row) -> Pair:
        return Pair(turns(row), _answer(row, "chosen"), _answer(row, "rejected"), tools_of(row), weight_of(row))

    def unpaired(label: str) -> Any:
        def convert(row: Row) -> Unpaired:
            messages = turns(row)
            if not messages or messages[-1].role != "assistant":
                raise RowError("the last turn is not the assistant's: there is no completion to label")
            return Unpaired(messages[:-1], messages[-1:], label_of(row, label), tools_of(row), weight_of(row))

        return convert

    def prompt(row: Row) -> Prompt:
        return prompt_from(turns(row), (), tools_of(row))

    def fits(row: Row) -> bool:
        return is_list_of(row[column], "from")

    def layout(kind: Any, convert: Any, *more: str) -> Layout:
        return Layout(
            f"sharegpt {column}", ("sharegpt",), kind, frozenset({column, *more}), convert, _OPTIONAL, fits=fits
        )

    return (
        layout("conversation", conversation),
        layout("pair", pair, "chosen", "rejected"),
        layout("unpaired", unpaired("label"), "label"),
        layout("unpaired", unpaired("kto_tag"), "kto_tag"),
        layout("prompt", prompt),
    )


LAYOUTS = _layouts("conversations") + _layouts("messages") + _layouts("conversation")
