"""Statistics of ragged groups that leave missing values (NaN) out. S samples, R objectives, G groups."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np


@dataclass(frozen=True, slots=True)
class Grouped:
    """Which group each sample is in, whatever the order they stand in. index: i64[S] in 0..G-1."""

    index: np.ndarray
    count: int

    @staticmethod
    def of(group_ids: np.ndarray) -> Grouped:
        unique, index = np.unique(group_ids, return_inverse=True)
        return Grouped(index.reshape(-1), int(unique.shape[0]))

    def sums(self, values: np.ndarray) -> np.ndarray:
        """f64[S, ...] -> f64[G, ...]: the sum of each group."""
        out = np.zeros((self.count, *values.shape[1:]), np.float64)
        np.add.at(out, self.index, values)
        return out

    def ranges(self, values: np.ndarray) -> np.ndarray:
        """f64[S, ...] with NaN -> f64[G, ...]: largest minus smallest; NaN for a group without values."""
        low = np.full((self.count, *values.shape[1:]), np.inf)
        high = np.full((self.count, *values.shape[1:]), -np.inf)
        np.minimum.at(low, self.index, np.where(np.isnan(values), np.inf, values))
        np.maximum.at(high, self.index, np.where(np.isnan(values), -np.inf, values))
        with np.errstate(invalid="ignore"):
            return np.where(np.isinf(low), np.nan, high - low)


def centre(values: np.ndarray, groups: Grouped, baseline: Literal["group", "leave_one_out", "batch"]) -> np.ndarray:
    """f64[S, R] with NaN -> f64[S, R]: each value minus the mean of its group, or minus the mean of the others of its
    group ("leave_one_out": RLOO, 2402.14740, eq. 6); 0 where missing, and where there is nothing to compare with. Under
    "batch", `groups` is the one group of all.

    A group whose values are all equal gives exact zeros: the rounding of its mean is no signal.
    """
    present = ~np.isnan(values)
    n = groups.sums(present)[groups.index]
    total = groups.sums(np.where(present, values, 0.0))[groups.index]
    with np.errstate(divide="ignore", invalid="ignore"):
        centred = values - total / n
        if baseline == "leave_one_out":
            centred = np.where(n > 1, centred * n / (n - 1), 0.0)
    varied = groups.ranges(values)[groups.index] > 0
    return np.where(present & varied, centred, 0.0)


def means(values: np.ndarray, groups: Grouped) -> np.ndarray:
    """f64[S, ...] with NaN -> f64[G, ...]: the mean of each group's values; 0 for a group without any."""
    present = ~np.isnan(values)
    n = groups.sums(present)
    return np.asarray(groups.sums(np.where(present, values, 0.0)) / np.maximum(n, 1))


def std(values: np.ndarray, groups: Grouped) -> np.ndarray:
    """f64[S, ...] with NaN -> f64[G, ...]: standard deviation of each group's values with n - 1 below, as torch's and
    TRL's; 0 for fewer than two values."""
    present = ~np.isnan(values)
    n = groups.sums(present)
    filled = np.where(present, values, 0.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        mean = groups.sums(filled) / n
        squares = groups.sums(np.where(present, (filled - mean[groups.index]) ** 2, 0.0))
        return np.where(n > 1, np.sqrt(squares / (n - 1)), 0.0)
