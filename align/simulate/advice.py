"""Which staleness, and how many devices for the trainer: outcomes compared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from align.errors import RecipeError
from align.simulate.stage import Outcome
from align.simulate.workload import Workload

ENOUGH = 0.95
"""Of the best throughput: what more staleness gains beyond it is not worth training on older tokens."""
_TRIED = 8  # splits


def smallest_sufficient(outcomes: Sequence[Outcome]) -> Outcome:
    """The outcome of the smallest staleness whose steps per minute are within 5 % of the most."""
    best = max(outcome.steps_per_minute for outcome in outcomes)
    enough = [outcome for outcome in outcomes if outcome.steps_per_minute >= ENOUGH * best]
    return min(enough, key=lambda outcome: (outcome.staleness, -outcome.steps_per_minute))


@dataclass(frozen=True)
class Split:
    """trainers, engines: devices of each; outcomes: by staleness."""

    trainers: int
    engines: int
    outcomes: Sequence[Outcome]

    @property
    def recommended(self) -> Outcome:
        return smallest_sufficient(self.outcomes)


def splits(
    work: Workload, devices: int, run: Callable[[Workload], Sequence[Outcome]], *, measured_with: int = 1
) -> list[Split]:
    """Some ways to divide `devices` between the trainer and engines of one device each, fewest trainers first.

    run: the outcomes of a workload, by staleness; measured_with: trainers that `work.train_s` is of. Assumed: training
    time is inversely proportional to the trainer's devices, and nothing else depends on how many there are.
    """
    if devices < 2:
        raise RecipeError(
            f"{devices} devices cannot be divided", where="--devices", remedy="give at least 2: a trainer and an engine"
        )
    found = []
    for trainers in _candidates(devices):
        divided = replace(work, engines=devices - trainers, train_s=work.train_s * measured_with / trainers)
        found.append(Split(trainers, devices - trainers, run(divided)))
    return found


def best_split(found: Sequence[Split]) -> Split:
    """The one of most steps per minute; where several are within a hundredth, that of the smallest staleness."""
    most = max(split.recommended.steps_per_minute for split in found)
    close = [split for split in found if split.recommended.steps_per_minute >= 0.99 * most]
    return min(close, key=lambda split: (split.recommended.staleness, -split.recommended.steps_per_minute))


def _candidates(devices: int) -> list[int]:
    """Trainers from 1 to devices - 1: all, or some at even distances."""
    count = min(_TRIED, devices - 1)
    if count == 1:
        return [1]
    return sorted({1 + round(place * (devices - 2) / (count - 1)) for place in range(count)})
