"""What a guess is, and what none is made of: answers that nobody judged, and texts that a template framed already."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from align.data.formats.base import Layout

Columns = Mapping[str, str]
"""Our field -> their column."""


@dataclass(frozen=True)
class Guess:
    """layout: that reads the rows under `columns`; words: for a person."""

    layout: Layout
    columns: Columns

    @property
    def words(self) -> str:
        named = ", ".join(f"{ours} = {theirs}" for ours, theirs in self.columns.items() if ours != theirs)
        return f"{self.layout.name}; guessed: {named}"

    def describe(self) -> str:
        return "`columns: {" + ", ".join(f"{ours}: {theirs}" for ours, theirs in self.columns.items()) + "}`"


class Unguessed(Exception):
    """Why there is no guess, in words, with a remedy."""

    def __init__(self, what: str, remedy: str):
        super().__init__(what)
        self.what, self.remedy = what, remedy


def refuse_unjudged(named: Mapping[str, list[str]], pairs: Mapping[Any, Sequence[tuple[str, str]]]) -> None:
    """Raises Unguessed where two answers are there, and nothing says which is better. named: columns by plain name."""
    for first, second in (two for one in pairs.values() for two in one):
        if first in named and second in named:
            raise Unguessed(
                f"`{named[first][0]}` and `{named[second][0]}` are two answers, and no column says which is better",
                "name the one that does: `columns: {preference: ...}`; without one the rows are no pairs",
            )


def refuse_order(named: Mapping[str, list[str]], lists: Sequence[str]) -> None:
    """Raises Unguessed where a list beside answers may be their ranks, or the order in which they are ranked."""
    answers = next((named[name][0] for name in lists if name in named), None)
    if answers is not None and "ranking" in named:
        ranking = named["ranking"][0]
        raise Unguessed(
            f"`{ranking}` may be the rank of each of `{answers}`, or the order in which they are ranked",
            f"`columns: {{ranks: {ranking}, responses: {answers}}}` (and `query`) where each number is the rank of the "
            "answer in its place, 1 or 0 the best; else make it so by a function of the row (`format: mine.py:rows`)",
        )


_FRAMED = re.compile(
    r"\s*(<s>\s*)?(<\|im_start\|>|<\|begin_of_text\|>|<\|start_header_id\|>|(<bos>)?<start_of_turn>|<extra_id_[01]>|"
    r"\[INST\]|<\|user\|>|<\|system\|>|### Instruction:|Below is an instruction that describes a task|"
    r"Human: (?=.*\n+Assistant:\s*$))",
    re.S,
)
"""How a text begins that a chat template wrote."""


def refuse_framed(one: Guess, shown: Mapping[str, Any]) -> None:
    """Raises Unguessed where the question is a whole conversation already, framed by some template: put into a turn it
    would be framed twice."""
    asked = next((one.columns[ours] for ours in ("query", "instruction") if ours in one.columns), None)
    found = _FRAMED.match(shown[asked]) if asked is not None else None
    if found is None:
        return
    plain = {"query": "prompt", "response": "chosen" if "rejected_response" in one.columns else "completion"}
    plain |= {"rejected_response": "rejected", "instruction": "prompt", "output": "completion"}
    mapped = ", ".join(f"{plain.get(ours, ours)}: {theirs}" for ours, theirs in one.columns.items())
    text = f" (`columns: {{{mapped}}}`)" if one.columns.keys() <= plain.keys() else ""
    raise Unguessed(
        f"`{asked}` begins with {found[0].strip()!r}, as a chat template writes it: it is plain text{text}, or a turn "
        f"in which it stands as it is ({one.describe()})",
        "write the one that is meant",
    )
