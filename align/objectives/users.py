"""A user's combiner, which may answer anything: every answer is looked at before it becomes an advantage."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from align.errors import PluginError, RecipeError
from align.objectives.groups import Grouped
from align.objectives.view import State, View, WeightPolicy
from align.plugins import users_code
from align.recipe.objectives import Objectives


class OwnAdvantages:
    """`advantages` of a combiner, see `align.objectives.combiners`. name: of the plugin. Raises PluginError where it
    fails, or does not give one number for each sample that has scores."""

    def __init__(self, name: str, advantages: Any):
        self.name, self._advantages = name, advantages

    def __call__(
        self, rewards: np.ndarray, groups: Grouped, weights: np.ndarray, sigma: np.ndarray, config: Objectives
    ) -> np.ndarray:
        with users_code(self.name, "the combiner failed"):
            found = self._advantages(rewards.copy(), groups, weights.copy(), sigma.copy(), config)
        found = _numbers(found, len(rewards), "advantages", "sample", self.name)
        whole = ~np.isnan(rewards).any(axis=1)
        wrong = np.flatnonzero(np.isinf(found) | (whole & np.isnan(found)))
        if wrong.size:
            scores = ", ".join(f"{score:g}" for score in rewards[wrong[0]])
            raise PluginError(
                f"the combiner gave {found[wrong[0]]:g} as the advantage of a sample whose rewards are {scores}; the "
                f"sample would not be trained ({wrong.size} of {len(rewards)} are so)",
                where=self.name,
                remedy="divide by no deviation that may be 0: `sigma` is not, and `config.min_std` is a least one",
            )
        return found


class OwnPolicy:
    """A user's `align.objectives.view.WeightPolicy`, in the same way."""

    def __init__(self, name: str, policy: WeightPolicy):
        self.name, self._policy = name, policy

    def advance(self, state: Mapping[str, Any], view: View) -> State:
        with users_code(self.name, "`advance` of the combiner failed"):
            found: Any = self._policy.advance(state, view)
        if not isinstance(found, dict):
            self._refuse(f"`advance` of the combiner answered {_short(found)}", "return the state, `{**state, ...}`")
        try:
            json.dumps(found)
        except (TypeError, ValueError) as error:
            self._refuse(
                f"`advance` of the combiner answered a state that a checkpoint cannot hold: {error}",
                "keep numbers, texts, lists and maps in it: float(x), x.tolist()",
            )
        return dict(found)

    def weights(self, state: Mapping[str, Any], view: View) -> np.ndarray:
        with users_code(self.name, "`weights` of the combiner failed"):
            found = self._policy.weights(state, view)
        found = _numbers(found, len(view.names), "weights", "objective", self.name)
        if not np.isfinite(found).all():
            self._refuse(f"`weights` of the combiner answered {found.tolist()}", "a weight is a finite number")
        return found

    def metrics(self, state: Mapping[str, Any], view: View) -> dict[str, float]:
        with users_code(self.name, "`metrics` of the combiner failed"):
            return {str(key): float(value) for key, value in self._policy.metrics(state, view).items()}

    def problems(
        self, config: Objectives, objectives: Mapping[str, Any], active: Sequence[str]
    ) -> Iterator[RecipeError]:
        """What cannot work with these objectives; a policy may leave it out."""
        if hasattr(self._policy, "problems"):
            with users_code(self.name, "`problems` of the combiner failed"):
                yield from list(self._policy.problems(config, objectives, active))

    def _refuse(self, what: str, remedy: str) -> None:
        raise PluginError(what, where=self.name, remedy=remedy)


def _numbers(found: Any, count: int, what: str, of: str, name: str) -> np.ndarray:
    """f64[count]. Raises PluginError for anything else, also what numpy would stretch to it."""
    try:
        array = np.asarray(found)
    except (TypeError, ValueError, RuntimeError):  # lists of unequal length, a tensor with gradient
        array = np.asarray(None)
    if array.shape != (count,) or array.dtype.kind not in "biuf":
        raise PluginError(
            f"the combiner answered {_short(found)} as {what}, where {count} numbers are needed, one for each {of}",
            where=name,
            remedy=f"return a numpy array of shape [{count}]",
        )
    return array.astype(np.float64)


def _short(value: Any) -> str:
    shape = getattr(value, "shape", None)
    text = f"a {type(value).__name__}" + ("" if shape is None else f" of shape {list(shape)}")
    return "nothing (None)" if value is None else text
