"""What ends a turn, and the text of one without its end: the same for all engines."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


def end_ids(folder: Path, tokenizer_eos: int | None, template: Sequence[int] = ()) -> frozenset[int]:
    """Token ids that end a turn: the tokenizer's, those of generation_config.json (else config.json), and those that a
    chat template ends turns with."""
    found = {*template, *(() if tokenizer_eos is None else (tokenizer_eos,))}
    for name in ("generation_config.json", "config.json"):
        file = folder / name
        config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        ids = config.get("eos_token_id", config.get("text_config", {}).get("eos_token_id"))
        if ids is not None:
            return frozenset(found.union(ids if isinstance(ids, list) else [ids]))
    return frozenset(found)


def texts_of(
    token_ids: Sequence[int], ends: frozenset[int], decode: Callable[[list[int], bool], str]
) -> tuple[str, str | None]:
    """(text, raw) of a `Completion`. ends: ids that end a turn, which belong to neither; decode: ids to text, with or
    without special tokens (True: without)."""
    last = len(token_ids)
    while last and token_ids[last - 1] in ends:
        last -= 1
    spoken = list(token_ids[:last])
    text, raw = decode(spoken, True), decode(spoken, False)
    return text, None if raw == text else raw


def special_tokens(tokenizer: Any) -> frozenset[str]:
    """The texts that a tokenizer of transformers leaves out where it skips special tokens."""
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return frozenset(text for text in added.union(tokenizer.all_special_tokens) if text)
