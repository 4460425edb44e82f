"""Does the completion match a regular expression? 1 or 0."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

from rewards.api import Objective, Sample, reward

Mode = Literal["search", "match", "fullmatch"]


def compile_pattern(pattern: str, flags: str) -> re.Pattern[str]:
    """`flags`: letters of i (ignore case), m (multi-line), s (dot matches newline), x (verbose). ValueError names a
    pattern or flag that does not work."""
    unknown = set(flags) - set("imsx")
    if unknown:
        raise ValueError(f"unknown flag {min(unknown)!r}; use letters of 'imsx'")
    value = re.NOFLAG
    for letter in flags:
        value |= re.RegexFlag[letter.upper()]
    try:
        return re.compile(pattern, value)
    except re.error as error:
        raise ValueError(f"the pattern {pattern!r} is no regular expression: {error}") from error


def _check(pattern: str, flags: str = "") -> None:
    compile_pattern(pattern, flags)


@reward(objectives={"regex": Objective(range=(0, 1))}, validate=_check)
def regex(
    samples: Sequence[Sample], *, pattern: str, mode: Mode = "search", flags: str = "", strip: bool = True
) -> list[float]:
    """1 where the completion matches, else 0.

    Args:
        pattern: a regular expression of Python's `re`; for marks that are special tokens say `text: raw`.
        mode: search (anywhere), match (at the start), fullmatch.
        flags: letters of i, m, s, x. strip: white space around the completion is taken off first.
    """
    compiled = compile_pattern(pattern, flags)
    matches = {"search": compiled.search, "match": compiled.match, "fullmatch": compiled.fullmatch}[mode]
    return [float(matches(s.completion.strip() if strip else s.completion) is not None) for s in samples]
