"""How many of a step's samples may fail, and the error that ends a run where more do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from rewards.api import Failure, RewardError

_SHOWN = 5
_KEPT = 256  # of the newest steps; far more than can be scored at the same time


@dataclass
class Budget:
    """What a plugin's max_error_rate is a share of: `samples`, scored in one call or in several that share this.

    unit: samples that fail together at most, 1 or those of a group; failed: samples that failed so far; first: the
    first failures, for the message that ends the run.
    """

    samples: int
    unit: int = 1
    failed: int = 0
    first: list[Failure] = field(default_factory=list)

    def spend(self, failure: Failure, *, again: bool) -> None:
        """again: an earlier failure of the same sample was counted."""
        self.failed += not again
        if len(self.first) < _SHOWN:
            self.first.append(failure)

    def check(self, name: str, rate: float) -> None:
        """Raise RewardError where more samples failed than `rate` allows."""
        allowed = allowed_failures(rate, self.samples, self.unit)
        if self.failed > allowed:
            raise self.stopped(name, f"more than max_error_rate = {rate:g} allows ({allowed})")

    def stopped(self, name: str, why: str) -> RewardError:
        """The error that ends the run, with the first failures."""
        shown = "\n".join(
            f"     group {f.group_id} sample {f.sample_id}, {f.objective or 'all objectives'}: {f.cause}: {f.message}"
            for f in self.first
        )
        return RewardError(
            f"{name} failed on {self.failed} of {self.samples} samples so far, {why}; the first failures:\n{shown}",
            remedy="mend the plugin, raise its timeout_s, or allow more with max_error_rate",
        )


class Budgets:
    """One budget per plugin and step, kept while calls of the step may still come."""

    def __init__(self) -> None:
        self._steps: dict[int, list[Budget]] = {}

    def of(self, number: int, samples: int, plugins: Sequence[object]) -> list[Budget]:
        """The budgets of step `number`, with what earlier calls have spent of them."""
        found = self._steps.setdefault(number, [Budget(samples) for _ in plugins])
        for own in found:
            own.samples = max(own.samples, samples)
        while len(self._steps) > _KEPT:
            del self._steps[next(iter(self._steps))]
        return found


def allowed_failures(rate: float, samples: int, unit: int = 1) -> int:
    """How many of a step's samples may fail: the share, rounded down, but where any may one, or the `unit` samples that
    fail together."""
    return 0 if rate == 0 else max(unit, int(rate * samples + 1e-9))
