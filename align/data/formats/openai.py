"""OpenAI messages: [{role, content, tool_calls?, weight?}], content as text or as parts. TRL's `messages` is the same.

A turn that is not to be learnt (`weight: 0`, `loss: false`, ... see flags.py) stays in the context and out of the loss.
"""

from __future__ import annotations

from align.data.formats.base import Layout, Row, tools_of, weight_of
from align.data.formats.messages import are_messages, read_messages, with_system
from align.data.records import Conversation, Message, Prompt, prompt_from


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


LAYOUTS = _layouts("messages") + _layouts("conversations") + _layouts("conversation")
