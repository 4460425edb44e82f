"""Does the completion contain what it should? A share between 0 and 1."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rewards.api import Objective, Sample, reward
from rewards.builtins._answers import gold, row_gold, several


def _check(texts: list[str] | None = None, column: str | None = None) -> None:
    if texts is not None and column is not None:
        raise ValueError("give `texts` or `column`, not both")
    if texts is not None and not all(texts):
        raise ValueError("`texts` is empty or holds an empty text, which everything contains")
    if texts == []:
        raise ValueError("`texts` is empty: name what the completion should contain")


def _gold(
    row: Mapping[str, Any], *, texts: list[str] | None = None, column: str | None = None, absent: bool = False
) -> str | None:
    """All the texts, one a line; None where they should be absent: what else should be there is not known."""
    return None if absent else "\n".join(_wanted(texts if texts is not None else row_gold(row, column)))


@reward(objectives={"contains": Objective(range=(0, 1))}, validate=_check, gold=_gold)
def contains(
    samples: Sequence[Sample],
    *,
    texts: list[str] | None = None,
    column: str | None = None,
    ignore_case: bool = False,
    absent: bool = False,
) -> list[float]:
    """The share of the texts that the completion contains.

    Args:
        texts: what to look for in every completion. column: the row's column that holds it (a text or a list)
            instead; default: the first of reference_answer, answer, solution, ground_truth, target, label.
        ignore_case: compare without case. absent: the share of texts that it does *not* contain.
    """
    scores = []
    for sample in samples:
        wanted = _wanted(texts if texts is not None else gold(sample, column))
        said = sample.completion
        if ignore_case:
            said, wanted = said.casefold(), [w.casefold() for w in wanted]
        scores.append(sum((w in said) != absent for w in wanted) / len(wanted))
    return scores


def _wanted(answer: Any) -> list[str]:
    wanted = several(answer)
    if not all(wanted):
        raise ValueError(f"the gold answer {answer!r} holds an empty text, which everything contains")
    return wanted
