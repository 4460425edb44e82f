"""Constraints by multipliers: maximise the weighted rewards, subject to a limit on the mean of others.

    A = (A_r - sum_c lambda_c A_c) / (1 + sum_c lambda_c)
    lambda_c <- clip(lambda_c + lr (mean_c - d_c) / sigma_c, 0, lambda_max)

as in Safe RLHF (2310.12773): divided by 1 + lambda, a large multiplier is no large step. A `min` is the same with both
signs turned. With `proportional` (2007.03964, Algorithm 2, without its derivative), the multiplier in use is

    clip(lambda_c + proportional (mean_c - d_c) / sigma_c, 0, lambda_max)

which lambda_c itself does not remember.

The multiplier answers to the mean of the batch, not to the running one: it is itself an integral over steps, so noise
averages out in it, and a running mean in front of the integral is a delay that makes the pair of policy and multiplier
swing: in the loop of tests/unit/objectives/test_utility.py the cost by 0.15 around its limit, instead of 0.02. It rises
before the batch that broke the limit is trained on.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from align.objectives.view import State, View


def advance(state: Mapping[str, Any], view: View) -> State:
    multipliers, added = dict(state.get("lambda", {})), dict(state.get("added", {}))
    for name, constraint in view.config.constraints.items():
        k = view.names.index(name)
        excess = _sense(view, k) * (view.signs[k] * constraint.limit - view.batch[k]) / view.sigma[k]
        before = float(multipliers.get(name, 0.0))
        if not np.isnan(excess):  # a step without a value of it says nothing
            multipliers[name] = float(np.clip(before + constraint.lr * excess, 0.0, constraint.lambda_max))
            added[name] = float(constraint.proportional * excess)
    return {**state, "lambda": multipliers, "added": added}


def _in_use(state: Mapping[str, Any], view: View) -> dict[str, float]:
    """By constraint, its multiplier at this step."""
    added, constraints = state.get("added", {}), view.config.constraints
    return {
        name: float(np.clip(multiplier + added.get(name, 0.0), 0.0, constraints[name].lambda_max))
        for name, multiplier in state.get("lambda", {}).items()
    }


def _sense(view: View, k: int) -> float:
    """1 where the limit bounds the objective, as a reward, from below; -1 from above."""
    return float(view.signs[k] * (1.0 if view.config.constraints[view.names[k]].max is None else -1.0))


def weights(state: Mapping[str, Any], view: View) -> np.ndarray:
    out, total = view.weights.copy(), 1.0
    for name, multiplier in _in_use(state, view).items():
        k = view.names.index(name)
        out[k] += multiplier * _sense(view, k)
        total += multiplier
    return np.asarray(out / total)


def metrics(state: Mapping[str, Any], view: View) -> dict[str, float]:
    out: dict[str, float] = {}
    multipliers = _in_use(state, view)
    for name, constraint in view.config.constraints.items():
        k = view.names.index(name)
        if not np.isnan(view.batch[k]):
            out[f"constraint/{name}/value"] = float(view.signs[k] * view.batch[k])
        out[f"constraint/{name}/limit"] = constraint.limit
        out[f"constraint/{name}/lambda"] = multipliers.get(name, 0.0)
    return out
