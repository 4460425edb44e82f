"""What must go together in a stage that samples."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def problems_of_sampling(stage: Any) -> Iterator[str]:
    """In words, with the remedy, what contradicts itself. stage: a `SamplingStage`, whose class asks."""
    groups, parts = stage.batch.groups, stage.minibatches
    if not stage.rewards and not stage.environment:
        yield "give `rewards: [...]`, or an `environment` that scores: what its completions are worth"
    if groups % parts:
        divisors = ", ".join(str(n) for n in range(1, groups + 1) if groups % n == 0)
        yield f"`minibatches: {parts}` does not divide `batch.groups: {groups}`; it takes {divisors}"
    factor = stage.dynamic_sampling and stage.dynamic_sampling.max_factor
    if factor and (factor - 1) * groups < 1 - 1e-9:
        yield (
            f"`dynamic_sampling.max_factor: {factor:g}` of {groups} groups leaves none to replace; "
            f"at least {1 + 1 / groups:.3g}"
        )
    if stage.overdue == "drop" and stage.staleness == 0:
        yield "`overdue: drop` needs `staleness` above 0: a synchronous step waits for all its groups"
    named = {*stage.objectives.weights, *stage.objectives.schedule}
    if stage.rollout.truncated == "penalise" and "truncated" in named:
        yield "the weight of the objective `truncated` is `rollout.truncated_penalty`; give it there"
    if stage.dynamic_sampling and stage.objectives.baseline == "batch":
        yield (
            "`dynamic_sampling` replaces groups whose scores are equal, and under `objectives.baseline: batch` "
            "they teach as others do; leave it out, or compare within groups (`baseline: group`)"
        )
