"""Which of several options does a text choose? By its letter, or by its words."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from string import ascii_uppercase
from typing import Any

from rewards.builtins._answers import final_answer

Options = Mapping[str, str]  # letter -> text, in order

_OPTION = re.compile(r"^[ \t]*(?:\(([A-Z])\)|([A-Z])[.):])[ \t]+(\S.*)$", re.MULTILINE)
_LETTER = re.compile(r"\(([A-Za-z])\)|\b(?:option|choice|answer)\s+([A-Z])\b", re.ASCII)
_LONE_LETTER = re.compile(r"\W*([A-Za-z])(?:\W*\Z|[).:,]\s)", re.ASCII)


def lettered(texts: Sequence[Any]) -> dict[str, str]:
    """Options in their order as A, B, C... ValueError where there are none, or more than letters."""
    if not 1 <= len(texts) <= len(ascii_uppercase):
        raise ValueError(f"{len(texts)} options: 1 to {len(ascii_uppercase)} can have a letter")
    return {letter: str(text) for letter, text in zip(ascii_uppercase, texts, strict=False)}


def listed_options(text: str) -> dict[str, str]:
    """The options that a question lists on lines of their own, "(A) text", "A. text" or "A) text": the last list that
    starts at A. Empty where it lists none."""
    options: dict[str, str] = {}
    for found in _OPTION.finditer(text):
        letter = found[1] or found[2]
        if letter == "A":
            options = {}
        if letter == ascii_uppercase[len(options) % len(ascii_uppercase)]:
            options[letter] = found[3].strip()
    return options


def as_letter(answer: Any, options: Options) -> str:
    """The letter of a gold answer: a letter itself, "(B)", an index into the options, or an option's text. ValueError
    where it is none of these."""
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(options):
        return list(options)[answer]
    same = [letter for letter, text in options.items() if _plain(text) == _plain(str(answer))]
    if len(same) == 1:
        return same[0]
    lone = re.fullmatch(r"\s*\(?([A-Za-z])\)?[.:]?\s*", str(answer), re.ASCII)
    if lone and (not options or lone[1].upper() in options):
        return lone[1].upper()
    raise ValueError(
        f"the gold answer {answer!r} is none of the options: {', '.join(options.values()) or 'none given'}"
    )


def chosen(text: str, options: Options) -> str | None:
    """The letter that a completion chooses; None where it chooses none, or more than one.

    What follows the last answer marker decides. Without one, the whole text where it names one option only, else its
    last line, else its first.
    """
    said = final_answer(text)
    lines = [line for line in text.strip().split("\n") if line.strip()]
    for part in [said] if said else [text, *lines[-1:], *lines[:1]]:
        found = {letter for letter in _letters(part) if not options or letter in options} or set(_texts(part, options))
        if len(found) == 1:
            return found.pop()
    return None


def _letters(text: str) -> Iterator[str]:
    lone = _LONE_LETTER.match(text)
    if lone:
        yield lone[1].upper()
    for found in _LETTER.finditer(text):
        yield (found[1] or found[2]).upper()


def _texts(text: str, options: Options) -> Iterator[str]:
    """Letters of the options whose words stand in the text; "blue" does not where "light blue" is the longer option."""
    text = _plain(text)
    for letter, option in sorted(options.items(), key=lambda item: -len(item[1])):
        pattern = re.compile(rf"(?<!\w){re.escape(_plain(option))}(?!\w)")
        if pattern.search(text):
            yield letter
            text = pattern.sub(" ", text)


def _plain(text: str) -> str:
    return " ".join(text.casefold().split()).strip(" .\"'*")
