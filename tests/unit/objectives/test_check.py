"""What cannot work with the objectives of a stage is found before it starts, with its place and a remedy."""

from __future__ import annotations

import pytest

from align.objectives.check import Known, problems
from align.recipe.objectives import Objectives

KNOWN = {
    "correct": Known("reward", (0.0, 1.0)),
    "length": Known("cost", (0.0, 512.0)),
    "polite": Known("reward", (-5.0, 5.0)),
    "free": Known("reward"),
}
LAGRANGIAN = {"combine": "lagrangian", "weights": {"correct": 1}}
POINTS = {"correct": 0, "length": 512, "polite": -5, "free": -1}


def found(config, known=KNOWN):
    return problems(Objectives.model_validate(config), known)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"combine": "decoupled", "weights": {"correct": 0, "free": 3}},
        {
            **LAGRANGIAN,
            "constraints": {"length": {"max": 40, "lr": 0.05, "lambda_max": 10}},
            "gates": {"polite": {"when": "correct", "at_least": 1, "otherwise": "mask"}},
            "schedule": {"polite": [[0, 0.0], [200, 0.5]]},
            "min_std": 0.01,
            "whiten": True,
        },
        {**LAGRANGIAN, "constraints": {"length": {"max": 0}, "polite": {"min": 5}, "free": {"min": -1e9}}},
        {"combine": "chebyshev", "reference_point": {"correct": 1, "length": 0}},
        {"combine": "hypervolume", "reference_point": POINTS},
        {"combine": "hypervolume", "weights": {"free": 0}, "reference_point": {**POINTS, "free": 9}},
        {"gates": {"polite": {"when": "length", "at_most": 100, "otherwise": -5}}},
        {"gates": {"polite": {"when": "correct", "at_least": 1, "otherwise": -9}}},
        {"scale": "mean", "weights": {"length": 0, "polite": 0, "free": 0}},
    ],
)
def test_what_works_is_not_complained_about(config):
    assert found(config) == []


@pytest.mark.parametrize(
    ("config", "where", "what", "remedy"),
    [
        ({"weights": {"corect": 1}}, "weights.corect", "'corect', which no reward", "did you mean `correct`?"),
        ({"schedule": {"x": [[0, 1]]}}, "schedule.x", "no reward", "objectives here: correct, length, polite, free"),
        ({"gates": {"polit": {"when": "correct", "at_least": 1}}}, "gates.polit", "no reward", "`polite`"),
        ({"gates": {"polite": {"when": "lenght", "at_most": 1}}}, "gates.polite.when", "'lenght'", "`length`"),
        ({**LAGRANGIAN, "constraints": {"leng": {"max": 1}}}, "constraints.leng", "'leng'", "`length`"),
        ({"combine": "chebyshev", "reference_point": {"fre": 1}}, "reference_point.fre", "'fre'", "`free`"),
        ({**LAGRANGIAN, "constraints": {"length": {"max": 600}}}, "constraints.length.max", "always met", "[0, 512]"),
        ({**LAGRANGIAN, "constraints": {"length": {"max": 512}}}, "constraints.length.max", "always met", "inside"),
        ({**LAGRANGIAN, "constraints": {"length": {"max": -40}}}, "constraints.length.max", "never be met", "own sign"),
        ({**LAGRANGIAN, "constraints": {"polite": {"min": 6}}}, "constraints.polite.min", "never be met", "[-5, 5]"),
        ({**LAGRANGIAN, "constraints": {"polite": {"min": -5}}}, "constraints.polite.min", "always met", "[-5, 5]"),
        ({"gates": {"free": {"when": "correct", "at_least": 2}}}, "gates.free", "never opens", "'correct'"),
        ({"scale": "mean", "weights": {"polite": 0, "free": 0}}, "scale", "'length' is a cost", "give it no weight"),
        ({"scale": "mean", "weights": {"length": 0, "polite": 0}}, "scale", "'free' may be below 0", "declare a range"),
        ({"gates": {"free": {"when": "correct", "at_least": 0}}}, "gates.free", "always open", "leave the gate out"),
        (
            {"gates": {"polite": {"when": "correct", "at_least": 1, "otherwise": 9}}},
            "gates.polite.otherwise",
            "better than its best score 5",
            "mask",
        ),
        (
            {"gates": {"length": {"when": "correct", "at_least": 1, "otherwise": -1}}},
            "gates.length.otherwise",
            "better than its best score 0",
            "mask",
        ),
        ({"weights": dict.fromkeys(KNOWN, 0)}, "weights", "every weight is 0", "give one of them a weight"),
        (
            {"combine": "lagrangian", "weights": dict.fromkeys(KNOWN, 0), "constraints": {"length": {"max": 4}}},
            "weights",
            "nothing is left to maximise",
            "NAME",
        ),
        (
            {"combine": "chebyshev", "weights": {"length": 0, "polite": 0, "free": 0}},
            "combine",
            "only 'correct' has a weight",
            "weighted_sum",
        ),
        (
            {"combine": "chebyshev", "reference_point": {"correct": -1}},
            "reference_point.correct",
            "better than its ideal -1",
            "such as 1",
        ),
        (
            {"combine": "hypervolume", "reference_point": {**POINTS, "correct": 1}},
            "reference_point.correct",
            "always be 0",
            "such as 0",
        ),
        (
            {"combine": "hypervolume", "reference_point": {**POINTS, "length": 0}},
            "reference_point.length",
            "always be 0",
            "such as 512",
        ),
        (
            {"combine": "hypervolume", "reference_point": POINTS, "weights": {"free": 2}},
            "weights.free",
            "a volume has no weights",
            "0 to leave it out",
        ),
        (
            {"combine": "hypervolume", "reference_point": POINTS, "schedule": {"free": [[0, 1]]}},
            "schedule.free",
            "no weights",
            "reference_point",
        ),
    ],
)
def test_each_problem_is_named_once_with_place_and_remedy(config, where, what, remedy):
    [error] = found(config)
    assert error.where == f"objectives.{where}"
    assert what in error.what and remedy in error.remedy


def test_hypervolume_asks_for_every_reference_point_that_is_missing():
    errors = found({"combine": "hypervolume", "reference_point": {"correct": 0}, "weights": {"polite": 0}})
    assert [e.what.partition(" of ")[2][:8] for e in errors] == ["'length'", "'free', "]
    assert "512" in errors[0].remedy


def test_one_objective_alone_is_no_trade_off():
    [error] = found({"combine": "chebyshev"}, {"correct": KNOWN["correct"]})
    assert "weighted_sum" in error.remedy
