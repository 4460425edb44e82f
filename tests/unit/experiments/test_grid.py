from __future__ import annotations

import math

import pytest

from align.errors import UserError
from align.experiments.grid import label, parse_numbers, parse_weights, simplex


def test_two_objectives_and_eleven_points_are_steps_of_a_tenth():
    found = simplex(["a", "b"], 11)
    assert found == [{"a": n / 10, "b": (10 - n) / 10} for n in range(11)]


@pytest.mark.parametrize(("names", "points"), [("abc", 11), ("abcd", 4), ("ab", 2)])
def test_a_simplex_has_every_vector_once_and_each_adds_up_to_one(names, points):
    found = [tuple(vector.values()) for vector in simplex(list(names), points)]
    assert len(set(found)) == len(found) == math.comb(points + len(names) - 2, len(names) - 1)
    assert all(sum(vector) == pytest.approx(1) and min(vector) >= 0 for vector in found)


def test_one_objective_or_one_point_is_no_simplex():
    with pytest.raises(UserError, match="two objectives; there is one, 'a'"):
        simplex(["a"], 11)
    with pytest.raises(UserError, match="2 or more"):
        simplex(["a", "b"], 1)


def test_weights_are_read_by_name():
    assert parse_weights("a=1, b=0.5") == {"a": 1.0, "b": 0.5}
    assert parse_numbers("a=-1e-3", "--reference") == {"a": -0.001}


@pytest.mark.parametrize("text", ["a", "a=", "=1", "a=x", "a=nan", "a=1,a=2", "a=-1", ""])
def test_what_is_no_weight_is_refused(text):
    with pytest.raises(UserError):
        parse_weights(text)


def test_a_label_is_a_name_that_a_recipe_may_have():
    assert label({"correct": 0.5, "a.b": 1 / 3}) == "correct-0.5_a.b-0.333333"
    assert label({"plugin one": 1.0}, seed=3) == "plugin.one-1_seed-3"
