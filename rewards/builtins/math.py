"""Is the final mathematical answer equal to the gold one? 1 or 0, for MATH-style answers in LaTeX or plain text.

The answer is what follows the last marker (`\\boxed{}`, `####`, "the answer is"...), else the last $...$, else the last
line. Numbers, fractions, roots, powers, functions, names, tuples, intervals, unions, sets (also a list with commas, in
any order), a ± b and equations are compared by value: exactly where they are rational, else numerically, as
`_values.py` says. Units in \\text{}, degrees, percent and currency signs do not count. What is no expression,
such as a name in \\text{}, is compared as text. math-verify is not needed; a project that wants its rules writes a
plugin of three lines.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from rewards.api import Objective, Sample, reward
from rewards.builtins._answers import final_answer, gold, gold_text, several
from rewards.builtins._expressions import NotMath, parse
from rewards.builtins._values import same

_MATH = re.compile(r"\$\$?([^$\n]+)\$\$?|\\\[(.+?)\\\]|\\\((.+?)\\\)")
_TEXT = re.compile(r"\\(?:text|mathrm|mathbf|textbf|mbox|operatorname)\s*\{([^{}]*)\}")
_UNIT = re.compile(r"(?<=[\d})])\s*\\(?:text|mathrm|mbox)\s*\{[^{}]*\}(?:\s*\^\s*\{?\d\}?)?\s*\Z")
_SILENT = re.compile(
    r"\\(?:left|right|displaystyle|quad|qquad)(?![A-Za-z])|\\[!,;: ]|~|\\?[$%]|\^\s*(?:\{\s*\\circ\s*\}|\\circ)|°"
)
_LOOSE = re.compile(r" (?!\w)|(?<!\w) ")  # a space that divides no two words
_THOUSANDS = re.compile(r"(?<![\d.])(\d{1,3})((?:,\d{3})+)(?![\d])")


@reward(objectives={"math": Objective(range=(0, 1))}, gold=gold_text)
def math(samples: Sequence[Sample], *, column: str | None = None) -> list[float]:
    """1 where the completion's final answer equals a gold answer, else 0.

    Args:
        column: the row's column with the gold answer (an expression, or a solution that ends in one), or a list of
            answers that are all right; default: the first of reference_answer, answer, solution, ground_truth, target,
            label that the row has.
    """
    scores = []
    for sample in samples:
        answers = [last_expression(a) for a in several(gold(sample, column))]
        if "" in answers:
            raise ValueError(f"the gold answer {gold(sample, column)!r} is empty")
        found = last_expression(sample.completion)
        scores.append(float(any(equal(found, answer) for answer in answers)))
    return scores


def last_expression(text: str) -> str:
    """Where a text gives its answer; "" where it has none."""
    said = final_answer(text)
    if said:
        return said
    written = _MATH.findall(text)
    if written:
        return next(part for part in written[-1] if part).strip()
    return text.strip().rpartition("\n")[2].strip().removesuffix(".")


def equal(a: str, b: str) -> bool:
    """Whether two answers mean the same."""
    a, b = _plain(a), _plain(b)
    if not a or not b:
        return False
    if _letters(a) == _letters(b):
        return True
    try:
        return same(parse(a), parse(b))
    except NotMath:
        return False


def _plain(text: str) -> str:
    text = _SILENT.sub(" ", text.replace("{,}", "").replace("\\{", "\\lbrace ").replace("\\}", "\\rbrace "))
    text = _TEXT.sub(r" \1 ", _UNIT.sub("", text)).strip().removesuffix(".").strip()
    bracketed = text[:1] in "([" or text.startswith("\\lbrace")
    return text if bracketed else _THOUSANDS.sub(lambda m: m[1] + m[2].replace(",", ""), text)


def _letters(text: str) -> str:
    return _LOOSE.sub("", " ".join(text.split())).casefold()
