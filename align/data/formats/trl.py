"""TRL's layouts, standard (text) and conversational (messages); `messages` alone is in openai.py.

    sft          prompt, completion | text
    preference   prompt, chosen, rejected | chosen, rejected (the prompt is their common beginning, in whole words)
    unpaired     prompt, completion, label
    online       prompt [completion]

Text is used as it stands: no chat template, prompt tokens + completion tokens + EOS, as in TRL. A `system` column
makes a text prompt conversational (system turn, user turn), and so does a prompt or completion given as messages.
"""

from __future__ import annotations

from dataclasses import replace

from align.data.formats.base import Layout, Row, label_of, optional_text, text_of, tools_of, weight_of
from align.data.formats.messages import read_messages, with_system
from align.data.records import (
    Conversation,
    Message,
    Pair,
    Prompt,
    RowError,
    Text,
    Unpaired,
    context_differs,
    prompt_from,
)


def _text(row: Row, column: str) -> Text:
    value = row.get(column)
    if isinstance(value, dict):
        return read_messages([value], column)
    return read_messages(value, column) if isinstance(value, list) else text_of(row, column)


def _prompt_text(row: Row) -> Text:
    prompt = _text(row, "prompt")
    return with_system(row, _messages(prompt, "user")) if optional_text(row, "system") else prompt


def _messages(text: Text, role: str) -> tuple[Message, ...]:
    return (Message(role, text),) if isinstance(text, str) else text


def _joined(prompt: Text, *completions: Text) -> tuple[Text, ...]:
    """All as text where all are text, else all as messages."""
    if all(isinstance(x, str) for x in (prompt, *completions)):
        return (prompt, *completions)
    return (_messages(prompt, "user"), *(_messages(c, "assistant") for c in completions))


def _without_prompt(prompt: Text, completion: Text) -> Text:
    """Some data sets repeat the prompt at the head of each completion (UltraFeedback's chosen and rejected), with or
    without the system turn."""
    if isinstance(prompt, str) or isinstance(completion, str):
        return completion
    asked = [(m.role, m.content) for m in prompt]
    for repeated in (asked, asked[1:] if asked and asked[0][0] == "system" else []):
        n = len(repeated)
        if 0 < n < len(completion) and [(m.role, m.content) for m in completion[:n]] == repeated:
            return completion[n:]
    return completion


def _conversation(row: Row) -> Conversation:
    prompt, completion = _joined(_prompt_text(row), _text(row, "completion"))
    return Conversation(prompt, _without_prompt(prompt, completion), tools_of(row), weight_of(row))


def _language(row: Row) -> Conversation:
    return Conversation("", text_of(row, "text"), (), weight_of(row))


def _pair(row: Row) -> Pair:
    if (whole := _whole_conversations(row)) is not None:
        return whole
    prompt, chosen, rejected = _joined(_prompt_text(row), _text(row, "chosen"), _text(row, "rejected"))
    chosen, rejected = _without_prompt(prompt, chosen), _without_prompt(prompt, rejected)
    return Pair(prompt, chosen, rejected, tools_of(row), weight_of(row))


def _whole_conversations(row: Row) -> Pair | None:
    """A pair whose sides are whole conversations of several turns, beside a `prompt` with their questions once more, as
    text (Argilla's of Capybara); None of others."""
    said, sides = row["prompt"], (row["chosen"], row["rejected"])
    if not isinstance(said, str) or not all(isinstance(side, list) and len(side) > 2 for side in sides):
        return None
    first, second = (read_messages(row[side], side) for side in ("chosen", "rejected"))
    if "assistant" in (first[0].role, second[0].role) or first[0] != second[0]:
        return None
    prompt, chosen, rejected = split_common(first, second)
    asked = [turn.text.strip() for turn in prompt if turn.role == "user"]
    if len(asked) < 2 or not any(one and one in said for one in asked):
        return None
    repeated = "`prompt`, whose questions chosen and rejected begin with,"
    prompt = (replace(prompt[0], unread=(*prompt[0].unread, repeated)), *prompt[1:])
    return Pair(with_system(row, prompt), chosen, rejected, tools_of(row), weight_of(row))


def _implicit_pair(row: Row) -> Pair:
    chosen, rejected = _text(row, "chosen"), _text(row, "rejected")
    if isinstance(chosen, str) and isinstance(rejected, str):  # where they part is a question of tokens
        head: Text = with_system(row, ()) if optional_text(row, "system") else ""
        return Pair(head, chosen, rejected, tools_of(row), weight_of(row), implicit=True)
    prompt, chosen, rejected = split_common(chosen, rejected)
    return Pair(with_system(row, prompt), chosen, rejected, tools_of(row), weight_of(row))


def split_common(chosen: Text, rejected: Text) -> tuple[tuple[Message, ...], tuple[Message, ...], tuple[Message, ...]]:
    """(prompt, chosen, rejected) of two message lists that begin alike. Raises RowError."""
    if isinstance(chosen, str) or isinstance(rejected, str):
        raise RowError("one of chosen and rejected is text, the other messages")
    if chosen == rejected:
        raise RowError("chosen and rejected are the same")
    n = 0
    while n < min(len(chosen), len(rejected)) and chosen[n] == rejected[n]:
        n += 1
    if n == 0 and not context_differs(Pair((), chosen, rejected)):
        raise RowError("there is no `prompt`, and chosen and rejected do not begin with the same message")
    return chosen[:n], chosen[n:], rejected[n:]


def _unpaired(row: Row) -> Unpaired:
    prompt, completion = _joined(_prompt_text(row), _text(row, "completion"))
    completion = _without_prompt(prompt, completion)
    return Unpaired(prompt, completion, label_of(row), tools_of(row), weight_of(row))


def _prompt(row: Row) -> Prompt:
    completion: Text = _text(row, "completion") if row.get("completion") is not None else ""
    prompt = _prompt_text(row)
    if isinstance(prompt, str) and not isinstance(completion, str):
        prompt = _messages(prompt, "user")
    return prompt_from(prompt, _without_prompt(prompt, completion), tools_of(row))


_SYSTEM = frozenset({"system"})

LAYOUTS = (
    Layout("trl", ("trl",), "conversation", frozenset({"prompt", "completion"}), _conversation, _SYSTEM),
    Layout("trl text", ("trl", "text"), "conversation", frozenset({"text"}), _language, gives_way=True),
    Layout("trl", ("trl",), "pair", frozenset({"prompt", "chosen", "rejected"}), _pair, _SYSTEM),
    Layout("trl implicit prompt", ("trl",), "pair", frozenset({"chosen", "rejected"}), _implicit_pair, _SYSTEM),
    Layout("trl", ("trl",), "unpaired", frozenset({"prompt", "completion", "label"}), _unpaired, _SYSTEM),
    Layout("trl", ("trl",), "prompt", frozenset({"prompt"}), _prompt, _SYSTEM | {"completion"}),
)
