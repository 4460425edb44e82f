"""Tools, conversations and tokenizers for the tests of this room."""

from __future__ import annotations

from typing import Any

from align.data.tokenizer import ChatTokenizer


def schema(name: str, **types: str) -> dict[str, Any]:
    """A tool's schema, with its parameters' types by name."""
    properties = {key: {"type": kind, "description": f"the {key}"} for key, kind in types.items()}
    parameters = {"type": "object", "properties": properties, "required": list(types)}
    return {"type": "function", "function": {"name": name, "description": f"To {name}.", "parameters": parameters}}


FIND = schema("find", query="string", limit="integer")
SCHEMAS = [FIND, schema("forget", names="array", sure="boolean", share="number", extra="object")]
ASKED = {"role": "user", "content": "Where are my keys?"}


def call(name: str, at: int, **arguments: Any) -> dict[str, Any]:
    """A call as OpenAI writes it, with the id that the conversation's call `at` has."""
    return {"type": "function", "id": f"call{at:05d}", "function": {"name": name, "arguments": arguments}}


def calling(*calls: dict[str, Any], content: str = "") -> dict[str, Any]:
    return {"role": "assistant", "content": content, "tool_calls": list(calls)}


def answer(content: str, at: int = 0, name: str = "find") -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": f"call{at:05d}", "name": name, "content": content}


def shown(tokenizer: ChatTokenizer, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False)
