"""Fronts of points in which more is better: which are dominated, and the volume that they dominate."""

from __future__ import annotations

import numpy as np


def dominated(points: np.ndarray) -> np.ndarray:
    """f64[N, R] -> bool[N]: another point is at least as good on every objective and better on one."""
    gain: np.ndarray = points[None] - points[:, None]  # f64[N, N, R]: by how much j is better than i
    return np.asarray(np.any(np.all(gain >= 0, axis=2) & np.any(gain > 0, axis=2), axis=1))


def hypervolume(points: np.ndarray, reference: np.ndarray) -> float:
    """Volume of the union of boxes [reference, point], f64[N, R] and f64[R]; 0 where no point is beyond the reference.

    Exact, by slices along the last objective (HSO: While, Hingston, Barone, Huband, IEEE TEC 2006): N^(R-1) steps, for
    few objectives.
    """
    above = np.asarray(points, np.float64) - reference
    above = above[(above > 0).all(axis=1)]
    return _volume(above[~dominated(above)]) if len(above) else 0.0


def _volume(above: np.ndarray) -> float:
    """Of boxes from the origin to each point."""
    above = above[np.argsort(-above[:, -1], kind="stable")]
    depth = above[:, -1] - np.append(above[1:, -1], 0.0)
    if above.shape[1] == 1:
        return float(above[0, 0])
    if above.shape[1] == 2:
        return float(np.maximum.accumulate(above[:, 0]) @ depth)
    return float(sum(d * _volume(above[: n + 1, :-1]) for n, d in enumerate(depth) if d > 0))
