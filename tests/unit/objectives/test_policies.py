"""Lagrangian, Chebyshev and hypervolume: an oracle in plain floats that knows the formulas and nothing of the code."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest

from align.objectives import combine
from align.objectives.hypervolume import ARCHIVE, faces, gain, not_dominated
from align.objectives.pareto import hypervolume as volume
from align.recipe.objectives import Objectives

NAN = math.nan
NAMES = ["correct", "length", "polite"]
KINDS = ["reward", "cost", "reward"]
SIGNS = [1.0, -1.0, 1.0]

LAGRANGIAN = {
    "combine": "lagrangian",
    "weights": {"correct": 1.5},
    "constraints": {"length": {"max": 0.2, "lr": 0.7, "lambda_max": 2.0}, "polite": {"min": 0.5, "lr": 0.4}},
}
CHEBYSHEV = {"combine": "chebyshev", "weights": {"polite": 0.5}, "reference_point": {"correct": 0.8}, "mu": 0.3}
HYPERVOLUME = {"combine": "hypervolume", "reference_point": {"correct": -1.5, "length": 1.5, "polite": -1.5}}
CONFIGS = [LAGRANGIAN, CHEBYSHEV, HYPERVOLUME]
IDS = ["lagrangian", "chebyshev", "hypervolume"]


def steps(count: int, seed: int = 0, missing: float = 0.15):
    """Tables of ragged groups with values missing: the mean of each objective wanders."""
    random = np.random.default_rng(seed)
    for step in range(count):
        ids = random.integers(0, 5, int(random.integers(6, 24)))
        scores = random.normal(size=(len(ids), 3)) + 0.3 * np.sin(step + np.arange(3)) + [0.1 * step, 0.2, 0.0]
        scores[random.random(scores.shape) < missing] = NAN
        yield step, scores.astype(np.float32).astype(np.float64).tolist(), ids.tolist()


def run(config, step, scores, ids, state):
    return combine(np.array(scores), np.array(ids), NAMES, KINDS, config, state, step)


# ------------------------------------------------------------------------------------------------ the oracle


def known(scores, k, members=None):
    return [s[k] for i, s in enumerate(scores) if not math.isnan(s[k]) and (members is None or i in members)]


def mean(values):
    return math.fsum(values) / len(values)


def boxes(points, reference):
    """Hypervolume by inclusion and exclusion over all subsets."""
    total = 0.0
    for size in range(1, len(points) + 1):
        for chosen in itertools.combinations(points, size):
            sides = [max(0.0, min(p[k] for p in chosen) - r) for k, r in enumerate(reference)]
            total += (-1) ** (size + 1) * math.prod(sides)
    return total


class Oracle:
    """One run, step after step."""

    def __init__(self, config):
        self.config, self.seen = config, {"means": [[], [], []], "variances": [[], [], []]}
        self.multipliers, self.best, self.archive = [0.0, 0.0, 0.0], [-math.inf] * 3, []

    def average(self, kind, k):
        """An even average of the first ten, then exponential."""
        found = None
        for n, value in enumerate(self.seen[kind][k]):
            rate = max(1 - self.config.decay, 1 / (n + 1))
            found = value if found is None else found + rate * (value - found)
        return found

    def step(self, scores, ids):
        groups = [[i for i, g in enumerate(ids) if g == name] for name in sorted(set(ids))]
        for k in range(3):
            parts = [known(scores, k, members) for members in groups]
            parts = [part for part in parts if part]
            freedom = sum(len(part) - 1 for part in parts)
            self.seen["means"][k].append(mean(known(scores, k)))
            self.seen["variances"][k].append(math.fsum((v - mean(p)) ** 2 for p in parts for v in p) / freedom)
        sigma = [1.0, 1.0, 1.0]
        if self.config.scale == "std":
            sigma = [max(math.sqrt(self.average("variances", k)), self.config.min_std) + 1e-4 for k in range(3)]
        j = [SIGNS[k] * self.average("means", k) for k in range(3)]
        weights = getattr(self, self.config.combine)(j, sigma, scores)
        out = []
        for i, row in enumerate(scores):
            group = next(members for members in groups if i in members)
            terms = [
                weights[k] * SIGNS[k] * (row[k] - mean(known(scores, k, group))) / sigma[k]
                for k in range(3)
                if not math.isnan(row[k])
            ]
            out.append(math.fsum(terms) if terms else NAN)
        return out, weights

    def lagrangian(self, j, sigma, scores):
        for k, sense in ((1, 1), (2, -1)):
            constraint = self.config.constraints[NAMES[k]]
            excess = sense * (mean(known(scores, k)) - constraint.limit) / sigma[k]
            self.multipliers[k] = min(max(0.0, self.multipliers[k] + constraint.lr * excess), constraint.lambda_max)
        # length: a cost, so less of it is the reward; polite: a reward that must stay above
        return [w / (1 + sum(self.multipliers)) for w in (1.5, self.multipliers[1], self.multipliers[2])]

    def chebyshev(self, j, sigma, scores):
        self.best = [max(b, now) for b, now in zip(self.best, j, strict=True)]
        ideal, w, mu = [0.8, self.best[1], self.best[2]], [1.0, 1.0, 0.5], self.config.mu
        parts = [math.exp(w[k] * (ideal[k] - j[k]) / sigma[k] / mu) for k in range(3)]
        return [w[k] * parts[k] / sum(parts) for k in range(3)]

    def hypervolume(self, j, sigma, scores):
        reference = [SIGNS[k] * self.config.reference_point[NAMES[k]] for k in range(3)]
        others = [p for p in self.archive if not (all(a >= b for a, b in zip(p, j, strict=True)) and p != j)]
        slopes = []
        for k in range(3):
            ahead = [j[m] + (1e-6 if m == k else 0.0) for m in range(3)]
            slopes.append(sigma[k] * (boxes([*others, ahead], reference) - boxes([*others, j], reference)) / 1e-6)
        beaten = [p for p in self.archive if all(a <= b for a, b in zip(p, j, strict=True))]
        if len(others) == len(self.archive):
            self.archive = [p for p in self.archive if p not in beaten] + [j]
        return [s / sum(slopes) for s in slopes]


@pytest.mark.parametrize("scale", ["std", "none"])
@pytest.mark.parametrize("settings", CONFIGS, ids=IDS)
def test_every_policy_equals_the_oracle_step_after_step_on_ragged_groups_with_missing_values(settings, scale):
    config = Objectives.model_validate({**settings, "scale": scale})
    oracle, state, spread = Oracle(config), {}, []
    for step, scores, ids in steps(14):
        got, state, metrics = run(config, step, scores, ids, state)
        want, weights = oracle.step(scores, ids)
        tolerance = {"rtol": 1e-4, "atol": 1e-5} if config.combine == "hypervolume" else {"rtol": 1e-5, "atol": 1e-6}
        np.testing.assert_allclose([metrics[f"objective/{n}/weight"] for n in NAMES], weights, **tolerance)
        np.testing.assert_allclose(got, want, **tolerance)
        spread.append(weights)
    assert np.ptp(np.array(spread), axis=0).max() > 0.05  # they did move


@pytest.mark.parametrize("settings", CONFIGS, ids=IDS)
def test_a_state_that_went_through_a_checkpoint_goes_on_bit_for_bit(settings):
    config = Objectives.model_validate(settings)
    straight: dict = {}
    stored: dict = {}
    for step, scores, ids in steps(12, seed=4):
        one, straight, told = run(config, step, scores, ids, straight)
        two, stored, again = run(config, step, scores, ids, json.loads(json.dumps(stored, allow_nan=False)))
        assert one.tobytes() == two.tobytes() and told == again
    assert json.loads(json.dumps(stored)) == straight


@pytest.mark.parametrize("settings", CONFIGS, ids=IDS)
def test_the_order_of_objectives_and_samples_means_nothing(settings):
    config = Objectives.model_validate(settings)
    state: dict = {}
    turned: dict = {}
    for step, scores, ids in steps(6, seed=2):
        table, ids = np.array(scores), np.array(ids)
        order = np.random.default_rng(step).permutation(len(ids))
        one, state, _ = combine(table, ids, NAMES, KINDS, config, state, step)
        two, turned, _ = combine(table[order][:, ::-1], ids[order], NAMES[::-1], KINDS[::-1], config, turned, step)
        np.testing.assert_allclose(one[order], two, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------ each of them


def only(config, means, state, step=0):
    """Weights after a step in which each objective has this mean and both scores are 1 apart."""
    scores = np.array(means) + np.array([[-0.5], [0.5]])
    _, state, metrics = combine(scores, np.zeros(2, np.int64), NAMES, KINDS, config, state, step)
    return [metrics[f"objective/{n}/weight"] for n in NAMES], state, metrics


def test_a_multiplier_rises_while_its_limit_is_broken_falls_while_it_is_kept_and_stays_within_bounds():
    config = Objectives.model_validate(
        {"combine": "lagrangian", "scale": "none", "constraints": {"length": {"max": 40, "lr": 0.5, "lambda_max": 3}}}
    )
    state, lambdas = {}, []
    for mean_length in (42, 44, 50, 41, 39, 30):
        weights, state, metrics = only(config, [0.0, mean_length, 0.0], state)
        lambdas.append(metrics["constraint/length/lambda"])
        assert metrics["constraint/length/value"] == pytest.approx(mean_length)
        assert metrics["constraint/length/limit"] == 40
        total = 1 + lambdas[-1]
        assert weights == pytest.approx([1 / total, lambdas[-1] / total, 1 / total])
    assert lambdas == pytest.approx([1.0, 3.0, 3.0, 3.0, 2.5, 0.0])


def test_a_proportional_term_is_added_in_its_step_alone_and_stays_within_the_same_bounds():
    constraint = {"max": 40, "lr": 0.5, "proportional": 2.0, "lambda_max": 8}
    config = Objectives.model_validate(
        {"combine": "lagrangian", "scale": "none", "constraints": {"length": constraint}}
    )
    state, lambdas = {}, []
    for mean_length in (42, 41, 39, 50):
        weights, state, metrics = only(config, [0.0, mean_length, 0.0], state)
        lambdas.append(metrics["constraint/length/lambda"])
        assert weights[1] == pytest.approx(lambdas[-1] / (1 + lambdas[-1]))
    assert lambdas == pytest.approx([1 + 4, 1.5 + 2, 0.0, 8.0])
    assert state["lambda"]["length"] == pytest.approx(1.0 + 5.0)


def test_a_reward_may_be_held_below_a_limit_and_a_cost_above_one():
    config = Objectives.model_validate(
        {
            "combine": "lagrangian",
            "scale": "none",
            "constraints": {"polite": {"max": 1, "lr": 1}, "length": {"min": 5, "lr": 1}},
        }
    )
    weights, _, metrics = only(config, [0.0, 4.0, 3.0], {})
    assert metrics["constraint/polite/lambda"] == 2 and metrics["constraint/length/lambda"] == 1
    assert weights == pytest.approx([1 / 4, -1 / 4, -2 / 4])  # of rewards: a cost that must grow is a negative one


def test_a_step_without_a_value_of_a_constrained_objective_leaves_its_multiplier():
    config = Objectives.model_validate({"combine": "lagrangian", "constraints": {"length": {"max": 0, "lr": 1}}})
    _, state, before = only(config, [0, 3, 0], {})
    _, after, metrics = only(config, [0, NAN, 0], state)
    assert metrics["constraint/length/lambda"] == before["constraint/length/lambda"] > 0
    assert "constraint/length/value" not in metrics
    assert after["running"]["length"] == state["running"]["length"]


def test_chebyshev_gives_its_weight_to_the_objective_that_lags_most():
    ideal = {"correct": 1.0, "length": 0.0, "polite": 1.0}
    config = Objectives.model_validate(
        {"combine": "chebyshev", "scale": "none", "reference_point": ideal, "mu": 0.01, "decay": 0.0}
    )
    for lagging, means in enumerate(([0.1, 0.5, 0.5], [0.5, 0.9, 0.5], [0.5, 0.5, 0.1])):
        weights, _, metrics = only(config, means, {})
        assert weights == pytest.approx([float(k == lagging) for k in range(3)], abs=1e-6)
        assert metrics["chebyshev/utility"] == pytest.approx(-0.9, abs=1e-3)


def test_an_ideal_that_is_not_given_is_the_best_so_far():
    config = Objectives.model_validate({"combine": "chebyshev", "scale": "none", "mu": 0.05, "decay": 0.0})
    _, state, _ = only(config, [1.0, 2.0, 1.0], {})
    weights, state, metrics = only(config, [0.4, 1.0, 1.5], state)
    assert metrics["reference_point/correct"] == pytest.approx(1.0)
    assert metrics["reference_point/length"] == pytest.approx(1.0)  # a cost: its least
    assert metrics["reference_point/polite"] == pytest.approx(1.5)
    assert weights[0] > 0.99


def test_an_objective_of_weight_0_is_no_part_of_a_utility():
    for settings in (CHEBYSHEV, HYPERVOLUME):
        config = Objectives.model_validate({**settings, "weights": {"length": 0.0}})
        weights, state, _ = only(config, [0.0, 1.0, 0.2], {})
        assert weights[1] == 0.0 and weights[0] > 0 and weights[2] > 0
        assert all("length" not in point for point in state.get("archive", []))


def test_hypervolume_of_one_point_weighs_each_objective_by_the_gaps_of_the_others():
    config = Objectives.model_validate(
        {"combine": "hypervolume", "scale": "none", "reference_point": {"correct": 0, "length": 10, "polite": 0}}
    )
    weights, state, metrics = only(config, [2.0, 6.0, 1.0], {})  # gaps 2, 4, 1
    assert weights == pytest.approx([4 / 14, 2 / 14, 8 / 14])
    assert metrics["hypervolume/value"] == pytest.approx(8.0) and metrics["hypervolume/archive"] == 1
    assert state["archive"] == [{"correct": 2.0, "length": 6.0, "polite": 1.0}]


def test_before_the_reference_point_is_passed_the_way_leads_to_it():
    config = Objectives.model_validate(
        {"combine": "hypervolume", "scale": "none", "reference_point": {"correct": 0, "length": 10, "polite": 0}}
    )
    weights, state, metrics = only(config, [-3.0, 11.0, 2.0], {})
    assert weights == pytest.approx([3 / 4, 1 / 4, 0.0])
    assert state["archive"] == [] and metrics["hypervolume/value"] == 0


def test_a_mean_that_fell_behind_its_own_past_still_grows_in_every_objective():
    config = Objectives.model_validate(
        {
            "combine": "hypervolume",
            "scale": "none",
            "decay": 0.0,
            "reference_point": {"correct": 0, "length": 10, "polite": 0},
        }
    )
    _, state, before = only(config, [2.0, 6.0, 1.0], {})
    weights, state, after = only(config, [1.9, 6.1, 0.9], state)
    assert min(weights) > 0.1 and after["hypervolume/value"] == before["hypervolume/value"]


@pytest.mark.parametrize("size", [2, 3, 4])
def test_volume_and_its_faces_are_those_of_inclusion_and_exclusion(size):
    random = np.random.default_rng(size)
    for _ in range(20):
        points, point = random.uniform(-0.2, 1, (7, size)), random.uniform(0.3, 1, size)
        reference = np.zeros(size)
        assert volume(not_dominated(points), reference) == pytest.approx(boxes(points.tolist(), reference.tolist()))
        assert gain(point, points, reference) == pytest.approx(
            boxes([*points.tolist(), point.tolist()], reference) - boxes(points.tolist(), reference.tolist()), abs=1e-12
        )
        slopes = [
            (gain(point + 1e-6 * e, points, reference) - gain(point, points, reference)) / 1e-6 for e in np.eye(size)
        ]
        assert faces(point, points, reference) == pytest.approx(slopes, abs=1e-5)


def test_an_archive_keeps_its_size_and_the_points_that_add_most():
    config = Objectives.model_validate(
        {
            "combine": "hypervolume",
            "scale": "none",
            "decay": 0.0,
            "weights": {"polite": 0},
            "reference_point": {"correct": 0, "length": 0},
        }
    )
    state: dict = {}
    for angle in np.linspace(0.05, 1.5, ARCHIVE + 8):
        _, state, metrics = only(config, [math.cos(angle), -math.sin(angle), 0.0], state)
    assert metrics["hypervolume/archive"] == ARCHIVE == len(state["archive"])
    assert math.pi / 4 * 0.95 < metrics["hypervolume/value"] < math.pi / 4


@pytest.mark.parametrize("settings", [{}, *CONFIGS, {"schedule": {"polite": [[0, 0.0], [9, 1.0]]}}])
def test_a_resolved_copy_that_spells_every_default_out_is_the_same_settings(settings):
    config = Objectives.model_validate(settings)
    assert Objectives.model_validate(json.loads(config.model_dump_json())) == config
