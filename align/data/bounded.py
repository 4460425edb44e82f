"""Bounds of a tokenizer: what memory many or long texts may take, and which ids a model's embedding has."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

AT_ONCE = 1 << 19  # characters in the backend at a time, which takes about 200 bytes for each
_AROUND, _CUTS_TRIED = 400, 50  # characters around a cut of a long text that are encoded with it and without
_BETWEEN_WORDS = re.compile(r"(?<=[A-Za-z]) (?=[A-Za-z])")

Encode = Callable[[Sequence[str]], list[list[int]]]


def encode_bounded(texts: Sequence[str], encode: Encode) -> list[list[int]]:
    """Ids of many texts, `AT_ONCE` characters at a time; a text of more in pieces, where that gives the same ids."""
    out: list[list[int]] = []
    waiting: list[str] = []
    room = AT_ONCE
    for text in texts:
        if len(text) > room:
            out += encode(waiting)
            waiting, room = [], AT_ONCE
        if len(text) > AT_ONCE:
            out.append([i for piece in _pieces(text, encode) for i in encode([piece])[0]])
            continue
        waiting.append(text)
        room -= len(text)
    return out + encode(waiting)


def _pieces(text: str, encode: Encode) -> Iterator[str]:
    """A long text, cut before words where the text around gives the same tokens cut and whole; else whole."""
    start = 0
    while len(text) - start > AT_ONCE:
        middle = start + AT_ONCE // 2
        places = (
            found.start() for found in islice(_BETWEEN_WORDS.finditer(text, middle, start + AT_ONCE), _CUTS_TRIED)
        )
        cut = next((at for at in places if _parts_at(text, at, encode)), None)
        if cut is None:
            break
        yield text[start:cut]
        start = cut
    yield text[start:]


def _parts_at(text: str, at: int, encode: Encode) -> bool:
    left, right = text[max(0, at - _AROUND) : at], text[at : at + _AROUND]
    one, other, both = encode([left, right, left + right])
    return one + other == both


def embedding_rows(config: Mapping[str, Any]) -> int | None:
    """How many tokens a model's embedding has, by its config.json; None where that does not say."""
    text = config.get("text_config") or config.get("llm_config") or config
    text = text if isinstance(text, dict) else config
    rows = text.get("vocab_size") or config.get("vocab_size")
    if isinstance(rows, bool) or not isinstance(rows, int):
        return None
    more = text.get("additional_vocab_size")  # Idefics keeps what was added in a second embedding
    more = _MORE_ROWS.get(str(text.get("model_type")), 0) if more is None else more
    return rows + int(more)


_MORE_ROWS = {"mllama_text_model": 8}  # transformers: MllamaTextModel, Embedding(vocab_size + 8)
