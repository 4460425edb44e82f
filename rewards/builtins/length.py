"""Is the completion as long as it should be? Smooth, so that every token counts.

With `target` T and length n: min(n, T) / max(n, T), which is 1 at T and falls to both sides. With `max` M and
`buffer` B: 1 up to M - B, then straight down to 0 at M; B defaults to M, so that shorter is always better. The second
is DAPO's soft overlong punishment (2503.14476, eq. 13) moved from [-1, 0] to [0, 1].
"""

from __future__ import annotations

import builtins  # `max` is an argument's name here
from collections.abc import Sequence
from typing import Literal

from rewards.api import Objective, Sample, reward

Unit = Literal["tokens", "words", "characters"]


def _check(target: int | None = None, max: int | None = None, buffer: int | None = None) -> None:
    if (target is None) == (max is None):
        raise ValueError("give `target` (a length to meet) or `max` (a length to stay below)")
    if target is not None and buffer is not None:
        raise ValueError("`buffer` goes with `max`")
    for name, value in (("target", target), ("max", max), ("buffer", buffer)):
        if value is not None and value < 1:
            raise ValueError(f"{name} is at least 1, not {value}")
    if max is not None and buffer is not None and buffer > max:
        raise ValueError(f"buffer {buffer} is longer than max {max}")


@reward(objectives={"length": Objective(range=(0, 1))}, validate=_check)
def length(
    samples: Sequence[Sample],
    *,
    target: int | None = None,
    max: int | None = None,
    buffer: int | None = None,
    unit: Unit = "tokens",
) -> list[float]:
    """1 at the wanted length, falling smoothly to 0.

    Args:
        target: the length to meet. max: the length at which the score reaches 0 (one of the two is needed).
        buffer: over how many units below `max` it falls; default: all of them, so that shorter is always better.
        unit: tokens (the end-of-turn token counts), words, or characters.
    """
    lengths = [measure(s, unit) for s in samples]
    if target is not None:
        return [min(n, target) / builtins.max(n, target) for n in lengths]
    assert max is not None
    slope = buffer if buffer is not None else max
    return [min(1.0, builtins.max(0.0, (max - n) / slope)) for n in lengths]


def measure(sample: Sample, unit: Unit) -> int:
    """The completion's length. ValueError where its tokens are to be counted and it has none."""
    if unit == "words":
        return len(sample.completion.split())
    if unit == "characters":
        return len(sample.completion)
    return len(token_ids(sample))


def token_ids(sample: Sample) -> Sequence[int]:
    """The completion's tokens. ValueError where it has a text but none, as in a file of texts."""
    if sample.completion and not sample.token_ids:
        raise ValueError("the sample has a text but no token ids: use `unit: words` or `unit: characters`")
    return sample.token_ids
