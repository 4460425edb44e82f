"""Text of environments that becomes no added token, special or not: a tool's answer cannot open a turn.

A mark, a character that stands nowhere else, is put inside whatever reads like an added token before the template is
rendered. The rendered text is cut at the marks, and the pieces are encoded apart. Added tokens of white space alone are
left: they open nothing, and tokenizers that have them write all indented text with them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

from align.data.tokenizer import ChatTokenizer

Change = Callable[[str], str]

_STRUCTURE = {"role", "type"}  # keys whose values a template compares
_PRIVATE = range(0xE000, 0xF8FF)
_BARE = re.compile(r"[^\w\s]|_")
_ANCHORS = ("\n", ".", "a", "1")  # before a piece that is no input's beginning
_REPLACED = "\ufffd"


class Guard:
    """What keeps text from being read as a token of one tokenizer."""

    def __init__(self, tokenizer: ChatTokenizer):
        self.tokenizer = tokenizer
        named = {tokenizer.decode([i], False) for i in tokenizer.eos_ids} | set(tokenizer.named_tokens.values())
        texts = {text for text in tokenizer.added | named if text.replace("▁", " ").strip()}
        self._texts = frozenset(text for text in texts if len(text) > 1)
        self._characters = {ord(text): _REPLACED for text in texts & tokenizer.special if len(text) == 1}
        self._lengths: dict[str, list[int]] = {}
        for text in self._texts:
            lengths = self._lengths.setdefault(text[0], [])
            if len(text) not in lengths:
                lengths.append(len(text))
        first = "".join(re.escape(character) for character in sorted(self._lengths))
        self._first = re.compile(f"[{first}]") if first else None

    @cached_property
    def _ids(self) -> dict[int, str]:
        """Text of the added tokens that count, by id."""
        added = self.tokenizer.backend.get_added_tokens_decoder()
        return {i: token.content for i, token in added.items() if token.content in self._texts}

    # ------------------------------------------------------------------------------------------- marking

    def mark_for(self, texts: Sequence[str]) -> str:
        """A character that is in none of these texts, nor its JSON escape."""
        for code in _PRIVATE:
            if not any(chr(code) in text or f"\\u{code:04x}" in text.lower() for text in texts):
                return chr(code)
        raise ValueError("every character of the private area stands in the conversation")

    def places(self, text: str) -> list[int]:
        """Where cuts keep every added token from being read: behind the first character of each, ascending."""
        if self._first is None:
            return []
        return [
            at + 1
            for found in self._first.finditer(text)
            if any(text[(at := found.start()) : at + n] in self._texts for n in self._lengths[found[0]])
        ]

    def marked(self, mark: str) -> Change:
        """A text with a mark inside each added token."""

        def change(text: str) -> str:
            text = text.translate(self._characters) if self._characters else text
            cuts = self.places(text)
            if not cuts:
                return text
            return mark.join(text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True))

        return change

    def cut_up(self, mark: str) -> Change:
        """A text with a mark around every character that is neither a letter nor a digit nor white space."""
        return lambda text: mark + _BARE.sub(lambda found: mark + found[0] + mark, text) + mark

    @staticmethod
    def harmless(text: str) -> str:
        """A text as long, of letters, digits and white space alone: what a template writes around it is the same."""
        return _BARE.sub("x", text)

    # ------------------------------------------------------------------------------------------- ids

    def encode(self, text: str, mark: str) -> list[int]:
        """Ids of a rendered text, none of whose tokens goes over a mark."""
        escaped = re.escape(f"\\u{ord(mark):04x}")  # as a template that writes JSON in ASCII has it
        pieces = re.split(f"{mark}|{escaped}", text, flags=re.IGNORECASE)
        ids = self._piece(pieces[0], inner=False)
        for piece in pieces[1:]:
            ids += self._piece(piece, inner=True)
        return ids

    def _piece(self, text: str, inner: bool) -> list[int]:
        """Ids of a text; of one that is no input's beginning without what the tokenizer puts before those."""
        if not text:
            return []
        ids, spans = self._encoded(text, inner)
        for i, (start, end) in zip(ids, spans, strict=True):
            # what a normalizer makes a token of, and is none as it stands
            if i in self._ids and end - start > 1 and text[start:end].strip() != self._ids[i].strip():
                return self._piece(text[: start + 1], inner) + self._piece(text[start + 1 :], True)
        return ids

    def _encoded(self, text: str, inner: bool) -> tuple[list[int], list[tuple[int, int]]]:
        if not inner or not self.tokenizer.marks_start:
            return self.tokenizer.spans(text)
        for anchor in _ANCHORS:
            before, (ids, spans) = self.tokenizer.spans(anchor)[0], self.tokenizer.spans(anchor + text)
            if ids[: len(before)] == before and (len(ids) == len(before) or spans[len(before)][0] >= len(anchor)):
                return ids[len(before) :], [(a - len(anchor), b - len(anchor)) for a, b in spans[len(before) :]]
        return self.tokenizer.spans(text)

    def counts(self, ids: Sequence[int]) -> Counter[str]:
        """How often each added token stands among these ids."""
        return Counter(self._ids[i] for i in ids if i in self._ids)


def changed(value: Any, change: Change) -> Any:
    """A message, or any part of one, with each of its texts changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {k: v if k in _STRUCTURE else changed(v, change) for k, v in value.items()}
    return [changed(item, change) for item in value] if isinstance(value, list | tuple) else value
