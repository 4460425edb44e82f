"""How much of a wanted layout does the completion have? A share from 0 to 1: dense where `regex` is all or nothing."""

from __future__ import annotations

from collections.abc import Sequence

from rewards.api import Objective, Sample, reward
from rewards.builtins.regex import compile_pattern


def _check(parts: list[str], flags: str = "s", max_tokens: int | None = None) -> None:
    if not parts:
        raise ValueError("`parts` is empty: give the patterns of the layout in their order")
    for part in parts:
        compile_pattern(part, flags)
    if max_tokens is not None and max_tokens < 1:
        raise ValueError(f"max_tokens is at least 1, not {max_tokens}")


@reward(objectives={"format": Objective(range=(0, 1))}, validate=_check)
def format(
    samples: Sequence[Sample],
    *,
    parts: list[str],
    flags: str = "s",
    max_tokens: int | None = None,
    complete: bool = False,
) -> list[float]:
    """The share of `parts` found in order, each after the end of the one before.

    Args:
        parts: regular expressions, such as ["<think>.+?</think>", "#### -?[\\\\d,.]+$"]; white space around the
            completion is taken off first. Marks that are special tokens are there with `text: raw` alone.
        flags: letters of i, m, s, x.
        max_tokens: one more part to earn: the completion has at most so many tokens.
        complete: one more part to earn: the completion ended by itself, not by the limit of the rollout.
    """
    patterns = [compile_pattern(part, flags) for part in parts]
    scores = []
    for sample in samples:
        text, place, earned = sample.completion.strip(), 0, 0
        for pattern in patterns:
            found = pattern.search(text, place)
            if found:
                place, earned = found.end(), earned + 1
        possible = len(patterns) + (max_tokens is not None) + complete
        earned += max_tokens is not None and len(sample.token_ids) <= max_tokens
        earned += complete and not sample.truncated
        scores.append(earned / possible)
    return scores
