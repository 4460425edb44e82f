"""The prompt of a text pair without one: what chosen and rejected have in common at their beginning.

The cut lies between two tokens of both sides, where all tokens before it are the same, and inside no word: what follows
could then have been sampled after what stands before. Two texts that begin alike character by character may part inside
a word (`undoubtedly`, `under`), inside a token, or inside a special token's text.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

from align.data.records import Message, Pair, Record, RowError, assistant
from align.data.tokenizer import ChatTokenizer

_JOINERS = "'’-_.@"  # inside a word where letters or digits stand on both sides
_BETWEEN_DIGITS = ",:"
_UNSPACED = ((0x3040, 0x30FF), (0x3400, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x323AF))  # kana and ideographs
_TRIES = 64  # boundaries that are looked at, from the last one on


def with_beginning(record: Record, tokenizer: ChatTokenizer) -> Record:
    """A pair whose prompt was implicit, with its prompt; any other record as it is. Raises RowError."""
    if not isinstance(record, Pair) or not record.implicit:
        return record
    chosen, rejected = record.chosen, record.rejected
    assert isinstance(chosen, str) and isinstance(rejected, str), "messages part between messages: no tokens needed"
    at = common_beginning(tokenizer, chosen, rejected)
    if isinstance(record.prompt, str):
        return replace(record, prompt=chosen[:at], chosen=chosen[at:], rejected=rejected[at:], implicit=False)
    prompt = (*record.prompt, Message("user", chosen[:at]))
    return replace(
        record, prompt=prompt, chosen=assistant(chosen[at:]), rejected=assistant(rejected[at:]), implicit=False
    )


def common_beginning(tokenizer: ChatTokenizer, chosen: str, rejected: str) -> int:
    """Characters of the common beginning. Raises RowError where there is none, or none that ends between words."""
    if chosen == rejected:
        raise RowError("chosen and rejected are the same")
    alike = next((i for i, (x, y) in enumerate(zip(chosen, rejected, strict=False)) if x != y), None)
    alike = min(len(chosen), len(rejected)) if alike is None else alike
    if not alike:
        raise RowError("there is no `prompt`, and chosen and rejected do not begin alike")
    tried = 0
    for at in _boundaries(tokenizer, chosen, rejected):
        if at > alike or _inside_word(chosen, at) or _inside_word(rejected, at):
            continue
        tried += 1
        if tried > _TRIES:
            break
        if _is_cut(tokenizer, chosen, at) and _is_cut(tokenizer, rejected, at):
            return at
    raise RowError(
        "there is no `prompt`, and chosen and rejected begin alike only inside a word or a token: "
        f"{chosen[:alike][-40:]!r}"
    )


def _boundaries(tokenizer: ChatTokenizer, chosen: str, rejected: str) -> Iterator[int]:
    """Characters between two tokens of both sides behind which nothing is the same any more, from the last one back.

    A space in front of a word belongs to the word, as in TRL's extract_prompt.
    """
    (ids, spans), (others, _) = tokenizer.spans(chosen), tokenizer.spans(rejected)
    same = next((i for i, (x, y) in enumerate(zip(ids, others, strict=False)) if x != y), min(len(ids), len(others)))
    ends = {end for (_, end), (start, _) in pairwise(spans[: same + 1]) if end <= start}
    if same == len(spans) and spans:
        ends.add(spans[-1][1])
    elif same and same == len(others):
        ends.add(spans[same - 1][1])
    spaced = {at - 1 for at in ends if at > 1 and chosen[at - 1] == " " and at - 1 in ends}
    yield from sorted((at for at in ends if at and at - 1 not in spaced), reverse=True)


def _is_cut(tokenizer: ChatTokenizer, text: str, at: int) -> bool:
    """Whether the tokens of the text are those of what stands before the cut, and those of what follows it."""
    whole = tokenizer.encode(text, add_special_tokens=False)
    head = tokenizer.encode(text[:at], add_special_tokens=False)
    if whole[: len(head)] != head:
        return False
    return tokenizer.marks_start or whole[len(head) :] == tokenizer.encode(text[at:], add_special_tokens=False)


def _inside_word(text: str, at: int) -> bool:
    """Whether a cut before text[at] would part a word, a number, or what is shown as one character."""
    if at >= len(text):
        return False
    before, after = text[at - 1], text[at]
    if unicodedata.category(after).startswith("M") or "\u200d" in (before, after) or 0x1F3FB <= ord(after) <= 0x1F3FF:
        return True
    if _of_word(before) and _of_word(after):
        return True
    joiner, left, right = (after, at - 1, at + 1) if not _of_word(after) else (before, at - 2, at)
    if left < 0 or right >= len(text) or not _of_word(text[left]) or not _of_word(text[right]):
        return False
    digits = text[left].isdigit() and text[right].isdigit()
    return joiner in _JOINERS or (digits and joiner in _BETWEEN_DIGITS)


def _of_word(character: str) -> bool:
    code = ord(character)
    marked = unicodedata.category(character).startswith("M")
    return (character.isalnum() or marked) and not any(first <= code <= last for first, last in _UNSPACED)
