"""Gates and schedules: what counts in a sample, and how much at a step."""

from __future__ import annotations

import math

import numpy as np
import pytest
from pydantic import ValidationError

from align.objectives import combine
from align.recipe.objectives import Objectives

NAN = math.nan
NAMES = ["correct", "polite", "length"]
KINDS = ["reward", "reward", "cost"]


def run(scores, ids=None, step=0, **config):
    scores = np.array(scores, np.float64)
    ids = np.zeros(len(scores), np.int64) if ids is None else np.array(ids)
    return combine(scores, ids, NAMES, KINDS, Objectives.model_validate(config), {}, step)


def advantages(scores, **config):
    return run(scores, **config)[0].tolist()


PLAIN = {"scale": "none", "weights": {"length": 0}}


def test_a_masked_objective_is_missing_where_its_gate_is_closed_and_never_a_0():
    scores = [[1, 0.9, 0], [1, 0.5, 0], [0, 0.0, 0], [0, 1.0, 0]]
    gates = {"polite": {"when": "correct", "at_least": 1}}
    assert advantages(scores, gates=gates, **PLAIN) == pytest.approx([0.5 + 0.2, 0.5 - 0.2, -0.5, -0.5])
    missing = [[1, 0.9, 0], [1, 0.5, 0], [0, NAN, 0], [0, NAN, 0]]
    assert advantages(scores, gates=gates, **PLAIN) == advantages(missing, **PLAIN)


def test_a_floor_takes_the_place_of_the_score_before_the_mean_is_taken():
    scores = [[1, 0.9, 0], [1, 0.5, 0], [0, 0.7, 0], [0, 1.0, 0]]
    gates = {"polite": {"when": "correct", "at_least": 1, "otherwise": 0}}
    floored = [[1, 0.9, 0], [1, 0.5, 0], [0, 0, 0], [0, 0, 0]]
    assert advantages(scores, gates=gates, **PLAIN) == advantages(floored, **PLAIN)


def test_a_gate_opens_between_its_thresholds_in_the_sign_of_the_objective_it_looks_at():
    scores = [[0, 0, 10], [0, 1, 10], [0, 2, 20], [0, 9, 21], [0, 9, 9]]
    gates = {"polite": {"when": "length", "at_least": 10, "at_most": 20}}
    got = advantages(scores, gates=gates, scale="none", weights={"length": 0, "correct": 0})
    assert got == [-1, 0, 1, 0, 0]


@pytest.mark.parametrize("otherwise", ["mask", 0.0])
def test_where_the_judge_of_a_gate_is_missing_the_gated_score_is_missing_too(otherwise):
    gates = {"polite": {"when": "correct", "at_least": 1, "otherwise": otherwise}}
    scores = [[1, 0.8, 0], [1, 0.4, 0], [NAN, 0.9, 0]]
    assert advantages(scores, gates=gates, **PLAIN) == pytest.approx([0.2, -0.2, 0.0])


def test_a_missing_score_is_not_floored():
    gates = {"polite": {"when": "correct", "at_least": 1, "otherwise": 0}}
    scores = [[1, 0.8, 0], [1, 0.4, 0], [0, NAN, 0]]
    got = advantages(scores, gates=gates, scale="none", weights={"length": 0, "correct": 0})
    assert got == pytest.approx([0.2, -0.2, 0.0])


def test_a_sample_whose_every_objective_is_gated_out_is_not_trained():
    gates = {name: {"when": "length", "at_most": 10} for name in ("correct", "polite")}
    got = advantages([[1, 1, 5], [0, 0, 5], [1, 1, NAN]], gates=gates)
    assert math.isnan(got[2]) and got[0] > 0


def test_gates_follow_one_another():
    """length counts where the answer is polite, politeness where it is correct, in whatever order they are given."""
    gates = {"length": {"when": "polite", "at_least": 0.5}, "polite": {"when": "correct", "at_least": 1}}
    scores = [[1, 1, 10], [1, 1, 20], [1, 0, 99], [0, 1, 99]]
    expected = advantages([[1, 1, 10], [1, 1, 20], [1, 0, NAN], [0, NAN, NAN]], scale="none")
    assert advantages(scores, gates=gates, scale="none") == expected
    assert advantages(scores, gates=dict(reversed(gates.items())), scale="none") == expected


def test_the_log_has_what_rewards_gave_and_how_much_of_it_was_gated():
    gates = {"polite": {"when": "correct", "at_least": 1}}
    scores = [[1, 0.5, 0], [1, 0.5, 0], [0, 0.1, 0], [0, 0.9, 0]]
    _, _, metrics = run(scores, gates=gates)
    assert metrics["objective/polite/mean"] == 0.5 and metrics["objective/polite/missing"] == 0.0
    assert metrics["objective/polite/gated"] == 0.5 and "objective/correct/gated" not in metrics
    assert metrics["objective/polite/dead"] == 1.0  # of what is left, all are equal


def test_a_constrained_mean_is_over_what_the_gate_lets_through():
    config = {
        "combine": "lagrangian",
        "constraints": {"length": {"max": 8}},
        "gates": {"length": {"when": "correct", "at_least": 1}},
    }
    _, _, metrics = run([[1, 0, 10], [1, 0, 12], [0, 0, 500], [0, 0, 900]], **config)
    assert metrics["constraint/length/value"] == pytest.approx(11)


def test_a_scheduled_weight_is_linear_between_its_points_and_constant_beyond():
    schedule = {"polite": [[10, 0.0], [20, 1.0], [30, 0.5]]}
    at = {0: 0.0, 10: 0.0, 15: 0.5, 20: 1.0, 24: 0.8, 30: 0.5, 1000: 0.5}
    for step, weight in at.items():
        got, _, metrics = run([[0, 1, 0], [0, 0, 0]], step=step, schedule=schedule, scale="none")
        assert metrics["objective/polite/weight"] == pytest.approx(weight)
        assert got.tolist() == pytest.approx([weight / 2, -weight / 2])


def test_a_point_alone_is_a_constant():
    assert run([[0, 1, 0]], schedule={"polite": [[5, 0.3]]})[2]["objective/polite/weight"] == 0.3


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"gates": {"a": {"when": "a", "at_least": 1}}}, "a when a"),
        ({"gates": {"a": {"when": "b", "at_least": 1}, "b": {"when": "a", "at_most": 1}}}, "a when b when a"),
        ({"gates": {"a": {"when": "b"}}}, "`at_least` or `at_most`"),
        ({"gates": {"a": {"when": "b", "at_least": 2, "at_most": 1}}}, "no score is at least 2 and at most 1"),
        ({"schedule": {"a": [[10, 0], [10, 1]]}}, r"increase: \[10, 10\]"),
        ({"schedule": {"a": [[-1, 0]]}}, "0 or more"),
        ({"schedule": {"a": []}}, "at least 1"),
        ({"schedule": {"a": [[0, -1]]}}, "greater than or equal to 0"),
        ({"schedule": {"a": [[0, 1]]}, "weights": {"a": 1}}, "'a' has a constant weight and a schedule"),
        ({"constraints": {"a": {"max": 1}}}, "belongs to `combine: lagrangian`; here it is weighted_sum"),
        ({"combine": "lagrangian"}, "needs `constraints`"),
        ({"combine": "lagrangian", "constraints": {"a": {}}}, "one limit: give `max`"),
        ({"combine": "lagrangian", "constraints": {"a": {"max": 1, "min": 0}}}, "one limit"),
        ({"combine": "lagrangian", "constraints": {"a": {"max": math.nan}}}, "finite"),
        ({"combine": "decoupled", "mu": 0.5}, "`mu` belongs to `combine: chebyshev`"),
        ({"combine": "lagrangian", "constraints": {"a": {"max": 1}}, "reference_point": {"a": 1}}, "hypervolume"),
    ],
)  # fmt: skip
def test_what_contradicts_itself_is_refused(config, said):
    with pytest.raises(ValidationError, match=said):
        Objectives.model_validate(config)
