"""One advantage per completion from its scores on several objectives.

A combiner gets the table of group-comparable rewards (costs already negated) and returns one advantage per sample;
`combine` does what all of them share: checks, weights, whitening, missing samples, metrics.

Deviations from the papers, on purpose: standard deviations have n - 1 below and an epsilon of 1e-4, as TRL's, so that
numbers can be compared; and they never fall below `min_std`, so that noise (scores of .499 and .501) is not blown up
to advantages of +-1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from align.errors import RecipeError, RewardError
from align.objectives.groups import Grouped, centre, std
from align.recipe.schema import Objectives

EPS = 1e-4
_NO_SIGNAL = 1e-7  # what rounding leaves where the terms of a sum cancel

State = dict[str, Any]
Combiner = Callable[[np.ndarray, Grouped, np.ndarray, Objectives], np.ndarray]


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
        config: combine, weights by name (1 where not given), baseline, scale, min_std, whiten.
        state: what the last step returned ({} at first); JSON-able, part of the checkpoint. step: the stage's step.

    Returns:
        advantages: f32[S]. NaN means "not trained": no objective of that sample had a value (it is not a 0, which
            would count in the loss's denominator); the stage masks its tokens.
        state: for the next step; the combiners here keep none and pass it on.
        metrics: objective/<name>/{mean, std, missing, dead, correlation} (mean and std with the objective's own sign
            over the values there are; missing: share of samples; dead: share of groups whose values are all equal;
            correlation with the advantage), advantage/{std, missing, dead_groups} (shares of samples and groups).
            What is undefined (the mean of no value) is left out.

    Raises:
        RewardError: an infinite score. RecipeError: a weight for an objective that does not exist.
    """
    scores = np.asarray(scores, np.float64)
    group_ids = np.asarray(group_ids)
    _check(scores, group_ids, names, kinds, config)
    groups = Grouped.of(group_ids)
    advantages = before_whitening(scores, groups, names, kinds, config)
    if config.whiten or (config.whiten is None and config.combine == "decoupled"):
        advantages = whiten(advantages, config.min_std)
    metrics = _metrics(scores, advantages, groups, names)
    return advantages.astype(np.float32), dict(state), metrics


def before_whitening(
    scores: np.ndarray, groups: Grouped, names: Sequence[str], kinds: Sequence[str], config: Objectives
) -> np.ndarray:
    """f64[S, R] -> f64[S]: advantages as far as each group decides them alone; NaN where no objective has a value."""
    signs = np.array([-1.0 if kind == "cost" else 1.0 for kind in kinds])
    weights = np.array([float(config.weights.get(name, 1.0)) for name in names])
    trained = ~np.isnan(scores).all(axis=1)
    return np.where(trained, COMBINERS[config.combine](scores * signs, groups, weights, config), np.nan)


def weighted_sum(rewards: np.ndarray, groups: Grouped, weights: np.ndarray, config: Objectives) -> np.ndarray:
    """A = s / (std_g s + eps) with s = sum_k w_k (r_k - mean_g r_k): GRPO (2402.03300, section 4.1.2) of the weighted
    sum; scale "none" leaves s as it is (Dr. GRPO, 2503.20783). f64[S, R] -> f64[S].

    A missing value is left out of its objective's mean and adds nothing to s. Samples that miss everything are left
    out of std_g.
    """
    s = np.asarray(centre(rewards, groups, config.baseline) @ weights)
    if config.scale == "none":
        return s
    known = np.where(np.isnan(rewards).all(axis=1), np.nan, s)
    spread = std(known, groups)[groups.index]
    return np.asarray(s / (np.maximum(spread, config.min_std) + EPS))


def decoupled(rewards: np.ndarray, groups: Grouped, weights: np.ndarray, config: Objectives) -> np.ndarray:
    """A = sum_k w_k (r_k - mean_g r_k) / (std_g r_k + eps): GDPO (2601.05242), before its whitening over the batch.
    f64[S, R] -> f64[S]. Each objective has its own scale, so that a rare one is not drowned by a wide one."""
    centred = centre(rewards, groups, config.baseline)
    if config.scale == "std":
        centred = centred / (np.maximum(std(rewards, groups), config.min_std)[groups.index] + EPS)
    return np.asarray(centred @ weights)


COMBINERS: dict[str, Combiner] = {"weighted_sum": weighted_sum, "decoupled": decoupled}


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
    unknown = sorted(set(config.weights) - set(names))
    if unknown:
        raise RecipeError(
            f"there is a weight for {unknown[0]!r}, which no reward of this stage gives",
            where="objectives.weights",
            remedy=f"the objectives here: {', '.join(names)}",
        )
    infinite = np.argwhere(np.isinf(scores))
    if infinite.size:
        sample, k = (int(i) for i in infinite[0])
        raise RewardError(
            f"the score of sample {sample} (group {int(group_ids[sample])}) on {names[k]!r} is {scores[sample, k]}",
            remedy="a reward that cannot be given is None, never infinite",
        )


def _metrics(scores: np.ndarray, advantages: np.ndarray, groups: Grouped, names: Sequence[str]) -> dict[str, float]:
    metrics: dict[str, float] = {}
    ranges = groups.ranges(scores)  # f64[G, R], NaN where a group has no value
    for k, name in enumerate(names):
        known = scores[~np.isnan(scores[:, k]), k]
        if known.size:
            metrics[f"objective/{name}/mean"] = float(known.mean())
            metrics[f"objective/{name}/std"] = float(known.std())
            present = ranges[~np.isnan(ranges[:, k]), k]
            metrics[f"objective/{name}/dead"] = float((present == 0).mean())
        if scores.shape[0]:
            metrics[f"objective/{name}/missing"] = 1.0 - known.size / scores.shape[0]
        correlation = _correlation(scores[:, k], advantages)
        if correlation is not None:
            metrics[f"objective/{name}/correlation"] = correlation
    trained = advantages[~np.isnan(advantages)]
    if trained.size:
        metrics["advantage/std"] = float(trained.std())
        signal = groups.sums(np.abs(np.nan_to_num(advantages)) > _NO_SIGNAL)
        metrics["advantage/dead_groups"] = float((signal == 0).mean())
    if scores.shape[0]:
        metrics["advantage/missing"] = 1.0 - trained.size / scores.shape[0]
    return metrics


def _correlation(scores: np.ndarray, advantages: np.ndarray) -> float | None:
    """Pearson's, over the samples that have both; None where one of them does not vary."""
    both = ~(np.isnan(scores) | np.isnan(advantages))
    x, y = scores[both], advantages[both]
    if x.size < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return None
    return float(np.corrcoef(x, y)[0, 1])
