"""Is the final number right? 1 or 0, for GSM8K-style answers and everything that ends in a number.

The final number is the first one after the last marker (`####`, `\\boxed{}`, `<answer>`, `A:`, `Answer:`, "the answer
is"), or the last number of the text where there is no marker. Commas, currency and percent signs are dropped, so
"$1,250.00" equals 1250 and "50%" equals 50; fractions (3/4, 1 3/4, \\frac{3}{4}) are exact. A text without a number is
wrong, no error.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from rewards.api import Objective, Sample, reward
from rewards.builtins._answers import MARKER, gold, gold_text

_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:[eE][-+]?\d{1,3}(?![\w.]))?|\.\d+"
# A minus belongs to the number unless it subtracts: "16-3" holds 16 and 3, "x = -3" and "$-3" hold -3.
_SIGN = r"(?:(?<![\w.)\]])[-+−–]\s?(?:\$\s?)?)?"
_NUMBER = re.compile(
    rf"(?P<sign>{_SIGN})(?:(?P<whole>\d{{1,15}})\s+(?=\d{{1,15}}\s?/\s?\d))?"
    rf"(?P<top>{_DIGITS})(?:\s?/\s?(?P<under>\d+(?:\.\d+)?))?"
)
_CALCULATION = re.compile(r"<<[^<>]*>>")  # GSM8K's calculator notes
_FRACTION = re.compile(r"\\[dt]?frac\s*(?:\{\s*)?(-?[\d.,]+)\s*(?:\}\s*)?(?:\{\s*)?([\d.,]+)\s*\}?")
_LATEX = re.compile(r"\\(?:text|mathrm|mathbf|textbf)\s*\{([^{}]*)\}|\\[!,;: ]|\\(?=[$%])")
_LONGEST = 300  # digits; a longer run is a model stuck on a key, and Python refuses to read it as an integer


def final_number(text: str) -> Fraction | None:
    """The number that a text ends in, exactly; None where it holds none."""
    plain = _simplify(text)
    end = len(plain)
    for marker in reversed(list(MARKER.finditer(plain))):  # the last marker that a number follows
        found = _NUMBER.search(plain, marker.end(), end)
        value = _value(found) if found else None
        if value is not None:
            return value
        end = marker.start()
    values = [v for v in map(_value, _NUMBER.finditer(plain)) if v is not None]
    return values[-1] if values else None


def _simplify(text: str) -> str:
    text = _CALCULATION.sub("", text).replace("{,}", ",")
    text = _FRACTION.sub(r" \1/\2", text)
    return _LATEX.sub(lambda m: m.group(1) or "", text)


def _value(found: re.Match[str]) -> Fraction | None:
    """None where it is no number that anyone could mean: a division by zero, hundreds of digits."""
    if len(found[0]) > _LONGEST:
        return None
    value = Fraction(found["top"].replace(",", ""))
    if found["under"]:
        under = Fraction(found["under"])
        if under == 0:
            return None
        value /= under
    if found["whole"]:
        value += int(found["whole"])
    return -value if found["sign"][:1] in ("-", "−", "–") else value


def to_number(answer: Any) -> Fraction:
    """A gold answer as a number. ValueError where it holds none."""
    if isinstance(answer, int | float) and not isinstance(answer, bool):
        return Fraction(str(answer))
    value = final_number(str(answer))
    if value is None:
        raise ValueError(f"the gold answer {str(answer)[:200]!r} holds no number")
    return value


def _check(tolerance: float = 0.0) -> None:
    if tolerance < 0:
        raise ValueError(f"tolerance is a relative difference of at least 0, not {tolerance}")


@reward(objectives={"numeric": Objective(range=(0, 1))}, validate=_check, gold=gold_text)
def numeric(samples: Sequence[Sample], *, column: str | None = None, tolerance: float = 0.0) -> list[float]:
    """1 where the completion's final number equals the gold answer's, else 0.

    Args:
        column: the row's column with the gold answer (a number, or a text that ends in one); default: the first of
            reference_answer, answer, solution, ground_truth, target, label that the row has.
        tolerance: relative difference that still counts as equal; 0: exactly equal.
    """
    scores = []
    for sample in samples:
        right = to_number(gold(sample, column))
        found = final_number(sample.completion)
        close = found is not None and abs(found - right) <= Fraction(tolerance) * abs(right)
        scores.append(1.0 if close else 0.0)
    return scores
