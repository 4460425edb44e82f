"""DAPO's soft punishment of overlong completions (2503.14476, eq. 13): from 0 down to -1.

    0                              where |y| <= L_max - L_cache
    ((L_max - L_cache) - |y|) / L_cache   where L_max - L_cache < |y| <= L_max
    -1                             where |y| > L_max

It is added to the reward for the answer, with a weight of 1 as in the paper. `length` with `max` and `buffer` is the
same slope from 1 to 0.
"""

from __future__ import annotations

from collections.abc import Sequence

from rewards.api import Objective, Sample, reward
from rewards.builtins.length import Unit, measure


def _check(max: int, cache: int, unit: Unit = "tokens") -> None:
    if cache < 1:
        raise ValueError(f"cache is at least 1, not {cache}")
    if max <= cache:
        raise ValueError(f"max {max} is not longer than cache {cache}")


@reward(objectives={"soft_overlong": Objective(range=(-1, 0))}, validate=_check)
def soft_overlong(samples: Sequence[Sample], *, max: int, cache: int, unit: Unit = "tokens") -> list[float]:
    """0 for a completion that keeps `cache` clear of `max`, falling to -1 at `max`.

    Args:
        max: L_max, the length at which the score reaches -1; the paper's is 20480, rollout.max_tokens is a good choice.
        cache: L_cache, over how many units below `max` it falls; the paper's is 4096.
        unit: tokens (the end-of-turn token counts), words, or characters.
    """
    lengths = [measure(s, unit) for s in samples]
    return [0.0 if n <= max - cache else -1.0 if n > max else (max - cache - n) / cache for n in lengths]
