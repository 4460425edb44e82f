"""Messages of an episode as a chat template wants them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from align.data.tokenizer import ChatTokenizer
from align.errors import ModelError

Message = Mapping[str, Any]
MEDIA = ("image", "video", "audio")


def spoken(tokenizer: ChatTokenizer, messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages as OpenAI writes them, arguments of calls as objects or as JSON text, in the template's dialect.

    Raises ModelError where a call's arguments are no object: whoever made the message has not read it from a reply.
    """
    return [_spoken(tokenizer, message) for message in messages]


def _spoken(tokenizer: ChatTokenizer, message: Message) -> dict[str, Any]:
    out = {"content": "", **message}
    if out["content"] is None:
        out["content"] = ""
    if out.get("tool_calls"):
        out["tool_calls"] = [_call(call) for call in out["tool_calls"]]
    else:
        out.pop("tool_calls", None)
    out = tokenizer.dialect.spoken(out)
    if isinstance(out["content"], list | tuple):  # of a medium its kind: where it lies is nothing that is written
        out["content"] = [{"type": p["type"]} if p.get("type") in MEDIA else p for p in out["content"]]
    if tokenizer.needs_parts and isinstance(out["content"], str) and out["content"]:
        out["content"] = [{"type": "text", "text": out["content"]}]
    return out


def _call(call: Mapping[str, Any]) -> dict[str, Any]:
    function = call["function"]
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError:
            arguments = None
    if not isinstance(arguments, Mapping):
        raise ModelError(f"the arguments of a call of {function.get('name')!r} are no JSON object")
    return {"type": "function", **call, "function": {**function, "arguments": dict(arguments)}}


def users_joined(messages: Sequence[Message]) -> list[Message]:
    """Messages of which a user's that follows a user's is part of that turn, as templates want it that take turns."""
    out: list[Message] = []
    for message in messages:
        if out and out[-1]["role"] == message["role"] == "user":
            out[-1] = {**out[-1], "content": _joined(out[-1]["content"], message["content"])}
        else:
            out.append(message)
    return out


def _joined(first: Any, second: Any) -> Any:
    if isinstance(first, str) and isinstance(second, str):
        return f"{first}\n\n{second}"
    lists = [[{"type": "text", "text": part}] if isinstance(part, str) else list(part) for part in (first, second)]
    return [*lists[0], {"type": "text", "text": "\n\n"}, *lists[1]]


def text_of(content: Any) -> str:
    """The text of a message's content, whose other parts are left out."""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list | tuple) else ()
    return "".join(part.get("text", "") if isinstance(part, Mapping) else str(part) for part in parts)
