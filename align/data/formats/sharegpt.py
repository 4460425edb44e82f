"""ShareGPT: `conversations` of {from, value}; with `chosen`/`rejected` (LLaMA-Factory) or `kto_tag` for preferences."""

from __future__ import annotations

from typing import Any

from align.data.formats.base import (
    Layout,
    Row,
    checked,
    content_of,
    is_list_of,
    label_of,
    optional_text,
    tools_of,
    weight_of,
)
from align.data.records import Conversation, Message, Pair, Prompt, RowError, Unpaired, assistant, prompt_from

_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "tool": "tool",
    "system": "system",
}
_OPTIONAL = frozenset({"system"})


def read_turns(value: Any, column: str) -> tuple[Message, ...]:
    """Messages of a from/value list. A function_call turn is the assistant's, its value as it stands."""
    if not isinstance(value, list):
        raise RowError(f"`{column}` must be a list of turns, got {type(value).__name__}")
    return checked([_turn(item, column) for item in value])


def _turn(item: Any, column: str) -> Message:
    if not isinstance(item, dict) or not isinstance(item.get("from"), str):
        raise RowError(f"a turn of `{column}` has no `from`: {str(item)[:60]}")
    role = _ROLES.get(item["from"].lower())
    if role is None:
        raise RowError(f"unknown speaker {item['from']!r} in `{column}` (known: {', '.join(sorted(_ROLES))})")
    return Message(role, content_of(item.get("value")), scored=item.get("weight") != 0)


def _answer(row: Row, column: str) -> tuple[Message, ...]:
    value = row.get(column)
    if isinstance(value, dict):
        return read_turns([value], column)
    return assistant(value) if isinstance(value, str) else read_turns(value, column)


def _layouts(column: str) -> tuple[Layout, ...]:
    def turns(row: Row) -> tuple[Message, ...]:
        system = optional_text(row, "system")
        head = (Message("system", system),) if system else ()
        return head + read_turns(row[column], column)

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


LAYOUTS = _layouts("conversations") + _layouts("messages")
