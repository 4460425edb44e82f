"""Tokens of the chat template's own in the words of a row.

A tokenizer reads `<|im_end|>` in what a user says as the same token that ends the turn, here as in servers: the rest of
the message stands outside of it, and in an answer the end is learned in the middle. Some data sets are meant so (a
conversation that was rendered by hand), most are not; it is counted and named.
"""

from __future__ import annotations

from align.data.records import Record, RowError, messages_of
from align.data.tokenizer import ChatTokenizer

_TURNS = tuple({"role": role, "content": "x"} for role in ("user", "assistant", "user"))


def framed(record: Record, tokenizer: ChatTokenizer) -> list[str]:
    """The template's framing tokens that a record's messages hold, one entry for each message. Text without a template
    may hold what it likes: it was written by one."""
    if isinstance(record.prompt, str) or not (tokens := framing_tokens(tokenizer)):
        return []
    return [token for message in messages_of(record) for token in tokens if token in message.text]


def framing_tokens(tokenizer: ChatTokenizer) -> tuple[str, ...]:
    """Special tokens that end a generation, begin a text, or stand around the turns of a conversation."""
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
    return tuple(sorted(token for token in tokenizer.special if token and (token in written or token in ends)))
