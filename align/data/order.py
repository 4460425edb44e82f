"""Data order as arithmetic: which rows a step sees is a function of (seed, step), so resuming needs no iterator state.

An epoch is a permutation of the rows drawn from (seed, epoch), and batches do not cross epochs: an epoch ends with a
short batch where the batch size does not divide it. A last batch below `minimum`, what the loss needs at least, joins
the one before it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from align.recipe.capabilities import TrainStage

_MASK = np.uint64(0xFFFFFFFFFFFFFFFF)


@lru_cache(maxsize=2)  # every step of an epoch asks for it
def epoch_order(n: int, seed: int, epoch: int) -> np.ndarray:
    """i64[n], read-only: a permutation of 0..n-1 that depends on (seed, epoch) alone, on every platform and numpy
    version.

    Rows are sorted by SplitMix64 (Steele, Lea & Flood 2014) of their number, keyed by seed and epoch.
    """
    key = _mix(_mix(np.array([seed & int(_MASK)], np.uint64)) + np.uint64(epoch))
    order = np.argsort(_mix(np.arange(n, dtype=np.uint64) + key), kind="stable").astype(np.int64)
    order.setflags(write=False)
    return order


def _mix(z: np.ndarray) -> np.ndarray:
    """SplitMix64's output function, u64 -> u64; a bijection, so no two rows tie."""
    with np.errstate(over="ignore"):
        z = z * np.uint64(0x9E3779B97F4A7C15) + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


@dataclass(frozen=True)
class BatchPlan:
    """The batches of a stage over `rows` rows.

    size: rows per batch. epochs (may be a fraction) or steps: the stage's length; one of them. minimum: the smallest
    batch that the loss can use.
    """

    rows: int
    size: int
    seed: int
    epochs: float | None = None
    steps: int | None = None
    minimum: int = 1

    def __post_init__(self) -> None:
        if self.rows < 1 or self.size < 1 or self.minimum < 1:
            raise ValueError(f"need rows and a batch size, got rows={self.rows}, size={self.size}")
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("give `epochs` or `steps`")

    @classmethod
    def of(cls, stage: TrainStage, rows: int, seed: int, minimum: int = 1) -> BatchPlan:
        """The plan of an offline stage of the recipe: its `batch` in sequences or pairs, its `steps` or `epochs`."""
        epochs = None if stage.steps is not None else stage.epochs or 1.0
        return cls(rows, stage.batch.rows, seed, epochs, stage.steps, minimum)

    @property
    def per_epoch(self) -> int:
        """Batches of one epoch."""
        full, rest = divmod(self.rows, self.size)
        return max(full + (rest >= self.minimum and rest > 0), 1)

    @property
    def joined(self) -> int:
        """Rows of a too short last batch that join the batch before it; 0 where there is none."""
        full, rest = divmod(self.rows, self.size)
        return rest if full and rest < self.minimum else 0

    @property
    def total(self) -> int:
        """Steps of the stage; a fraction of an epoch is rounded up to whole steps."""
        if self.steps is not None:
            return self.steps
        return max(math.ceil((self.epochs or 1.0) * self.per_epoch - 1e-9), 1)

    def batch(self, step: int) -> np.ndarray:
        """i64[b]: rows of step `step` (from 0), in the order in which they were drawn."""
        epoch, k = divmod(step, self.per_epoch)
        end = self.rows if k + 1 == self.per_epoch else (k + 1) * self.size
        return epoch_order(self.rows, self.seed, epoch)[k * self.size : end]
