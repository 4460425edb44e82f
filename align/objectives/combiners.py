"""Ways to combine objectives: those of every recipe here, and how one is found by `objectives.combine`.

A combiner is a function `(rewards, groups, weights, sigma, config) -> f64[S]`, a weight policy (`view.WeightPolicy`,
whose advantage is `linear`), or both: a policy that has `advantages`. Ours stand in the table of
`align.recipe.objectives`; a user's own is `file.py:NAME`, `package.module:NAME`, or a `file.py` that is a policy. It
says which options of `objectives` it reads in an attribute `reads`, and in `whiten` whether its advantages are
whitened over the batch where the recipe says nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from align.errors import PluginError
from align.objectives.groups import Grouped, centre, means, std
from align.objectives.users import OwnAdvantages, OwnPolicy
from align.objectives.view import WeightPolicy
from align.plugins import asked_in_child, is_users, of_ours, resolve
from align.recipe.objectives import COMBINERS, OPTIONS, Objectives

EPS = 1e-4

Advantages = Callable[[np.ndarray, Grouped, np.ndarray, np.ndarray, Objectives], np.ndarray]


@dataclass(frozen=True)
class Combiner:
    """advantages: rewards f64[S, R] (costs negated, NaN where missing), groups, weights f64[R] and sigma f64[R] ->
    f64[S]. policy: what makes the weights of the recipe's; None: they are taken as they are. whiten: where the recipe
    says nothing."""

    advantages: Advantages
    policy: WeightPolicy | None = None
    reads: tuple[str, ...] = ()
    whiten: bool = False


@lru_cache
def combiner_of(name: str) -> Combiner:
    """Raises PluginError where there is none of that name, or the user's is none."""
    if not is_users(name):
        facts = COMBINERS[name]
        made = _made(of_ours(facts.made_by), name)
        return Combiner(made.advantages, made.policy, facts.reads, facts.whiten)
    asked_in_child(f"{__name__}:described", name)
    return _of_user(name)


def described(name: str) -> dict[str, Any]:
    """What a user's combiner reads. It runs user code."""
    return {"reads": list(_of_user(name).reads)}


def _of_user(name: str) -> Combiner:
    found = resolve(name, group="align.objectives.combiners")
    reads, whiten = getattr(found, "reads", ()), getattr(found, "whiten", False)
    if not isinstance(reads, tuple | list) or not isinstance(whiten, bool):
        what = "`reads` of a combiner is a tuple of names, and `whiten` True or False"
        raise PluginError(what, where=name, remedy=f"options that it may read: {', '.join(OPTIONS)}")
    if unknown := [option for option in reads if option not in OPTIONS]:
        raise PluginError(
            f"`reads` names {unknown[0]!r}, which is no option of a combiner",
            where=name,
            remedy=f"options: {', '.join(OPTIONS)}",
        )
    made = _made(found, name)
    policy = None if made.policy is None else OwnPolicy(name, made.policy)
    return Combiner(OwnAdvantages(name, made.advantages), policy, tuple(reads), whiten)


def _made(found: Any, name: str) -> Combiner:
    policy = all(callable(getattr(found, part, None)) for part in ("advance", "weights", "metrics"))
    if policy and not isinstance(found, type):
        return Combiner(getattr(found, "advantages", linear), found)
    if not callable(found) or isinstance(found, type):
        raise PluginError(
            "a combiner is a function of (rewards, groups, weights, sigma, config), or has advance, weights and "
            f"metrics; this is a {type(found).__name__}",
            where=name,
            remedy="align/objectives/combiners.py and chebyshev.py are short examples",
        )
    return Combiner(found)


# ------------------------------------------------------------------------------------------------ ours


def weighted_sum(
    rewards: np.ndarray, groups: Grouped, weights: np.ndarray, sigma: np.ndarray, config: Objectives
) -> np.ndarray:
    """A = s / (std_g s + eps) with s = sum_k w_k (r_k - mean_g r_k): GRPO (2402.03300, section 4.1.2) of the weighted
    sum; scale "none" leaves s as it is (Dr. GRPO, 2503.20783); scale "mean" is s / mean_g sum_k w_k r_k (MaxRL,
    2602.02710: the gradient of log pass rate, expanded in the rate of failure up to the group's size - 1).
    f64[S, R] -> f64[S].

    A missing value is left out of its objective's mean and adds nothing to s. Samples that miss everything are left
    out of std_g.
    """
    s = np.asarray(centre(rewards, groups, config.baseline) @ weights)
    if config.scale == "none":
        return s
    if config.scale == "mean":
        return _over_mean(s, means(rewards, groups) @ weights, groups, config)
    known = np.where(np.isnan(rewards).all(axis=1), np.nan, s)
    spread = std(known, groups)[groups.index]
    return np.asarray(s / (np.maximum(spread, config.min_std) + EPS))


def decoupled(
    rewards: np.ndarray, groups: Grouped, weights: np.ndarray, sigma: np.ndarray, config: Objectives
) -> np.ndarray:
    """A = sum_k w_k (r_k - mean_g r_k) / (std_g r_k + eps): GDPO (2601.05242), before its whitening over the batch.
    f64[S, R] -> f64[S]. Each objective has its own scale, so that a rare one is not drowned by a wide one."""
    centred = centre(rewards, groups, config.baseline)
    if config.scale == "mean":
        centred = _over_mean(centred, means(rewards, groups), groups, config)
    if config.scale == "std":
        centred = centred / (np.maximum(std(rewards, groups), config.min_std)[groups.index] + EPS)
    return np.asarray(centred @ weights)


def _over_mean(centred: np.ndarray, mean: np.ndarray, groups: Grouped, config: Objectives) -> np.ndarray:
    """f64[S, ...] over f64[G, ...] of its group; 0 where that is not above 0, where nothing succeeded."""
    mean = mean[groups.index]
    return np.asarray(np.where(mean > 0, centred / np.maximum(mean, max(config.min_std, EPS)), 0.0))


def linear(
    rewards: np.ndarray, groups: Grouped, weights: np.ndarray, sigma: np.ndarray, config: Objectives
) -> np.ndarray:
    """A = sum_k w_k (r_k - mean_g r_k) / sigma_k: the advantage of every weight policy. f64[S, R] -> f64[S]."""
    return np.asarray(centre(rewards, groups, config.baseline) @ (weights / sigma))
