"""What a row says that is hardly meant as it is written: it is trained as it stands, counted and named.

A tokenizer reads `<|im_end|>` in what a user says as the same token that ends the turn, here as in servers: the rest of
the message stands outside of it, and in an answer the end is learned in the middle. And a completion in plain text that
begins with its whole prompt follows it: the model sees and learns the prompt a second time.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from align.data.formats.base import is_number
from align.data.formats.needed import ANSWERED
from align.data.formats.tools import calls_of
from align.data.records import Record, RowError, messages_of, texts
from align.data.tokenizer import ChatTokenizer

_TURNS = tuple({"role": role, "content": "x"} for role in ("user", "assistant", "user"))
_PRINTED = re.compile(r"\s*\[\s*\{'(role|from|content|value)': ['\"]")
_SHORTEST = 16  # characters of a prompt that no completion repeats by chance


_FOREIGN = (
    "<|im_start|>", "<|start_header_id|>", "<start_of_turn>", "<|start_of_role|>", "<extra_id_1>", "[INST]",
    "<|user|>",
    "<|assistant|>", "<\uff5cUser\uff5c>", "### Instruction:", "\n\nHuman:",
)  # fmt: skip


def doubts(record: Record, tokenizer: ChatTokenizer, written: Iterable[str] = ()) -> list[str]:
    """A sentence for each doubt, as often as the record gives cause for it. written: columns that hold messages as JSON
    text."""
    if isinstance(record.prompt, str):
        return [*_repeats(record, record.prompt), *_printed(record)]
    tokens = framing_tokens(tokenizer)
    found = [f"`{name}` holds messages as JSON text, and is read as messages" for name in sorted(written)]
    for message in messages_of(record):
        if _PRINTED.match(message.text):
            found.append("a message is a list of messages as Python prints it, and is taken for the text that it is")
        found += [
            f"texts of messages hold {token!r}, which the tokenizer reads as the token that frames turns: a turn ends "
            "or begins there"
            for token in tokens
            if token in message.text
        ]
        found += [
            f"texts of messages hold {mark!r}, with which another chat template frames turns: it stays text here"
            for mark in _FOREIGN
            if mark in message.text and mark not in tokens
        ]
    return [*found, *_glued(record)]


def refuse_written_calls(record: Record) -> None:
    """Raises RowError for an answer that is a call of one of the record's tools as JSON text: it would be learnt as
    such a text, whatever the template writes for a call."""
    names = {str(tool.get("function", {}).get("name")) for tool in record.tools}
    for message in messages_of(record):
        if names and message.role == "assistant" and message.text.lstrip()[:1] in ("[", "{"):
            try:
                calls, _ = calls_of(message.text)
            except RowError:
                continue
            if calls and all(call["function"]["name"] in names for call in calls):
                raise RowError(
                    "the answer is a call of a tool as JSON text, and would be learnt as that text: name its column "
                    "`answers` (as xLAM does), or write it as `tool_calls` of a message"
                )


def numbers(row: Mapping[str, Any], read: Iterable[str]) -> list[str]:
    """A sentence for each answer that is a number. read: the row's columns that its layout read."""
    found = (name for name in ANSWERED if name in read and is_number(row.get(name)))
    return [f"`{name}` is a number, and its digits are the text of the answer" for name in found]


def _glued(record: Record) -> list[str]:
    """An answer that goes on with the prompt's last turn in the middle of a word: perhaps it is a turn of its own."""
    if isinstance(record.prompt, str) or not record.prompt or record.prompt[-1].role != "assistant":
        return []
    begun = record.prompt[-1].text
    answers = [text[0].text for name, text in texts(record) if name != "prompt" and text and not isinstance(text, str)]
    if not any(begun[-1:].isalnum() and answer[:1].isalnum() for answer in answers):
        return []
    return ["the prompt ends with a turn of the assistant, and the answer goes on with it without a space between"]


def _repeats(record: Record, prompt: str) -> list[str]:
    """Text without a template may hold what tokens it likes, it was written by one; but each text only once."""
    if len(prompt.strip()) < _SHORTEST:
        return []
    return [
        f"the {name} begins with the whole prompt, which stands before it already"
        for name, text in texts(record)
        if name != "prompt" and isinstance(text, str) and text.lstrip().startswith(prompt.strip())
    ]


def _printed(record: Record) -> list[str]:
    """Lists of messages as Python prints them, which is no JSON: pandas writes them so into a CSV."""
    return [
        f"the {name} is a list of messages as Python prints it, and is taken for the plain text that it is"
        for name, text in texts(record)
        if isinstance(text, str) and _PRINTED.match(text)
    ]


def framing_tokens(tokenizer: ChatTokenizer) -> tuple[str, ...]:
    """Added tokens that end a generation or begin a text, and special ones that stand around a conversation's turns."""
    if tokenizer.framing is None:
        tokenizer.framing = _framing_tokens(tokenizer)
    return tokenizer.framing


def _framing_tokens(tokenizer: ChatTokenizer) -> tuple[str, ...]:
    try:
        parts = [{**m, "content": [{"type": "text", "text": "x"}]} for m in _TURNS] if tokenizer.needs_parts else _TURNS
        written = tokenizer.render(parts)
    except RowError:  # a template with rules of its own for what is said to it
        written = ""
    ends = {tokenizer.decode([i], skip_special_tokens=False) for i in tokenizer.eos_ids}
    ends |= {tokenizer.named_tokens.get("bos_token", "")}
    framing = {token for token in tokenizer.special if token in written} | (ends & tokenizer.added)
    return tuple(sorted(framing - {""}))
