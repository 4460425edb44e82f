"""What a chat template wants where templates disagree, found out by rendering.

Arguments of a tool call: most templates write `arguments | tojson` and need an object; some print them and need text
(an object would come out as Python writes it, or be refused). Some render calls only where the content is null.
Thoughts: each template reads its own name. `developer` turns: some templates know them, and others leave them out
without a word, where `system` says the same.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from align.data.records import RowError
from align.data.template import ChatTemplate

_THOUGHTS = ("reasoning_content", "reasoning", "thinking", "thought", "thoughts")
_NAME, _KEY = "probe_function", "probe_argument"


@dataclass(frozen=True)
class Dialect:
    """arguments_as_text: a call's arguments are JSON text. null_content: a turn that only calls has no content, rather
    than an empty one. thoughts: the key of an assistant turn that is rendered as its reasoning; None where there is
    none. developer: whether the role is rendered."""

    arguments_as_text: bool = False
    null_content: bool = False
    thoughts: str | None = "reasoning_content"
    developer: bool = True

    def spoken(self, message: dict[str, Any]) -> dict[str, Any]:
        """A message as the template wants it."""
        out = dict(message)
        if out["role"] == "developer" and not self.developer:
            out["role"] = "system"
        if self.thoughts not in (None, "reasoning_content") and "reasoning_content" in out:
            out[str(self.thoughts)] = out.pop("reasoning_content")
        if self.arguments_as_text and "tool_calls" in out:
            out["tool_calls"] = [_as_text(call) for call in out["tool_calls"]]
        if self.null_content and "tool_calls" in out and not out["content"]:
            out["content"] = None
        return out


def _as_text(call: Mapping[str, Any]) -> dict[str, Any]:
    function = call["function"]
    return {**call, "function": {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)}}


def find_dialect(template: ChatTemplate, render: Callable[..., str], parts: bool) -> Dialect:
    """The dialect of a template. render: messages to text. parts: contents must be lists of parts."""
    thoughts = next((name for name in _THOUGHTS if name in template.keys_read), None)
    as_text, null = _call_style(template, render, parts)
    return Dialect(as_text, null, thoughts, _knows_developer(render, parts))


def _content(text: str, parts: bool) -> Any:
    return [{"type": "text", "text": text}] if parts else text


def _call_style(template: ChatTemplate, render: Callable[..., str], parts: bool) -> tuple[bool, bool]:
    """(arguments_as_text, null_content) of the first way to write a call in which it is rendered as it should be."""
    if "tool_calls" not in template.keys_read:
        return False, False
    for arguments, as_text in (({_KEY: "x y"}, False), (json.dumps({_KEY: "x y"}), True)):
        call = {"type": "function", "id": "abcdefghi", "function": {"name": _NAME, "arguments": arguments}}
        for content in ("", None):
            messages = [
                {"role": "user", "content": _content("question", parts)},
                {"role": "assistant", "content": content, "tool_calls": [call]},
            ]
            try:
                text = render(messages)
            except RowError:
                continue
            if _NAME in text and _KEY in text and str({_KEY: "x y"}) not in text and '\\"' not in text:
                return as_text, content is None
    return False, False


def _knows_developer(render: Callable[..., str], parts: bool) -> bool:
    messages = [
        {"role": "developer", "content": _content("the-instruction", parts)},
        {"role": "user", "content": _content("question", parts)},
    ]
    try:
        return "the-instruction" in render(messages)
    except RowError:
        return False
