"""Weights from the gain in dominated hypervolume: what more of each objective adds to all that was reached before.

    u(J) = HV(archive + J) - HV(archive)             du/dJ_k = the face of J's own box that moves with J_k

HV is the volume between the recipe's `reference_point` and the points of the archive: the running means of this run
that no other has beaten. Weights are the gradient over its sum: units multiply in a volume, and the step should not. Of
a J that was itself beaten before, the gradient is zero; the points that beat it are then left out, so that it grows in
its own layer (Wang, Deutz, Baeck, Emmerich, EMO 2017). Where J has not passed the reference point there is no volume,
and the way to that point is followed (the uncrowded improvement of 1904.08823).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from align.errors import RecipeError
from align.objectives import pareto
from align.objectives.check import Known, needs_two
from align.objectives.view import State, View
from align.recipe.objectives import Objectives

ARCHIVE = 32  # points; of more, the one that adds least is left out


def advance(state: Mapping[str, Any], view: View) -> State:
    if not _complete(view):
        return dict(state)
    names, reference = _names(view), _reference(view)
    points = np.vstack([_archive(state, view), view.means[view.known]])
    points = not_dominated(points[(points > reference).all(axis=1)])
    while len(points) > ARCHIVE:
        gains = [gain(p, np.delete(points, i, axis=0), reference) for i, p in enumerate(points)]
        points = np.delete(points, int(np.argmin(gains)), axis=0)
    own = points * view.signs[view.known]
    return {**state, "archive": [dict(zip(names, map(float, point), strict=True)) for point in own]}


def _complete(view: View) -> bool:
    return bool((view.known == (view.weights > 0)).all())


def _names(view: View) -> list[str]:
    return [name for name, known in zip(view.names, view.known, strict=True) if known]


def _reference(view: View) -> np.ndarray:
    return view.as_rewards(view.config.reference_point)[view.known]


def _archive(state: Mapping[str, Any], view: View) -> np.ndarray:
    """f64[A, K]: the archive as rewards, in the order of the objectives that take part."""
    points = [view.as_rewards(point)[view.known] for point in state.get("archive", [])]
    return np.array(points, np.float64).reshape(len(points), int(view.known.sum()))


def weights(state: Mapping[str, Any], view: View) -> np.ndarray:
    out = (view.weights > 0).astype(np.float64)
    if _complete(view):
        known, sigma, reference = view.known, view.sigma[view.known], _reference(view)
        point, archive = view.means[known], _archive(state, view)
        slope = faces(point, archive[~dominate(archive, point)], reference) * sigma
        if not slope.any():
            slope = np.maximum(reference - point, 0.0) / sigma
        out[known] = slope if slope.any() else 1.0
    return np.asarray(out / out.sum())


def metrics(state: Mapping[str, Any], view: View) -> dict[str, float]:
    if not _complete(view):
        return {}
    archive = _archive(state, view)
    return {
        "hypervolume/value": pareto.hypervolume(archive, _reference(view)),
        "hypervolume/archive": float(len(archive)),
    }


# ------------------------------------------------------------------------------------------------ geometry


def dominate(points: np.ndarray, point: np.ndarray) -> np.ndarray:
    """f64[A, K], f64[K] -> bool[A]: at least as good in every objective, and better in one."""
    return np.asarray((points >= point).all(axis=1) & (points > point).any(axis=1))


def not_dominated(points: np.ndarray) -> np.ndarray:
    """f64[A, K] -> f64[B, K]: each that no other beats, once, in lexical order."""
    unique = np.unique(points, axis=0)
    return np.asarray(unique[~pareto.dominated(unique)])


def gain(point: np.ndarray, points: np.ndarray, reference: np.ndarray) -> float:
    """The volume that `point` f64[K] adds to that of `points` f64[A, K]."""
    box = float(np.prod(np.maximum(point - reference, 0.0)))
    if box == 0.0 or not len(points):
        return box
    return box - pareto.hypervolume(not_dominated(np.minimum(points, point)), reference)


def faces(point: np.ndarray, points: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """f64[K]: the gradient of `gain` in `point`. Moved up along k, it sweeps what of its box's face those points do not
    cover that reach further along k. (At an edge of the archive the one towards better values.)"""
    if (point <= reference).any():
        return np.zeros_like(point)
    rest = [np.arange(len(point)) != k for k in range(len(point))]
    return np.array(
        [gain(point[r], points[points[:, k] > point[k]][:, r], reference[r]) for k, r in enumerate(rest)], np.float64
    )


def problems(config: Objectives, objectives: Mapping[str, Known], active: Sequence[str]) -> Iterator[RecipeError]:
    """What has no volume; see `align.objectives.check.problems`."""
    for name, value in config.reference_point.items():
        known = objectives[name]
        if not known.better(known.best, value):
            yield RecipeError(
                f"no score of {name!r} is better than its reference point {value:g}: the volume would always be 0",
                where=f"objectives.reference_point.{name}",
                remedy=f"give a score that every run beats, such as {known.worst:g}",
            )
    yield from needs_two(config, active)
    for name in active:
        if name not in config.reference_point:
            worst = objectives[name].worst
            such = f"{worst:g}" if abs(worst) != float("inf") else "a mean that every run beats"
            yield RecipeError(
                f"`combine: hypervolume` needs a reference point of {name!r}, from which volume is counted",
                where="objectives.reference_point",
                remedy=f"add `{name}: ...` ({such}), or give it the weight 0",
            )
        if name in config.schedule or config.weights.get(name, 1.0) != 1.0:
            key = "schedule" if name in config.schedule else "weights"
            yield RecipeError(
                f"the weight of {name!r} would change nothing: a volume has no weights",
                where=f"objectives.{key}.{name}",
                remedy="use 1, or 0 to leave it out; what matters more is said by `reference_point`",
            )
