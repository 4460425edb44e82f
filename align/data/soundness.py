"""What a tokenised row must be to be trained on: looked at after the cut to max_length, where training sees it."""

from __future__ import annotations

from itertools import chain

import numpy as np

from align.data.encoded import Encoded, Tokens
from align.data.records import Kind, Record, RowError, texts
from align.data.tokenizer import ChatTokenizer

LONGEST_TEXT = 32 << 20  # characters of a row that are tokenised: more than any model's context
_LONG, _SPARE = 1 << 20, 4  # characters from which on they are counted first; what a normalizer may leave out
UNFORESEEN = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)
"""What Python raises at a value that nobody thought of. It ends a row, which is named, and not the run."""


def unforeseen(error: Exception) -> RowError:
    return RowError(f"a value in the row that nothing foresaw: {type(error).__name__}: {str(error)[:200]}")


def refuse_endless(record: Record, tokenizer: ChatTokenizer, most_tokens: int | None) -> None:
    """Raise RowError for a row whose text is longer than anything that a model reads, before it is rendered.

    most_tokens: more than those are refused (not cut) later; a text that cannot have so few is refused here.
    """
    length = 0
    for _, text in texts(record):
        length += len(text) if isinstance(text, str) else sum(len(m.text) for m in text)
    if length > LONGEST_TEXT:
        raise RowError(f"{length} characters of text; more than {LONGEST_TEXT} are not tokenised")
    if most_tokens is not None and length > _LONG:
        least = length // (_SPARE * tokenizer.longest_token)
        if least > most_tokens:
            raise RowError(f"{length} characters are at least {least} tokens, more than max_length {most_tokens}")


def too_long(encoded: Encoded, kind: Kind, max_length: int) -> RowError:
    """What is said of a row that is neither cut nor left out."""
    if kind == "prompt":
        what, ways = f"the prompt has {encoded.length} tokens", "`too_long: drop` leaves such prompts out"
    else:
        what, ways = f"{encoded.length} tokens", "`too_long: right` or `left` cuts, `drop` leaves such rows out"
        ways += ", `split` makes several of one" if kind == "conversation" else ""
    return RowError(f"{what}, more than max_length {max_length} ({ways})")


def refuse_unusable(encoded: Encoded, kind: Kind, tokenizer: ChatTokenizer, cut: bool, max_length: int | None) -> None:
    """Raise RowError for a row that its model or its loss cannot use, as it is after `cut` to `max_length`."""
    for part in chain([encoded.trunk], encoded.branches):
        if part.ids.size:
            _refuse_beyond(int(part.ids.max()), tokenizer)
    after = f" after the cut to max_length {max_length}" if cut else ""
    if kind in ("prompt", "labelled"):
        if not len(encoded.trunk):
            raise RowError("the prompt has no tokens" if kind == "prompt" else "the text has no tokens")
        return
    if kind == "pair" and _equal(*encoded.branches):
        raise RowError(f"chosen and rejected are the same{after or ', token by token'}")
    for name, part in zip(_names(kind), encoded.branches or [encoded.trunk], strict=True):
        if not part.mask.any():
            raise RowError(f"no token of {name} is scored{after}: there is nothing to learn from the row")


def _names(kind: Kind) -> tuple[str, ...]:
    return ("chosen", "rejected") if kind == "pair" else ("the completion",)


def _refuse_beyond(largest: int, tokenizer: ChatTokenizer) -> None:
    rows = tokenizer.embedding_rows
    if rows is not None and largest >= rows:
        raise RowError(
            f"token {largest}, {tokenizer.token(largest)}, is beyond the model's embedding of {rows} rows; the "
            f"tokenizer has {tokenizer.vocab_size} tokens (resize the model once, in transformers: "
            f"model.resize_token_embeddings({tokenizer.vocab_size}), or take the token out of the data)"
        )


def _equal(one: Tokens, other: Tokens) -> bool:
    """Whether two branches are the same to the model: ids, what of them is scored, and what they show."""
    return (
        np.array_equal(one.ids, other.ids)
        and np.array_equal(one.mask, other.mask)
        and [m.key for m in one.media] == [m.key for m in other.media]
    )
