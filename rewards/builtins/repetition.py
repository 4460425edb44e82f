"""The penalty for repeating n-grams: 0 where all differ, down to -1 where all are the same.

As in Open-R1 (open_r1/rewards.py, get_repetition_penalty_reward), after Yeo et al., "Demystifying Long Chain-of-Thought
Reasoning" (2502.03373, appendix C.2): scale * (1 - distinct n-grams / n-grams), over words of the text in lower case. A
completion of fewer words than n repeats nothing and scores 0.
"""

from __future__ import annotations

from collections.abc import Sequence

from rewards.api import Objective, Sample, reward
from rewards.builtins.length import Unit, token_ids


def _check(n: int = 3, scale: float = -1.0) -> None:
    if n < 1:
        raise ValueError(f"n is at least 1, not {n}")
    if not -1 <= scale < 0:
        raise ValueError(f"scale is the penalty of a text that repeats all: from -1 to below 0, not {scale}")


@reward(objectives={"repetition": Objective(range=(-1, 0))}, validate=_check)
def repetition(
    samples: Sequence[Sample],
    *,
    n: int = 3,
    scale: float = -1.0,
    unit: Unit = "words",
) -> list[float]:
    """`scale` times the share of n-grams that stood before.

    Args:
        n: words of an n-gram; Open-R1 uses 3 for code and prose, Yeo et al. 40 tokens. scale: the lowest score.
        unit: words; characters, for languages that put no space between words; or tokens.
    """
    return [_score(_pieces(sample, unit), n, scale) for sample in samples]


def _pieces(sample: Sample, unit: Unit) -> Sequence[object]:
    if unit == "tokens":
        return token_ids(sample)
    text = sample.completion.lower()
    return text.split() if unit == "words" else "".join(text.split())


def _score(pieces: Sequence[object], n: int, scale: float) -> float:
    count = len(pieces) - n + 1
    if count < 1:
        return 0.0
    distinct = len({tuple(pieces[i : i + n]) for i in range(count)})
    return scale * (1 - distinct / count)
