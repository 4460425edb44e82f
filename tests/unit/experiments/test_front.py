"""Fronts, hypervolumes and their intervals, against brute force and closed forms."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from align.errors import RunFolderError, UserError
from align.experiments.front import front
from align.experiments.runs import Judged
from align.objectives.pareto import dominated, hypervolume


def judged(label, scores, names=("a", "b"), kinds=("reward", "reward"), prompts=None) -> Judged:
    scores = np.asarray(scores, np.float64)
    asked = prompts or tuple(f"prompt {n}" for n in range(len(scores)))
    return Judged(label, Path(label), "grpo", tuple(names), tuple(kinds), scores, asked, np.ones(len(scores), int), {})


# ------------------------------------------------------------------------------------------------ geometry


def test_dominated_by_hand():
    values = np.array([[0, 3], [1, 2], [1, 1], [2, 0], [2, 0], [0, 0]], float)
    assert dominated(values).tolist() == [False, False, True, False, False, True]  # equal points dominate nobody


def test_hypervolume_by_hand():
    values = np.array([[1, 3], [2, 2], [3, 1]], float)
    assert hypervolume(values, np.zeros(2)) == 6.0
    assert hypervolume(values, np.array([1.0, 0.0])) == 2 + 1  # what is not beyond the reference has no part
    assert hypervolume(values, np.full(2, 9.0)) == 0.0


@pytest.mark.parametrize("objectives", [1, 2, 3, 4])
def test_hypervolume_is_the_share_of_random_points_below_the_front(objectives):
    chance = np.random.default_rng(objectives)
    values = chance.random((6, objectives))
    thrown = chance.random((200_000, objectives))
    below = (thrown[:, None] <= values[None]).all(axis=2).any(axis=1).mean()
    assert hypervolume(values, np.zeros(objectives)) == pytest.approx(below, abs=0.005)


def test_a_dominated_or_repeated_point_adds_no_volume():
    values = np.random.default_rng(0).random((5, 3))
    more = np.concatenate([values, values[:1], values.min(axis=0, keepdims=True)])
    assert hypervolume(more, np.zeros(3)) == pytest.approx(hypervolume(values, np.zeros(3)))


# ------------------------------------------------------------------------------------------------ fronts


def test_a_cost_counts_as_its_negative_and_keeps_its_sign():
    kinds = ("reward", "cost")
    models = [judged(n, [[s, c]] * 4, kinds=kinds) for n, s, c in (("cheap", 1, 2), ("dear", 1, 5), ("good", 3, 5))]
    found = front(models)
    assert found.best.tolist() == [True, False, True]
    assert found.mean[:, 1].tolist() == [2, 5, 5]
    assert found.reference == pytest.approx([0.8, 5.3])  # a tenth of the range worse than the worst
    assert front(models, reference={"a": 0, "b": 10}).hypervolume[0] == pytest.approx(1 * 8 + 2 * 5)


def test_a_missing_score_is_left_out_and_never_a_zero():
    found = front([judged("x", [[1, 4], [np.nan, 2], [3, np.nan]]), judged("y", [[0, 0]] * 3)])
    assert found.mean[0].tolist() == [2, 3] and found.missing[0] == pytest.approx([1 / 3, 1 / 3])


def test_intervals_have_their_level():
    """Of 200 sets of 100 prompts, about 95 % of intervals hold the true mean."""
    chance = np.random.default_rng(1)
    held = 0
    for _ in range(200):
        found = front([judged("x", chance.normal(0.5, 1, (100, 2)))], resamples=300)
        held += int(found.low[0, 0] <= 0.5 <= found.high[0, 0])
    assert 0.90 <= held / 200 <= 0.99


def test_prompts_are_drawn_for_all_models_together():
    """A model that is better by a little on every prompt stays so in every resample, however much prompts differ."""
    hard = np.random.default_rng(2).normal(0, 10, (50, 2))
    found = front([judged("x", hard), judged("y", hard + 0.01)])
    assert found.often.tolist() == [0.0, 1.0] and found.high[0, 0] > found.low[1, 0]


def test_the_same_seed_gives_the_same_numbers():
    models = [judged("x", np.random.default_rng(3).random((30, 2)))]
    assert front(models).to_json() == front(models).to_json() != front(models, seed=1).to_json()


# ------------------------------------------------------------------------------------------------ refused


def test_models_that_answered_other_prompts_cannot_be_compared():
    with pytest.raises(RunFolderError, match=r"'y' and 'x' answered other prompts"):
        front([judged("x", [[1, 2]]), judged("y", [[1, 2]], prompts=("another",))])


def test_one_objective_an_unknown_one_and_none_scored_are_refused():
    with pytest.raises(UserError, match="needs two objectives"):
        front([judged("x", [[1]], names=("a",), kinds=("reward",))])
    with pytest.raises(UserError, match=r"no objective 'c'[\s\S]*choose among: a, b"):
        front([judged("x", [[1, 2]])], ["a", "c"])
    with pytest.raises(RunFolderError, match="'x' has no score at all on 'b'"):
        front([judged("x", [[1, np.nan]])])
    with pytest.raises(UserError, match="no objective is called 'z'"):
        front([judged("x", [[1, 2]])], reference={"z": 0.0})
    with pytest.raises(RunFolderError, match="'b' is a cost here and a reward"):
        front([judged("x", [[1, 2]]), judged("y", [[1, 2]], kinds=("reward", "cost"))])
