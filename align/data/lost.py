"""What a record says and its chat template leaves out: an error where it is what is learnt from, else a note.

A template renders what its author thought of: a role that it does not know, a call of a tool, thoughts, a `name` vanish
without a word. Whether something is rendered is found out by rendering it otherwise: a text that differs was read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from align.data.records import Message, RowError
from align.data.tokenizer import ChatTokenizer
from align.data.turns import Given, rendered

_OTHER = "\ue000other\ue000"  # private use: stands in no text
_THOUGHTS = "thoughts of an assistant turn (`reasoning_content`)"
_REMEDY = "name a template that does with `model.chat_template`, or leave it out of the row"


def left_out(
    tokenizer: ChatTokenizer, messages: tuple[Message, ...], given: Given, text: str, first: int = 0
) -> list[str]:
    """What `text`, the render of the messages, leaves out of them, one entry each time, for the report.

    first: messages before it were looked at already (pairs share their prompt). Raises RowError for a message or a
    tool call of which nothing is rendered.
    """
    template = tokenizer.require_template()
    found: list[str] = []
    if not first:
        if given.tools and "tools" not in template.variables_read:
            found.append("tool schemas (`tools`)")
        found += [f"template argument {k!r}" for k in given.arguments if k not in template.variables_read]
    look = _Look(tokenizer, messages, given, text)
    for i, message in enumerate(messages):
        if i >= first:
            found += _of_message(look, i, message)
    return found


class _Look:
    """One render, and whether another message in the place of one changes it."""

    def __init__(self, tokenizer: ChatTokenizer, messages: tuple[Message, ...], given: Given, text: str):
        self.tokenizer, self.messages, self.given, self.text = tokenizer, messages, given, text
        template = tokenizer.require_template()
        self.keys, self.source = template.keys_read, template.source

    def render(self, at: int, message: Message) -> str | None:
        """None where the template refuses it, which it can only where it reads it."""
        changed = (*self.messages[:at], message, *self.messages[at + 1 :])
        try:
            return rendered(self.tokenizer, changed, False, self.given).text
        except RowError:
            return None

    def differs(self, at: int, message: Message) -> bool:
        one = self.render(at, message)
        return one is None or one != self.render(at, self.messages[at])


def _of_message(look: _Look, i: int, message: Message) -> list[str]:
    found: list[str] = []
    calls = message.extra.get("tool_calls")
    if calls:
        _require_calls(look, i, message, calls)
    if message.text.strip() and _loses_text(look, i, message):
        if not calls:
            raise RowError(
                f"the chat template leaves out message {i}, of role {message.role!r}: {_short(message.text)}; {_REMEDY}"
            )
        found.append("text beside a tool call")
    thoughts = message.extra.get("reasoning_content")
    if thoughts and look.tokenizer.dialect.thoughts is None:
        found.append(_THOUGHTS)
    elif thoughts and thoughts.strip() not in look.text:
        other = replace(message, extra={**message.extra, "reasoning_content": _OTHER})
        found += [] if look.differs(i, other) else [_THOUGHTS]
    found += [f"message key {k!r}" for k in ("name", "tool_call_id") if k in message.extra and k not in look.keys]
    if message.role == "assistant" and "<tool_call>" in message.text and "<tool_call>" not in look.source:
        found.append("tool calls written as <tool_call> text, which stay text")
    return found


def _loses_text(look: _Look, i: int, message: Message) -> bool:
    """Whether nothing of a message's content is rendered. Content that stands in the text counts as rendered once a
    message of its role was seen to be: a short one may stand there by chance."""
    seen = look.tokenizer.roles_rendered
    if message.role in seen and message.text.strip() in look.text:
        return False
    if not look.differs(i, replace(message, content=_OTHER)):
        return True
    seen.add(message.role)
    return False


def _require_calls(look: _Look, i: int, message: Message, calls: Sequence[dict[str, object]]) -> None:
    """Raises RowError where one of a message's calls is not rendered."""
    names = [f"{_OTHER}{n}" for n in range(len(calls))]
    renamed = [{**c, "function": {**c["function"], "name": n}} for c, n in zip(calls, names, strict=True)]  # type: ignore[dict-item]
    text = look.render(i, replace(message, extra={**message.extra, "tool_calls": renamed}))
    if "tool_calls" in look.keys and (text is None or all(name in text for name in names)):
        return
    shown = calls[0]["function"]["name"]  # type: ignore[index]
    many = f"one of {len(calls)} tool calls" if len(calls) > 1 else "the tool call"
    raise RowError(f"the chat template leaves out {many} of message {i} ({shown}); {_REMEDY}")


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:37] + "...")
