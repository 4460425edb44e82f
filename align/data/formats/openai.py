"""OpenAI messages: [{role, content, tool_calls?, weight?}], content as text or as parts. TRL's `messages` is the same.

Preference pairs of OpenAI's fine-tuning are {input: {messages, tools}, preferred_output, non_preferred_output}. A turn
that is not to be learnt (`weight: 0`, `loss: false`, ... see flags.py) stays in the context and out of the loss.
"""

from __future__ import annotations

from dataclasses import replace

from align.data.formats.base import Layout, Row, tools_of, weight_of
from align.data.formats.messages import are_messages, read_messages, with_system
from align.data.records import Conversation, Message, Pair, Prompt, RowError, prompt_from
from align.data.values import kind_of


def _layouts(column: str) -> tuple[Layout, ...]:
    def turns(row: Row) -> tuple[Message, ...]:
        return with_system(row, read_messages(row[column], column))

    def conversation(row: Row) -> Conversation:
        return Conversation((), turns(row), tools_of(row), weight_of(row))

    def prompt(row: Row) -> Prompt:
        return prompt_from(turns(row), (), tools_of(row))

    def fits(row: Row) -> bool:
        return are_messages(row[column])

    formats, required, optional = ("openai", "trl", "swift", "messages"), frozenset({column}), frozenset({"system"})
    return (
        Layout(f"openai {column}", formats, "conversation", required, conversation, optional, fits=fits),
        Layout(f"openai {column}", formats, "prompt", required, prompt, optional, fits=fits),
    )


def _preference(row: Row) -> Pair:
    given = row["input"]
    if not isinstance(given, dict):
        raise RowError(f"`input` must be an object with messages, got {kind_of(given)}")
    prompt = with_system(row, read_messages(given.get("messages"), "input.messages"))
    left = [f"key {k!r} of `input`" for k, v in given.items() if k not in ("messages", "tools") and v is not None]
    if prompt and left:
        prompt = (replace(prompt[0], unread=(*prompt[0].unread, *left)), *prompt[1:])
    chosen, rejected = (read_messages(row[side], side) for side in ("preferred_output", "non_preferred_output"))
    return Pair(prompt, chosen, rejected, tools_of(given) or tools_of(row), weight_of(row))


_PREFERENCE = frozenset({"input", "preferred_output", "non_preferred_output"})

LAYOUTS = (
    *_layouts("messages"),
    *_layouts("conversations"),
    *_layouts("conversation"),
    Layout("openai preference", ("openai",), "pair", _PREFERENCE, _preference, frozenset({"system"})),
)
