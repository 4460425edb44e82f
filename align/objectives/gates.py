"""What of the scores and weights of a recipe holds in one sample and at one step: gates and schedules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from align.recipe.objectives import Gate, Objectives


def gated(scores: np.ndarray, names: Sequence[str], gates: Mapping[str, Gate]) -> np.ndarray:
    """f64[S, R] with NaN -> f64[S, R]: where its gate is closed, an objective is missing or has the score `otherwise`.

    A gate sees what other gates have left. Where the score of `when` is missing nobody knows whether the gate is open,
    and a score that is missing itself stays so: neither is replaced by a number.
    """
    out = scores.copy()
    for name in _in_order(gates):
        gate = gates[name]
        k, judge = names.index(name), out[:, names.index(gate.when)]
        low = -np.inf if gate.at_least is None else gate.at_least
        high = np.inf if gate.at_most is None else gate.at_most
        shut = ~((judge >= low) & (judge <= high))  # a missing judge too
        out[shut, k] = np.nan
        if gate.otherwise != "mask":
            out[shut & ~np.isnan(judge) & ~np.isnan(scores[:, k]), k] = gate.otherwise
    return out


def closed(scores: np.ndarray, out: np.ndarray, names: Sequence[str], gates: Mapping[str, Gate]) -> dict[str, float]:
    """By gated objective, the share of its scores that do not count as they are. out: what `gated` made of them."""
    shares: dict[str, float] = {}
    for name in gates:
        before, after = scores[:, names.index(name)], out[:, names.index(name)]
        known = ~np.isnan(before)
        if known.any():
            shares[name] = float((before[known] != after[known]).mean())
    return shares


def _in_order(gates: Mapping[str, Gate]) -> list[str]:
    """Each after the gate of what it looks at; the grammar has refused circles."""
    order: list[str] = []
    for name in gates:
        chain = [name]
        while gates[chain[-1]].when in gates:
            chain.append(gates[chain[-1]].when)
        order += [link for link in reversed(chain) if link not in order]
    return order


def weights_at(names: Sequence[str], config: Objectives, step: int) -> np.ndarray:
    """f64[R]: the recipe's weights at a step. 1 where it gives none, 0 where the objective is constrained instead."""
    return np.array([_weight(name, config, step) for name in names], np.float64)


def _weight(name: str, config: Objectives, step: int) -> float:
    if name in config.schedule:
        steps, weights = zip(*config.schedule[name], strict=True)
        return float(np.interp(step, steps, weights))
    return float(config.weights.get(name, 0.0 if name in config.constraints else 1.0))
