"""What a chat template wants where templates disagree, found out by rendering.

Arguments of a tool call: most templates write `arguments | tojson` and need an object; some print them and need text
(an object would come out as Python writes it, or be refused). Thoughts: each template reads its own name. `developer`
turns: some templates know them, and others leave them out without a word, where `system` says the same.
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
    """arguments_as_text: a call's arguments are JSON text. thoughts: the key of an assistant turn that is rendered as
    its reasoning; None where there is none. developer: whether the role is rendered."""

    arguments_as_text: bool = False
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
        return out


def _as_text(call: Mapping[str, Any]) -> dict[str, Any]:
    function = call["function"]
    return {**call, "function": {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)}}


def find_dialect(template: ChatTemplate, render: Callable[..., str], parts: bool) -> Dialect:
    """The dialect of a template. render: messages to text. parts: contents must be lists of parts."""
    thoughts = next((name for name in _THOUGHTS if name in template.keys_read), None)
    return Dialect(_wants_text(template, render, parts), thoughts, _knows_developer(render, parts))


def _content(text: str, parts: bool) -> Any:
    return [{"type": "text", "text": text}] if parts else text


def _wants_text(template: ChatTemplate, render: Callable[..., str], parts: bool) -> bool:
    """Whether a call is rendered rightly with its arguments as text, and not as an object."""
    if "tool_calls" not in template.keys_read:
        return False
    for arguments, answer in (({_KEY: "x y"}, False), (json.dumps({_KEY: "x y"}), True)):
        call = {"type": "function", "id": "abcdefghi", "function": {"name": _NAME, "arguments": arguments}}
        for content in (_content("", parts), None):
            messages = [
                {"role": "user", "content": _content("question", parts)},
                {"role": "assistant", "content": content, "tool_calls": [call]},
            ]
            try:
                text = render(messages)
            except RowError:
                continue
            if _NAME in text and _KEY in text and str({_KEY: "x y"}) not in text and '\\"' not in text:
                return answer
    return False


def _knows_developer(render: Callable[..., str], parts: bool) -> bool:
    messages = [
        {"role": "developer", "content": _content("the-instruction", parts)},
        {"role": "user", "content": _content("question", parts)},
    ]
    try:
        return "the-instruction" in render(messages)
    except RowError:
        return False
