"""Does the completion give the right count? For "how many" questions about pictures or texts.

The count is the last whole number after the answer marker, or of the text where there is no marker, in digits or in
English words up to ninety-nine ("twenty-one circles"); "none" and "no circles" are 0. A text without one is wrong.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from rewards.api import Objective, Sample, reward
from rewards.builtins._answers import final_answer, gold, gold_text

_BELOW_TWENTY = """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen
seventeen eighteen nineteen"""
_BY_TEN = "twenty thirty forty fifty sixty seventy eighty ninety"
_ONES, _TENS = _BELOW_TWENTY.split(), _BY_TEN.split()
_VALUES = {word: value for value, word in enumerate(_ONES)} | {word: 20 + 10 * i for i, word in enumerate(_TENS)}
_VALUES |= {f"{ten} {one}": _VALUES[ten] + _VALUES[one] for ten in _TENS for one in _ONES[1:10]}
_VALUES |= {"none": 0, "no": 0}
_DIGITS = r"(?P<digits>\d{1,3}(?:,\d{3})+|\d+)(?:\.0+)?(?![\w]|[.,]\d)"
_NO = r"no(?=\s+\w)(?!\s+(?:more|less|fewer|other|doubt)\b)"
_WORDS = rf"(?:{'|'.join(_TENS)})[-\s](?:{'|'.join(_ONES[1:10])})|{'|'.join(_ONES + _TENS)}|none|{_NO}"
_COUNT = re.compile(rf"(?<![\w.,])(?:{_DIGITS}|(?P<words>{_WORDS})(?!\w))", re.IGNORECASE)
_LONGEST = 15  # digits


@reward(objectives={"count": Objective(range=(0, 1))}, gold=gold_text)
def count(samples: Sequence[Sample], *, column: str | None = None, partial: bool = False) -> list[float]:
    """1 where the completion gives the gold count, else 0 or, with `partial`, less the further it is off.

    Args:
        column: the row's column with the count, a whole number from 0 or a text that gives one; default: the first of
            reference_answer, answer, solution, ground_truth, target, label that the row has.
        partial: a count n instead of m scores max(0, 1 - |n - m| / max(m, 1)) instead of 0.
    """
    scores = []
    for sample in samples:
        right, found = _gold_count(gold(sample, column)), final_count(sample.completion)
        if found is None or not partial:
            scores.append(float(found == right))
        else:
            scores.append(max(0.0, 1 - abs(found - right) / max(right, 1)))
    return scores


def final_count(text: str) -> int | None:
    """The count that a text ends in; None where it gives none."""
    found = list(_COUNT.finditer(final_answer(text) or text))
    if not found:
        return None
    digits, words = found[-1]["digits"], found[-1]["words"]
    if digits is None:
        return _VALUES[" ".join(words.lower().replace("-", " ").split())]
    return int(digits.replace(",", "")) if len(digits) <= _LONGEST else None


def _gold_count(answer: Any) -> int:
    if isinstance(answer, float) and answer.is_integer():
        answer = int(answer)
    found = answer if isinstance(answer, int) and not isinstance(answer, bool) else final_count(str(answer))
    if found is None or found < 0:
        raise ValueError(f"the gold answer {answer!r} is no count: a whole number from 0 is needed")
    return found
