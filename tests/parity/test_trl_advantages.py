"""Our advantages equal those of TRL's GRPO and RLOO trainers on the same scores: the lines of their own source run on
our tables. REINFORCE++, which TRL has not, equals the paper's formula."""

from __future__ import annotations

import inspect
import textwrap
from typing import Any

import numpy as np
import pytest
import torch
from trl.trainer import grpo_trainer, rloo_trainer
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.rloo_trainer import RLOOTrainer

from align.objectives import combine
from align.recipe.objectives import Objectives
from tests.parity.stand_in import stand_in

WEIGHTS = {"a": 1.0, "b": 0.5, "c": 2.0}


def table(unscorable: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """f32[24, 3] of six groups of four: a dead group, a dead objective; whole rows missing where asked. (Not three of a
    group: TRL leaves the last one out of a batch's deviation, where it has an advantage of 0 here.)"""
    random = np.random.default_rng(0)
    scores = random.normal(size=(24, 3)) * [1.0, 3.0, 0.2]
    scores[:, 0] = scores[:, 0] > 0
    scores[4:8], scores[8:12, 1] = 0.5, 2.0
    if unscorable:
        scores[[1, 13, 14]] = np.nan
    return scores.astype(np.float32), np.repeat(np.arange(6), 4)


def theirs(trainer: type, module: Any, scores: np.ndarray, **settings: Any) -> np.ndarray:
    """The advantages of TRL's own lines, from the scores to the point where each process takes its share."""
    source = inspect.getsource(trainer._generate_and_score_completions)
    begin, end = source.index("        unscorable_mask = "), source.index("        # Slice to keep only the local part")
    names = {
        **vars(module),
        "self": stand_in(reward_weights=torch.tensor(list(WEIGHTS.values())), reward_funcs=list(WEIGHTS), **settings),
        "rewards_per_func": torch.from_numpy(scores.copy()),
        "device": torch.device("cpu"),
        "num_generations": 4,
    }
    exec(textwrap.dedent(source[begin:end]), names)
    return names["advantages"].numpy()


def ours(scores: np.ndarray, ids: np.ndarray, **config: Any) -> np.ndarray:
    objectives = Objectives.model_validate({"weights": WEIGHTS, "min_std": 0.0, **config})
    return combine(scores, ids, list(WEIGHTS), ["reward"] * 3, objectives, {}, 0)[0]


GRPO = {
    "GRPO": ({}, {"scale_rewards": "group"}),
    "Dr. GRPO": ({"scale": "none"}, {"scale_rewards": "none"}),
    "GDPO": ({"combine": "decoupled"}, {"multi_objective_aggregation": "normalize_then_sum", "scale_rewards": "group"}),
}
RLOO = {
    "RLOO": ({"baseline": "leave_one_out", "scale": "none"}, {"normalize_advantages": False}),
    "RLOO, normalised": (
        {"baseline": "leave_one_out", "scale": "none", "whiten": True},
        {"normalize_advantages": True},
    ),
}


@pytest.mark.parametrize("unscorable", [False, True])
@pytest.mark.parametrize("name", GRPO)
def test_grpo_dr_grpo_and_gdpo_are_trls(name: str, unscorable: bool) -> None:
    mine, settings = GRPO[name]
    scores, ids = table(unscorable)
    want = theirs(
        GRPOTrainer, grpo_trainer, scores, **{"multi_objective_aggregation": "sum_then_normalize", **settings}
    )
    got = ours(scores, ids, **mine)
    assert (np.isnan(got) == np.isnan(scores).all(axis=1)).all()  # TRL's 0 is our "not trained"
    np.testing.assert_allclose(np.nan_to_num(got), want, rtol=2e-4, atol=2e-5)
    assert np.abs(want).max() > 0.5


@pytest.mark.parametrize("unscorable", [False, True])
@pytest.mark.parametrize("name", RLOO)
def test_rloo_is_trls(name: str, unscorable: bool) -> None:
    mine, settings = RLOO[name]
    scores, ids = table(unscorable)
    want = theirs(RLOOTrainer, rloo_trainer, scores, reward_clip_range=None, beta=0.0, **settings)
    np.testing.assert_allclose(np.nan_to_num(ours(scores, ids, **mine)), want, rtol=2e-4, atol=2e-5)
    assert np.abs(want).max() > 0.5


def test_reinforce_plus_plus_is_the_papers() -> None:
    """2501.03262: the score minus the mean of the batch, over its deviation; with a baseline, the group's mean goes
    first."""
    scores, ids = table()
    r = scores.astype(np.float64) @ list(WEIGHTS.values())
    np.testing.assert_allclose(ours(scores, ids, baseline="batch"), (r - r.mean()) / (r.std(ddof=1) + 1e-4), rtol=1e-5)
    centred = r - np.array([r[ids == g].mean() for g in ids])
    got = ours(scores, ids, baseline="group", scale="none", whiten=True)
    np.testing.assert_allclose(got, centred / (centred.std(ddof=1) + 1e-4), rtol=1e-4, atol=1e-6)


def test_by_hand_on_a_table_that_fits_a_line() -> None:
    """Scores 1, 0 and 3, 1 in two groups: mean 1.25, deviation sqrt(4.75 / 3)."""
    scores, ids = np.array([[1.0], [0.0], [3.0], [1.0]]), np.array([0, 0, 1, 1])
    found = {
        name: combine(scores, ids, ["a"], ["reward"], Objectives.model_validate(config), {}, 0)[0].tolist()
        for name, config in {
            "REINFORCE++": {"baseline": "batch"},
            "REINFORCE++-baseline": {"scale": "none", "whiten": True},
            "RLOO": {"baseline": "leave_one_out", "scale": "none"},
            "Dr. GRPO": {"scale": "none"},
        }.items()
    }
    d = (4.75 / 3) ** 0.5 + 1e-4
    assert found["REINFORCE++"] == pytest.approx([-0.25 / d, -1.25 / d, 1.75 / d, -0.25 / d], rel=1e-6)
    d = (2.5 / 3) ** 0.5 + 1e-4
    assert found["REINFORCE++-baseline"] == pytest.approx([0.5 / d, -0.5 / d, 1 / d, -1 / d], rel=1e-6)
    assert found["RLOO"] == pytest.approx([1, -1, 2, -2])
    assert found["Dr. GRPO"] == pytest.approx([0.5, -0.5, 1, -1])
