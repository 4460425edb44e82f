"""Tools for templates that know none (`tools_in: prompt`): schemas in the system message, calls and answers as text,
in the form that Hermes models are taught."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from align.episodes.spoken import MEDIA, Message, text_of

_ABOVE = """# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
"""
_BELOW = """
</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{"name": <function-name>, "arguments": <args-json-object>}
</tool_call>"""


def as_text(messages: Sequence[Message], schemas: Sequence[Mapping[str, Any]], system: bool) -> list[dict[str, Any]]:
    """Messages in which tools, calls and answers are text.

    Args:
        messages: as OpenAI writes them.
        schemas: of the tools; without any, no instructions are written.
        system: whether the template renders a system message; else instructions begin the first user's.
    """
    out: list[dict[str, Any]] = []
    answers = False  # whether the last message is of answers
    for message in messages:
        role = message["role"]
        if role == "tool":
            told = _around("<tool_response>\n", message.get("content"), "\n</tool_response>")
            if answers:
                out[-1] = _behind(out[-1], told, "\n")
            else:
                out.append({"role": "user", "content": told})
            answers = True
        elif role == "user" and answers:  # templates that know no tools want turns that alternate
            out[-1] = _behind(out[-1], _around("", message.get("content"), ""), "\n\n")
            answers = False
        else:
            out.append(_calls_as_text(message) if message.get("tool_calls") else dict(message))
            answers = False
    return _instructed(out, schemas, system) if schemas else out


def _around(before: str, content: Any, behind: str) -> str | list[Any]:
    """A content between two texts: text, or parts where it has media."""
    if isinstance(content, list | tuple) and any(part.get("type") in MEDIA for part in content):
        return [*_parts(before), *content, *_parts(behind)]
    return f"{before}{text_of(content)}{behind}"


def _parts(content: str | list[Any]) -> list[Any]:
    if isinstance(content, list):
        return content
    return [{"type": "text", "text": content}] if content else []


def _behind(message: dict[str, Any], told: str | list[Any], between: str) -> dict[str, Any]:
    said = message["content"]
    if isinstance(said, str) and isinstance(told, str):
        return {**message, "content": f"{said}{between}{told}"}
    return {**message, "content": [*_parts(said), *_parts(between), *_parts(told)]}


def _calls_as_text(message: Message) -> dict[str, Any]:
    parts = [text] if (text := text_of(message.get("content"))) else []
    for call in message["tool_calls"]:
        function = call["function"]
        arguments = function.get("arguments") or {}
        arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
        said = json.dumps({"name": function["name"], "arguments": arguments}, ensure_ascii=False)
        parts.append(f"<tool_call>\n{said}\n</tool_call>")
    return {**{k: v for k, v in message.items() if k != "tool_calls"}, "content": "\n".join(parts)}


def _instructed(
    messages: list[dict[str, Any]], schemas: Sequence[Mapping[str, Any]], system: bool
) -> list[dict[str, Any]]:
    text = _ABOVE + "\n".join(json.dumps(schema, ensure_ascii=False) for schema in schemas) + _BELOW
    roles = ("system", "developer") if system else ("user",)
    at = next((n for n, message in enumerate(messages) if message["role"] in roles), None)
    if at is None:
        return [{"role": "system" if system else "user", "content": text}, *messages]
    content = messages[at].get("content") or ""
    if isinstance(content, str):
        content = f"{content}\n\n{text}" if system and content else text if system else f"{text}\n\n{content}"
    else:
        part = {"type": "text", "text": f"\n\n{text}" if system else f"{text}\n\n"}
        content = [*content, part] if system else [part, *content]
    return [*messages[:at], {**messages[at], "content": content}, *messages[at + 1 :]]
