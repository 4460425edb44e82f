"""One advantage per completion from its scores on several objectives.

A combiner gets the table of group-comparable rewards (costs already negated) and returns one advantage per sample;
`combine` does what all of them share: checks, gates, weights, whitening, missing samples, metrics. For combiners that
follow a utility (`view`), a weight policy stands between the recipe's weights and those of the advantage.

So REINFORCE++ (2501.03262) without its KL is {baseline: batch}, REINFORCE++-baseline {scale: none, whiten: true}, RLOO
{baseline: leave_one_out, scale: none}, Dr. GRPO {scale: none}, GDPO {combine: decoupled}, MaxRL {scale: mean}.

Deviations from the papers, on purpose: standard deviations have n - 1 below and an epsilon of 1e-4, as TRL's, so that
numbers can be compared; they never fall below `min_std`, so that noise (scores of .499 and .501) is not blown up to
advantages of +-1; and a batch is normalised over its samples, where REINFORCE++ counts a sample once a token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from align.errors import RewardError
from align.objectives import running
from align.objectives.check import unknown_names
from align.objectives.combiners import EPS, combiner_of
from align.objectives.gates import closed, gated, weights_at
from align.objectives.groups import Grouped
from align.objectives.metrics import describe
from align.objectives.view import State, View
from align.recipe.objectives import Objectives


def combine(
    scores: np.ndarray,
    group_ids: np.ndarray,
    names: Sequence[str],
    kinds: Sequence[str],
    config: Objectives,
    state: Mapping[str, Any],
    step: int,
) -> tuple[np.ndarray, State, dict[str, float]]:
    """Advantages of a whole step.

    Args:
        scores: f32[S, R], NaN where missing. group_ids: i64[S]; groups may differ in size and stand in any order.
        names, kinds: R objective names, and "reward" or "cost" for each; a cost enters as -cost.
        config: the recipe's `objectives`, by name. step: the stage's step, for schedules.
        state: what the last step returned ({} at first); JSON-able, part of the checkpoint.

    Returns:
        advantages: f32[S]. NaN means "not trained": no objective of that sample had a value (it is not a 0, which
            would count in the loss's denominator); the stage masks its tokens.
        state: for the next step: running means, multipliers, the ideal point, the archive. weighted_sum and decoupled
            keep none and pass it on.
        metrics: objective/<name>/{mean, std, missing, dead, correlation, weight, gated} and advantage/{std, missing,
            dead_groups} as `align.objectives.metrics.describe` has them, and the policy's own: constraint/<name>/
            {value, limit, lambda}, chebyshev/utility, reference_point/<name>, hypervolume/{value, archive}.
            What is undefined (the mean of no value) is left out.

    Raises:
        RewardError: an infinite score. RecipeError: a name in `config` that is no objective here.
    """
    scores = np.asarray(scores, np.float64)
    group_ids = np.asarray(group_ids)
    _check(scores, group_ids, names, kinds, config)
    groups = Grouped.of(group_ids)
    table = _Table.of(scores, groups, names, kinds, config)
    combiner = combiner_of(config.combine)
    state, policy = dict(state), combiner.policy
    if policy is not None:
        state = running.advance(state, table.gated, table.compared, names, config.decay)
        state = policy.advance(state, table.view(state, step))
    view = table.view(state, step)
    weights = policy.weights(state, view) if policy is not None else view.weights
    advantages = table.advantages(weights, view.sigma)
    if config.whiten or (config.whiten is None and combiner.whiten):
        advantages = whiten(advantages, config.min_std)
    metrics = describe(scores, table.gated, advantages, groups, names)
    metrics |= {f"objective/{name}/weight": float(weight) for name, weight in zip(names, weights, strict=True)}
    metrics |= {
        f"objective/{name}/gated": share for name, share in closed(scores, table.gated, names, config.gates).items()
    }
    if policy is not None:
        metrics |= policy.metrics(state, view)
    return advantages.astype(np.float32), state, metrics


def before_whitening(
    scores: np.ndarray,
    groups: Grouped,
    names: Sequence[str],
    kinds: Sequence[str],
    config: Objectives,
    state: Mapping[str, Any],
    step: int,
) -> np.ndarray:
    """f64[S, R] -> f64[S]: advantages as far as each group decides them alone, under the weights that `state` gives;
    NaN where no objective has a value."""
    table = _Table.of(scores, groups, names, kinds, config)
    view, policy = table.view(state, step), combiner_of(config.combine).policy
    weights = policy.weights(state, view) if policy is not None else view.weights
    return table.advantages(weights, view.sigma)


@dataclass(frozen=True)
class _Table:
    """Scores f64[S, R] after the gates, in their own signs; signs f64[R]; and which samples are compared."""

    gated: np.ndarray
    signs: np.ndarray
    compared: Grouped
    names: Sequence[str]
    config: Objectives

    @classmethod
    def of(
        cls, scores: np.ndarray, groups: Grouped, names: Sequence[str], kinds: Sequence[str], config: Objectives
    ) -> _Table:
        signs = np.array([-1.0 if kind == "cost" else 1.0 for kind in kinds])
        whole = Grouped(np.zeros_like(groups.index), 1)
        compared = whole if config.baseline == "batch" else groups
        return cls(gated(scores, names, config.gates), signs, compared, names, config)

    def view(self, state: Mapping[str, Any], step: int) -> View:
        means, spread = running.read(state, self.names)
        floored = np.maximum(np.nan_to_num(spread), self.config.min_std) + EPS
        return View(
            names=self.names,
            signs=self.signs,
            weights=weights_at(self.names, self.config, step),
            sigma=floored if self.config.scale == "std" else np.ones_like(floored),
            means=self.signs * means,
            batch=self.signs * running.batch_means(self.gated),
            config=self.config,
        )

    def advantages(self, weights: np.ndarray, sigma: np.ndarray) -> np.ndarray:
        """f64[S]; NaN where no objective has a value."""
        combiner = combiner_of(self.config.combine)
        found = combiner.advantages(self.gated * self.signs, self.compared, weights, sigma, self.config)
        return np.where(np.isnan(self.gated).all(axis=1), np.nan, found)


def whiten(advantages: np.ndarray, min_std: float) -> np.ndarray:
    """f64[S] with NaN -> f64[S]: mean 0 and standard deviation 1 over the samples of the step that are trained
    (REINFORCE++, 2501.03262; the last step of GDPO)."""
    known = advantages[~np.isnan(advantages)]
    if known.size < 2 or np.ptp(known) == 0:
        return np.asarray(advantages * 0.0)
    return np.asarray((advantages - known.mean()) / (max(float(known.std(ddof=1)), min_std) + EPS))


def _check(
    scores: np.ndarray, group_ids: np.ndarray, names: Sequence[str], kinds: Sequence[str], config: Objectives
) -> None:
    assert scores.ndim == 2 and scores.shape[1] == len(names) == len(kinds), "one column, name and kind per objective"
    assert group_ids.shape == (scores.shape[0],), "one group id per sample"
    for error in unknown_names(config, names):
        raise error
    infinite = np.argwhere(np.isinf(scores))
    if infinite.size:
        sample, k = (int(i) for i in infinite[0])
        raise RewardError(
            f"the score of sample {sample} (group {int(group_ids[sample])}) on {names[k]!r} is {scores[sample, k]}",
            remedy="a reward that cannot be given is None, never infinite",
        )
