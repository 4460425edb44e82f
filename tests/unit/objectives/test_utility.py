"""A policy that can be solved exactly: softmax over a few actions. The update under each weight policy is the gradient
of its utility, and the Lagrangian's loop ends where the linear programme does."""

from __future__ import annotations

import math

import numpy as np
import pytest

from align.objectives import combine
from align.recipe.objectives import Objectives

COUNTS = np.array([8, 4, 3, 1])  # of each action in a group: exactly 16 times its probability
PI = COUNTS / COUNTS.sum()
REWARD = np.array([0.1, 0.7, 0.4, 1.0])
COST = np.array([0.3, 2.0, 1.0, 4.0])
NAMES, KINDS = ["reward", "cost"], ["reward", "cost"]


def softmax(theta):
    weights = np.exp(theta - theta.max())
    return weights / weights.sum()


def expected_update(config, state):
    """E[A grad log pi] over one group that has every action as often as the policy takes it, and the state after."""
    actions = np.repeat(np.arange(4), COUNTS)
    scores = np.stack([REWARD[actions], COST[actions]], axis=1)
    got, state, _ = combine(scores, np.zeros(16, np.int64), NAMES, KINDS, config, state, 0)
    return (np.eye(4)[actions] - PI).T @ got.astype(np.float64) / 16, state


def means(theta):
    pi = softmax(theta)
    return pi @ REWARD, pi @ COST


def spread(scale):
    """Of each objective in the group, the unit of everything."""
    actions = np.repeat(np.arange(4), COUNTS)
    return [float(v[actions].std(ddof=1)) + 1e-4 if scale == "std" else 1.0 for v in (REWARD, COST)]


def lagrangian_utility(config, state, sigma, theta):
    r, c = means(theta)
    return r / sigma[0] - state["lambda"]["cost"] * c / sigma[1]


def chebyshev_utility(config, state, sigma, theta):
    (r, c), point, mu = means(theta), config.reference_point, config.mu
    gaps = ((point["reward"] - r) / sigma[0], 2.0 * (c - point["cost"]) / sigma[1])
    return -mu * math.log(sum(math.exp(gap / mu) for gap in gaps))


def hypervolume_utility(config, state, sigma, theta):
    """The area that the mean adds to the two points that the state had, of which neither beats the other."""
    (r, c), point = means(theta), config.reference_point
    own = ((r - point["reward"]) / sigma[0], (point["cost"] - c) / sigma[1])
    area = own[0] * own[1]
    old = [((a - point["reward"]) / sigma[0], (point["cost"] - b) / sigma[1]) for a, b in ARCHIVED]
    covered = [(min(own[0], a), min(own[1], b)) for a, b in old]
    both = min(covered[0][0], covered[1][0]) * min(covered[0][1], covered[1][1])
    return area - sum(a * b for a, b in covered) + both


ARCHIVED = [(0.2, 0.4), (0.6, 1.9)]
UTILITIES = {
    "lagrangian": (
        {"weights": {"reward": 1}, "constraints": {"cost": {"max": 0.5, "lr": 0.8}}},
        lagrangian_utility,
    ),
    "chebyshev": (
        {"weights": {"cost": 2.0}, "reference_point": {"reward": 1.0, "cost": 0.2}, "mu": 0.7},
        chebyshev_utility,
    ),
    "hypervolume": ({"reference_point": {"reward": 0.0, "cost": 5.0}}, hypervolume_utility),
}


@pytest.mark.parametrize("baseline", ["group", "leave_one_out"])
@pytest.mark.parametrize("scale", ["std", "none"])
@pytest.mark.parametrize("name", UTILITIES)
def test_the_expected_update_is_the_gradient_of_the_utility(name, scale, baseline):
    settings, utility = UTILITIES[name]
    config = Objectives.model_validate({"combine": name, "scale": scale, "baseline": baseline, **settings})
    before = {"archive": [{"reward": r, "cost": c} for r, c in ARCHIVED]} if name == "hypervolume" else {}
    update, state = expected_update(config, before)
    theta, sigma = np.log(PI), spread(scale)
    slopes = [
        (utility(config, state, sigma, theta + e) - utility(config, state, sigma, theta - e)) / 2e-6
        for e in 1e-6 * np.eye(4)
    ]
    cosine = update @ slopes / np.linalg.norm(update) / np.linalg.norm(slopes)
    assert cosine == pytest.approx(1.0, abs=1e-6)


def test_divided_by_each_groups_own_deviation_it_would_not_be():
    """Why utilities have a running unit: of two prompts, the second has costs of a twentieth, which `decoupled` takes
    for as much as the first's."""
    actions, ids = np.tile(np.repeat(np.arange(4), COUNTS), 2), np.repeat([0, 1], 16)
    prices = [COST, COST / 20]
    scores = np.stack([REWARD[actions], np.concatenate([p[actions[:16]] for p in prices])], axis=1)
    gradient = np.concatenate([PI * ((REWARD - PI @ REWARD) - 0.4 * (p - PI @ p)) for p in prices])
    limited = {"cost": {"max": 0, "lr": 9, "lambda_max": 0.4}}
    cosines = {}
    for config in (
        Objectives(combine="decoupled", weights={"cost": 0.4}, whiten=False),
        Objectives.model_validate({"combine": "lagrangian", "scale": "none", "constraints": limited}),
    ):
        got, _, _ = combine(scores, ids, NAMES, KINDS, config, {}, 0)
        update = np.concatenate([(np.eye(4)[actions[:16]] - PI).T @ got[ids == g] / 16 for g in (0, 1)])
        cosines[config.combine] = update @ gradient / np.linalg.norm(update) / np.linalg.norm(gradient)
    assert cosines["lagrangian"] == pytest.approx(1.0, abs=1e-6)
    assert cosines["decoupled"] < 0.6


# ------------------------------------------------------------------------------------------------ the loop


RETURNS, PRICES, LIMIT = np.array([1.0, 0.6, 0.2, 0.0]), np.array([1.0, 0.5, 0.1, 0.0]), 0.3


def loop(scale, entropy, steps=900, proportional=0.0):
    """Sampled groups, the recipe's combine and the gradient step of a softmax: the policy's reward and cost, lambda."""
    constraint = {"max": LIMIT, "lr": 0.05, "proportional": proportional}
    limited = {"combine": "lagrangian", "constraints": {"cost": constraint}}
    config = Objectives.model_validate({**limited, "scale": scale, "baseline": "leave_one_out"})
    random, theta, state, path, ids = np.random.default_rng(0), np.zeros(4), {}, [], np.repeat(np.arange(16), 8)
    for step in range(steps):
        pi = softmax(theta)
        actions = random.choice(4, size=len(ids), p=pi)
        scores = np.stack([RETURNS[actions], PRICES[actions]], axis=1)
        got, state, metrics = combine(scores, ids, NAMES, KINDS, config, state, step)
        gradient = (np.eye(4)[actions] - pi).T @ got / len(ids)
        theta += 0.3 * (gradient - entropy * pi * (np.log(pi) - pi @ np.log(pi)))
        path.append((pi @ RETURNS, pi @ PRICES, metrics["constraint/cost/lambda"]))
    return np.array(path)


def test_the_lagrangians_loop_ends_at_the_optimum_of_the_linear_programme():
    """Best under a mean cost of 0.3: half of the action that costs 0.1 and half of that of 0.5, a reward of 0.4; the
    best action alone costs 1. Policy and multiplier circle around a saddle, so it is their mean that ends there."""
    reward, cost, _ = loop("std", entropy=0.0)[300:].mean(axis=0)
    assert reward == pytest.approx(0.4, abs=0.015) and cost == pytest.approx(LIMIT, abs=0.015)


def test_a_proportional_term_calms_the_swing_around_the_limit():
    swinging, calm = (loop("std", entropy=0.0, proportional=gain)[300:, 1] for gain in (0.0, 1.0))
    assert calm.std() < 0.5 * swinging.std()
    assert calm.mean() == pytest.approx(LIMIT, abs=0.015)


def test_with_an_entropy_bonus_the_last_policy_itself_is_the_optimum():
    """pi ~ exp((r - lambda c) / (1 + lambda) / entropy), with the lambda at which its cost is the limit."""
    entropy, low, high = 0.05, 0.0, 10.0
    for _ in range(60):
        middle = (low + high) / 2
        pi = softmax((RETURNS - middle * PRICES) / (1 + middle) / entropy)
        low, high = (middle, high) if pi @ PRICES > LIMIT else (low, middle)
    reward, cost, multiplier = loop("none", entropy, steps=1500)[-500:].mean(axis=0)
    assert reward == pytest.approx(pi @ RETURNS, abs=0.01) and cost == pytest.approx(LIMIT, abs=0.01)
    assert multiplier == pytest.approx(middle, abs=0.1)


def test_a_limit_that_does_not_bind_leaves_the_reward_alone():
    config = Objectives.model_validate({"combine": "lagrangian", "constraints": {"cost": {"max": 5.0}}})
    plain = Objectives.model_validate(
        {"combine": "lagrangian", "weights": {"reward": 1}, "constraints": {"cost": {"max": 9}}}
    )
    assert np.array_equal(expected_update(config, {})[0], expected_update(plain, {})[0])
    assert expected_update(config, {})[1]["lambda"] == {"cost": 0.0}
