"""The objective that lags most behind its ideal counts most (smooth Tchebycheff, 2402.19078).

    u(J) = -mu log sum_k exp(w_k (z*_k - J_k) / mu)          du/dJ_k = w_k softmax_k(w_k (z*_k - J_k) / mu)

z* is the recipe's `reference_point`, or the best running mean so far where it gives none. mu towards 0 is the plain
minimum over the weighted distances, a large mu the weighted sum.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from align.errors import RecipeError
from align.objectives.check import Known, needs_two
from align.objectives.view import State, View
from align.recipe.objectives import Objectives


def advance(state: Mapping[str, Any], view: View) -> State:
    best = view.as_rewards(state.get("ideal", {}))
    ideal = view.signs * np.fmax(best, view.means)
    learnt = {
        name: float(value)
        for name, value, known in zip(view.names, ideal, view.known, strict=True)
        if known and name not in view.config.reference_point
    }
    return {**state, "ideal": {**state.get("ideal", {}), **learnt}}


def _exponents(state: Mapping[str, Any], view: View) -> np.ndarray:
    """w_k (z*_k - J_k) / mu of the known objectives."""
    ideal = view.as_rewards({**state.get("ideal", {}), **view.config.reference_point})
    known = view.known
    return np.asarray((view.weights * (ideal - view.means) / view.sigma / view.config.mu)[known])


def weights(state: Mapping[str, Any], view: View) -> np.ndarray:
    if not view.known.any():
        return view.weights  # nothing is known before the first step
    exponents = _exponents(state, view)
    share = np.exp(exponents - exponents.max())
    out = np.zeros_like(view.weights)
    out[view.known] = view.weights[view.known] * share / share.sum()
    return out


def metrics(state: Mapping[str, Any], view: View) -> dict[str, float]:
    exponents = _exponents(state, view)
    out = {f"reference_point/{name}": value for name, value in state.get("ideal", {}).items()}
    if exponents.size:
        top = float(exponents.max())
        out["chebyshev/utility"] = -view.config.mu * (top + float(np.log(np.exp(exponents - top).sum())))
    return out


def problems(config: Objectives, objectives: Mapping[str, Known], active: Sequence[str]) -> Iterator[RecipeError]:
    """What cannot be traded off; see `align.objectives.check.problems`."""
    for name, value in config.reference_point.items():
        known = objectives[name]
        if known.better(known.worst, value):
            yield RecipeError(
                f"every score of {name!r} is better than its ideal {value:g} "
                f"(they lie in [{known.low:g}, {known.high:g}])",
                where=f"objectives.reference_point.{name}",
                remedy=f"the reference point of chebyshev is the best one hopes for, such as {known.best:g}",
            )
    yield from needs_two(config, active)
