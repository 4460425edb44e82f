"""Does the completion equal the gold answer? 1 or 0."""

from __future__ import annotations

from collections.abc import Sequence

from rewards.api import Objective, Sample, reward
from rewards.builtins._answers import gold, gold_text, several


@reward(objectives={"exact": Objective(range=(0, 1))}, gold=gold_text)
def exact(samples: Sequence[Sample], *, column: str | None = None, ignore_case: bool = False) -> list[float]:
    """1 where the completion is the gold answer, white space aside, else 0.

    Args:
        column: the row's column with the gold answer, or with a list of answers that are all right; default: the
            first of reference_answer, answer, solution, ground_truth, target, label that the row has.
        ignore_case: compare without case.
    """
    scores = []
    for sample in samples:
        answers = several(gold(sample, column))
        said = _normal(sample.completion, ignore_case)
        scores.append(float(any(said == _normal(a, ignore_case) for a in answers)))
    return scores


def _normal(text: str, ignore_case: bool) -> str:
    text = " ".join(text.split())
    return text.casefold() if ignore_case else text
