"""OpenAI messages: [{role, content, tool_calls?, weight?}], content as text or as parts. TRL's `messages` is the same.

A message's `weight: 0` keeps an assistant turn in the context and out of the loss.
"""

from __future__ import annotations

import json
from typing import Any

from align.data.formats.base import (
    Layout,
    Row,
    checked,
    content_of,
    is_list_of,
    tools_of,
    weight_of,
    without_nulls,
)
from align.data.records import Conversation, Message, Prompt, RowError, prompt_from

_ROLE_WORDS = {"human": "user", "gpt": "assistant", "model": "assistant", "bot": "assistant"}
_EXTRA = ("tool_calls", "tool_call_id", "name", "reasoning_content", "thinking", "function_call")


def read_messages(value: Any, column: str = "messages") -> tuple[Message, ...]:
    """Messages of a role/content list. Raises RowError."""
    if not isinstance(value, list):
        raise RowError(f"`{column}` must be a list of messages, got {type(value).__name__}")
    return checked([_message(item, column) for item in value])


def _message(item: Any, column: str) -> Message:
    if not isinstance(item, dict) or not isinstance(item.get("role"), str):
        raise RowError(f"a message of `{column}` has no role: {str(item)[:60]}")
    weight = item.get("weight")
    if weight is not None and weight not in (0, 1):
        raise RowError(f"a message's weight must be 0 or 1, got {weight!r}")
    extra = {name: without_nulls(item[name]) for name in _EXTRA if item.get(name)}
    if not isinstance(extra.get("tool_calls", []), list):
        raise RowError(f"`tool_calls` must be a list, got {str(extra['tool_calls'])[:60]}")
    if "tool_calls" in extra:
        extra["tool_calls"] = [_tool_call(call) for call in extra["tool_calls"]]
    role = str(_ROLE_WORDS.get(item["role"], item["role"]))
    return Message(role, content_of(item.get("content")), extra, scored=weight != 0)


def _tool_call(call: Any) -> Any:
    """Arguments as an object: OpenAI writes them as a JSON string, templates read a mapping."""
    function = call.get("function") if isinstance(call, dict) else None
    if isinstance(function, dict) and isinstance(function.get("arguments"), str):
        try:
            arguments = json.loads(function["arguments"])
        except json.JSONDecodeError as e:
            raise RowError(f"a tool call's arguments are not valid JSON: {e.msg}") from e
        return {**call, "function": {**function, "arguments": arguments}}
    return call


def _layouts(column: str) -> tuple[Layout, ...]:
    def conversation(row: Row) -> Conversation:
        return Conversation((), read_messages(row[column], column), tools_of(row), weight_of(row))

    def prompt(row: Row) -> Prompt:
        return prompt_from(read_messages(row[column], column), (), tools_of(row))

    def fits(row: Row) -> bool:
        return is_list_of(row[column], "role")

    formats, required = ("openai", "trl", "swift", "messages"), frozenset({column})
    return (
        Layout(f"openai {column}", formats, "conversation", required, conversation, fits=fits),
        Layout(f"openai {column}", formats, "prompt", required, prompt, fits=fits),
    )


LAYOUTS = _layouts("messages") + _layouts("conversations") + _layouts("conversation")
