"""How many tokens completions have: log-normal, or as a run had them. A group's lengths are a function of (seed, id).

So they are the same at every staleness and when an engine dies and the group is drawn again, as in a real run, and two
settings are compared on the same work.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import numpy as np

_BLOCK = 1024  # groups drawn at once
_MEAN_OF = 16  # blocks


class Lengths(Protocol):
    @property
    def mean(self) -> float:
        """Tokens of a completion, of all that may be drawn."""
        ...

    def of(self, group_id: int) -> np.ndarray:
        """f64[G]: whole numbers, at least 1."""
        ...


@dataclass
class LogNormal:
    """Completions are independent: `mean_tokens` before the cut at `limit`, sigma the standard deviation of the
    logarithm (0: all alike)."""

    mean_tokens: float
    sigma: float
    limit: int
    group_size: int
    seed: int = 0
    _blocks: dict[int, np.ndarray] = field(default_factory=dict, repr=False)

    @cached_property
    def mean(self) -> float:
        return float(np.mean([self._block(number).mean() for number in range(_MEAN_OF if self.sigma else 1)]))

    def of(self, group_id: int) -> np.ndarray:
        row: np.ndarray = self._block(group_id // _BLOCK)[group_id % _BLOCK]
        return row

    def _block(self, number: int) -> np.ndarray:
        if number not in self._blocks:
            chance = np.random.default_rng([self.seed, number])
            logs = self.sigma * chance.standard_normal((_BLOCK, self.group_size)) - self.sigma**2 / 2
            self._blocks[number] = self._cut(self.mean_tokens * np.exp(logs))
        return self._blocks[number]

    def _cut(self, tokens: np.ndarray) -> np.ndarray:
        cut: np.ndarray = np.clip(np.round(tokens), 1.0, float(self.limit))
        return cut


@dataclass
class Empirical:
    """Whole groups of a run, drawn again at random: what completions of a prompt have in common stays. Where the run's
    groups are of another size than `group_size`, single completions are drawn. Cut at `limit`; what the run itself cut
    stays as short."""

    groups: Sequence[np.ndarray]
    limit: int
    group_size: int
    seed: int = 0

    def __post_init__(self) -> None:
        assert self.groups, "at least one group"
        whole = all(len(group) == self.group_size for group in self.groups)
        pool = np.stack(self.groups) if whole else np.concatenate(self.groups)
        self._pool = np.clip(pool.astype(np.float64), 1.0, float(self.limit))
        self.mean = float(self._pool.mean())
        self._blocks: dict[int, np.ndarray] = {}

    def of(self, group_id: int) -> np.ndarray:
        number = group_id // _BLOCK
        if number not in self._blocks:
            shape = (_BLOCK,) if self._pool.ndim == 2 else (_BLOCK, self.group_size)
            chosen = np.random.default_rng([self.seed, number]).integers(0, len(self._pool), shape)
            self._blocks[number] = self._pool[chosen]
        row: np.ndarray = self._blocks[number][group_id % _BLOCK]
        return row
