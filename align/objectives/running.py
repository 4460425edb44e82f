"""Running means and standard deviations of objectives: what utilities act on, and their unit.

A utility of expected objectives cannot be taken of single samples, nor of a batch mean, whose noise a non-linear
function turns into a bias. Kept by name, in the objective's own sign, as JSON:

    state["running"][name] = {"mean": [value, steps], "variance": [value, steps]}

The first 1 / (1 - decay) steps are averaged evenly, so that the first of them has no weight of its own; later ones
exponentially. A step without a value of the objective changes nothing. The variance is the pooled one within groups,
the spread that advantages are made of; groups of equal scores count as what they are, so it shrinks as an objective is
settled, down to min_std.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from align.objectives.groups import Grouped

State = dict[str, Any]


def advance(state: Mapping[str, Any], scores: np.ndarray, groups: Grouped, names: Sequence[str], decay: float) -> State:
    """The state after a step with these scores f64[S, R] (NaN where missing)."""
    running = dict(state.get("running", {}))
    variance = pooled_variance(scores, groups)
    for k, (name, mean) in enumerate(zip(names, batch_means(scores), strict=True)):
        before = running.get(name, {"mean": [0.0, 0], "variance": [0.0, 0]})
        running[name] = {
            "mean": _moved(before["mean"], float(mean), decay),
            "variance": _moved(before["variance"], float(variance[k]), decay),
        }
    return {**state, "running": running}


def _moved(before: Sequence[float], value: float, decay: float) -> list[float]:
    at, steps = before
    if np.isnan(value):
        return [at, steps]
    rate = max(1.0 - decay, 1.0 / (steps + 1))
    return [at + rate * (value - at), steps + 1]


def read(state: Mapping[str, Any], names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Means f64[R] and standard deviations f64[R], NaN where nothing was seen yet."""
    pairs = [state.get("running", {}).get(name, {}) for name in names]
    values = [[p[key][0] if p and p[key][1] else np.nan for p in pairs] for key in ("mean", "variance")]
    return np.array(values[0], np.float64), np.sqrt(np.array(values[1], np.float64))


def batch_means(scores: np.ndarray) -> np.ndarray:
    """f64[S, R] with NaN -> f64[R]: the mean of the values there are, NaN of none."""
    known = ~np.isnan(scores)
    with np.errstate(invalid="ignore"):
        return np.asarray(np.where(known, scores, 0.0).sum(axis=0) / known.sum(axis=0))


def pooled_variance(scores: np.ndarray, groups: Grouped) -> np.ndarray:
    """f64[S, R] with NaN -> f64[R]: squared differences to the own group's mean, over the degrees of freedom of all
    groups; NaN where no group has two values."""
    known = ~np.isnan(scores)
    n = groups.sums(known)
    filled = np.where(known, scores, 0.0)
    with np.errstate(invalid="ignore"):
        mean = groups.sums(filled) / n
        squares = np.where(known, (filled - mean[groups.index]) ** 2, 0.0).sum(axis=0)
        freedom = np.maximum(n - 1, 0).sum(axis=0)
        return np.asarray(np.where(freedom > 0, squares / freedom, np.nan))
