"""Does the completion give the target of BIG-Bench Hard (2210.09261)? 1 or 0, by what kind the target is.

An option ("(B)") is compared by its letter, a whole number by value, True, False, yes, no, valid and invalid as words,
and anything else, such as sorted words, word by word: commas, line breaks and case do not count. Exact match as in the
paper, after "the answer is", with the answer's place found as `_answers.final_answer` says.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction

from rewards.api import Objective, Sample, reward
from rewards.builtins._answers import final_answer, gold, gold_text, several
from rewards.builtins._choices import chosen
from rewards.builtins.numeric import final_number

_OPTION = re.compile(r"\(([A-Z])\)")
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
_VERDICT = re.compile(r"\b(?:true|false|yes|no|valid|invalid)\b", re.IGNORECASE)
_BETWEEN = re.compile(r"[\s,;]+")


@reward(objectives={"bbh": Objective(range=(0, 1))}, gold=gold_text)
def bbh(samples: Sequence[Sample], *, column: str | None = None) -> list[float]:
    """1 where the completion's answer is the target, else 0.

    Args:
        column: the row's column with the target; default: the first of reference_answer, answer, solution,
            ground_truth, target, label that the row has.
    """
    return [float(_matches(s.completion, several(gold(s, column))[0].strip())) for s in samples]


def _matches(text: str, target: str) -> bool:
    if not target:
        raise ValueError("the target is empty")
    if option := _OPTION.fullmatch(target):
        return chosen(text, {}) == option[1]
    if _NUMBER.fullmatch(target):
        return final_number(text) == Fraction(target)
    if _VERDICT.fullmatch(target):
        return _verdict(text) == target.lower()
    wanted, said = _words(target), final_answer(text)
    parts = [said] if said else [text, text.strip().rpartition("\n")[2]]
    return any(_words(part) == wanted for part in parts)


def _verdict(text: str) -> str | None:
    """The first such word of the answer; without a marker, the last of the text, which has repeated the question."""
    said = final_answer(text)
    found = _VERDICT.findall(said or text)
    return (found[0] if said else found[-1]).lower() if found else None


def _words(text: str) -> list[str]:
    return [word for part in _BETWEEN.split(text.casefold()) if (word := part.strip(".*\"'[]"))]
