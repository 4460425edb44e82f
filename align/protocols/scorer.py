"""What stages ask of rewards: the scores of completions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from align.protocols.fleet import Group


@dataclass(frozen=True, slots=True)
class Failure:
    """A score that could not be had: which sample and objective, the cause, and the first lines of the error."""

    group_id: int
    sample: int
    plugin: str
    cause: str
    message: str


@dataclass(frozen=True, slots=True)
class ScoreTable:
    """Scores of every completion of a list of groups, in order (S = sum of group sizes).

    objectives: R names; scores: f32[S, R], NaN where missing (not applicable, or failed: see failures);
    kinds: "reward" or "cost" per objective (a cost enters the combiners with its sign flipped);
    dropped: indices of groups that an `on_error: drop_group` policy removed; metrics: flat names to numbers; counts:
    by metric name, for each metric that is a mean, of how many numbers. A metric without a count is a sum: over
    several tables of one step it adds up, where means are weighted by their counts. series: numbers of which a step
    reports <name>_mean, <name>_p50 and <name>_p95 (the seconds of each call to a reward). notes: by a name of what they
    are about, lines for the user, of which a stage shows the first of each name. infos: what rewards noted beside the
    scores of each sample, () where none could.
    """

    objectives: tuple[str, ...]
    scores: np.ndarray
    kinds: tuple[str, ...]
    failures: tuple[Failure, ...] = ()
    dropped: tuple[int, ...] = ()
    metrics: Mapping[str, float] = field(default_factory=dict)
    infos: tuple[Mapping[str, Any], ...] = ()
    counts: Mapping[str, float] = field(default_factory=dict)
    series: Mapping[str, Sequence[float]] = field(default_factory=dict)
    notes: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ErrorBudget:
    """Of what a reward's `max_error_rate` is a share: calls with the same id share one budget over `samples` samples,
    however many of them each call brings. A step is scored in as many calls as its groups finish in."""

    id: int
    samples: int


class Scorer(Protocol):
    """The rewards of a stage, as one."""

    async def score(self, groups: Sequence[Group], budget: ErrorBudget | None = None) -> ScoreTable:
        """Several calls may run at once. budget None: these groups are all there is, and have a budget of their own.

        Raises RewardError where a reward fails more often than it may, PluginError where it cannot be loaded.
        """
        ...

    async def close(self) -> None:
        """End its processes; closing twice is harmless."""
        ...
