"""Data order as arithmetic: which rows a step sees is a function of (seed, step), so resuming needs no iterator state.

An epoch is a permutation of the rows drawn from (seed, epoch). Two ways to cut epochs into batches:

- within epochs (offline stages): an epoch ends with a short batch where the batch size does not divide it; a last batch
  below `minimum`, what the loss needs at least, joins the one before it.
- across epochs (online stages, `wrap`): the epochs are one endless stream and every batch is full.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

_MASK = np.uint64(0xFFFFFFFFFFFFFFFF)


def epoch_order(n: int, seed: int, epoch: int) -> np.ndarray:
    """i64[n]: a permutation of 0..n-1 that depends on (seed, epoch) alone, on every platform and numpy version.

    Rows are sorted by SplitMix64 (Steele, Lea & Flood 2014) of their number, keyed by seed and epoch.
    """
    key = _mix(_mix(np.array([seed & int(_MASK)], np.uint64)) + np.uint64(epoch))
    return np.argsort(_mix(np.arange(n, dtype=np.uint64) + key), kind="stable").astype(np.int64)


def _mix(z: np.ndarray) -> np.ndarray:
    """SplitMix64's output function, u64 -> u64; a bijection, so no two rows tie."""
    with np.errstate(over="ignore"):
        z = z * np.uint64(0x9E3779B97F4A7C15) + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


@dataclass(frozen=True)
class BatchPlan:
    """The batches of a stage over n rows.

    batch: rows per step. epochs (may be a fraction) or steps: the stage's length; one of them. minimum: smallest
    batch a loss can use. wrap: full batches across epochs.
    """

    n: int
    batch: int
    seed: int
    epochs: float | None = None
    steps: int | None = None
    minimum: int = 1
    wrap: bool = False

    def __post_init__(self) -> None:
        if self.n < 1 or self.batch < 1 or self.minimum < 1:
            raise ValueError(f"need at least one row and one row per batch, got n={self.n}, batch={self.batch}")
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("give `epochs` or `steps`")

    @property
    def steps_per_epoch(self) -> int:
        """Steps of one epoch (within epochs)."""
        full, rest = divmod(self.n, self.batch)
        return max(full + (rest >= self.minimum), 1)

    @property
    def joined(self) -> int:
        """Rows of a too short last batch that join the batch before it; 0 where there is none."""
        full, rest = divmod(self.n, self.batch)
        return rest if not self.wrap and full and 0 < rest < self.minimum else 0

    @property
    def total_steps(self) -> int:
        if self.steps is not None:
            return self.steps
        assert self.epochs is not None
        exact = self.epochs * self.n / self.batch if self.wrap else self.epochs * self.steps_per_epoch
        return max(math.ceil(exact - 1e-9), 1)

    def draws(self, step: int) -> np.ndarray:
        """i64[b, 2]: (epoch, row) of each item of step `step` (from 0)."""
        if self.wrap:
            at = np.arange(step * self.batch, (step + 1) * self.batch)
            epochs, places = at // self.n, at % self.n
            orders = {int(e): epoch_order(self.n, self.seed, int(e)) for e in np.unique(epochs)}
            rows = np.array([orders[int(e)][p] for e, p in zip(epochs, places, strict=True)], np.int64)
            return np.stack([epochs, rows], axis=1)
        epoch, k = divmod(step, self.steps_per_epoch)
        end = self.n if k + 1 == self.steps_per_epoch else (k + 1) * self.batch
        rows = epoch_order(self.n, self.seed, epoch)[k * self.batch : end]
        return np.stack([np.full_like(rows, epoch), rows], axis=1)

    def indices(self, step: int) -> np.ndarray:
        """i64[b]: rows of step `step` (from 0)."""
        return self.draws(step)[:, 1]
