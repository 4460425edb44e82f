"""What a weight policy sees of a step, and what it must answer.

Lagrangian, Chebyshev and hypervolume are one mechanism: a utility u of the expected objectives J is followed along its
gradient by a linear advantage with the weights w_k = du/dJ_k,

    A = sum_k w_k (r_k - mean_g r_k) / sigma_k     so that     E[A grad log pi] = sum_k w_k grad J_k = grad u(J),

J_k, limits and reference points all in units of the running sigma_k. Divided by each group's own deviation instead, the
weights would no longer be the gradient of u, and a multiplier would have no fixed point.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from align.recipe.objectives import Objectives

State = dict[str, Any]


@dataclass(frozen=True)
class View:
    """R objectives at one step.

    names: of the R. signs f64[R]: 1 for a reward, -1 for a cost. weights f64[R]: the recipe's at this step.
    sigma f64[R]: the unit, the running standard deviation in scores (1 where `scale` is not std).
    means f64[R]: running means as rewards (a cost negated), in scores; NaN for an objective without a value so far.
    batch f64[R]: the step's own means, as those. config: the recipe's `objectives`.
    """

    names: Sequence[str]
    signs: np.ndarray
    weights: np.ndarray
    sigma: np.ndarray
    means: np.ndarray
    batch: np.ndarray
    config: Objectives

    @property
    def known(self) -> np.ndarray:
        """bool[R]: objectives that have a weight and a mean."""
        return (self.weights > 0) & ~np.isnan(self.means)

    def as_rewards(self, values: Mapping[str, float]) -> np.ndarray:
        """f64[R] of numbers by name in their objectives' own signs, as rewards; NaN where there is none."""
        return self.signs * np.array([values.get(name, np.nan) for name in self.names], np.float64)


class WeightPolicy(Protocol):
    """A module of this package, or a user's. Its state is JSON, by name, in an objective's own sign and units."""

    def advance(self, state: Mapping[str, Any], view: View) -> State:
        """The state after the step."""
        ...

    def weights(self, state: Mapping[str, Any], view: View) -> np.ndarray:
        """f64[R]: du/dJ_k, J_k as a reward in units of sigma_k."""
        ...

    def metrics(self, state: Mapping[str, Any], view: View) -> dict[str, float]:
        """What a user watches of it, by flat name, in an objective's own sign and units."""
        ...
