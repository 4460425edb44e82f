"""Scores of episodes: an environment's beside those of rewards; the lost are missing, never 0; budgets of losses."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from align.episodes.describe import scores_of_killed
from align.errors import PluginError, RewardError
from align.protocols.fleet import Completion, Episode, EpisodeFailure, Group
from align.protocols.scorer import ErrorBudget, Failure, ScoreTable
from align.recipe.environment import Environment
from align.stages.episode_scorer import EpisodeScorer, Known
from tests.unit.stages.plain import prompt

WORLD = Known("world", ("right", "calls"), ("reward", "cost"), 0.1)


def episode(scores: Mapping[str, float | None] | None = None, *, lost: str = "", **more: Any) -> Completion:
    n = 0 if lost else 3
    failure = EpisodeFailure("died", lost) if lost else more.pop("failure", None)
    counts = {} if lost else {"turns": 2.0}
    made = Episode(scores=scores or {}, failure=failure, counts=counts, **more)
    none = np.zeros(n, np.float32)
    return Completion(np.arange(n), none, none.astype(np.int32), "text", "eos", sampled=np.ones(n, bool), episode=made)


def groups(*several: Sequence[Completion]) -> list[Group]:
    return [Group(prompt(n), tuple(completions)) for n, completions in enumerate(several)]


class Lengths:
    """Rewards that score the number of completions of a sample's group; the second of a group fails."""

    def __init__(self) -> None:
        self.seen: list[list[int]] = []

    async def score(self, asked: Sequence[Group], budget: ErrorBudget | None = None) -> ScoreTable:
        self.seen.append([len(group.completions) for group in asked])
        scores = [[float(len(g.completions))] for g in asked for _ in g.completions]
        failures = tuple(Failure(g.prompt.group_id, 1, "size", "raised", "no") for g in asked if len(g.completions) > 1)
        return ScoreTable(("size",), np.array(scores, np.float32), ("reward",), failures, dropped=(len(asked) - 1,))

    async def close(self) -> None:
        pass


def test_scores_stand_at_their_episodes_and_the_lost_have_none() -> None:
    inner = Lengths()
    scorer = EpisodeScorer([Known("world", WORLD.objectives, WORLD.kinds, 1.0)], inner, "grpo")
    asked = groups(
        [
            episode({"right": 1.0, "calls": 2.0}),
            episode(lost="its process exited"),
            episode({"right": 0.0, "calls": None}),
        ],
        [episode(lost="again"), episode(lost="and again")],
        [episode({"right": 0.5, "calls": 1.0})],
    )
    table = asyncio.run(scorer.score(asked))
    assert table.objectives == ("right", "calls", "size") and table.kinds == ("reward", "cost", "reward")
    nan = float("nan")
    wanted = [[1, 2, 2], [nan] * 3, [0, nan, 2], [nan] * 3, [nan] * 3, [0.5, 1, 1]]
    np.testing.assert_array_equal(table.scores, np.array(wanted, np.float32))
    assert inner.seen == [[2, 1]]
    assert [(f.group_id, f.sample) for f in table.failures] == [(0, 1), (1, 0), (1, 1), (0, 2)]
    assert table.dropped == (2,)
    assert (
        table.metrics["episode/lost"] == 3
        and table.metrics["episode/turns"] == 2
        and table.counts["episode/turns"] == 3
    )


def test_more_lost_episodes_than_a_step_may_have_stop_the_run_with_what_happened() -> None:
    scorer = EpisodeScorer([WORLD], None, "grpo")
    fine, gone = [episode({"right": 1.0, "calls": 0.0})] * 5, [episode(lost="exit 3")]
    for step in range(3):  # one in ten may be lost, whichever call of the step brings it
        for part in (fine, [*fine[:4], *gone]):
            asyncio.run(scorer.score(groups(part), ErrorBudget(step, 10)))
    with pytest.raises(RewardError, match=r"2 of 10 episodes.*max_error_rate = 0.1 allows \(1\)") as error:
        asyncio.run(scorer.score(groups(gone), ErrorBudget(2, 10)))
    assert "exit 3" in str(error.value) and "grpo" in str(error.value)


def test_an_episode_whose_reward_failed_is_missing_and_counts_as_unscored() -> None:
    scorer = EpisodeScorer([Known("world", ("right",), ("reward",), 1.0)], None, "grpo")
    table = asyncio.run(scorer.score(groups([episode(failure=EpisodeFailure("raised", "KeyError"))])))
    assert (
        np.isnan(table.scores).all() and table.metrics["episode/unscored"] == 1 and table.metrics["episode/lost"] == 0
    )


def test_a_killed_episode_has_the_score_that_the_recipe_gives_it() -> None:
    known = Known("world", ("right", "calls"), ("reward", "cost"), 0.0, on_kill={"right": -1.0, "calls": 9.0})
    played = [episode(killed=True), episode({"right": 1.0, "calls": 2.0})]
    table = asyncio.run(EpisodeScorer([known], None, "grpo").score(groups(played)))
    assert table.scores.tolist() == [[-1.0, 9.0], [1.0, 2.0]]


def test_the_score_of_a_killed_episode_is_one_that_its_environment_could_give() -> None:
    bounded = {"right": {"kind": "reward", "range": [0.0, 1.0]}, "calls": {"kind": "cost", "range": None}}
    one = {"right": bounded["right"]}
    for offered, given, why in (
        (bounded, 0.0, "one score for several objectives"),
        (bounded, {"speed": 1.0}, "no objective 'speed'"),
        (bounded, {"right": 2.0}, "2 is outside the range of 'right'"),
        (one, -1.0, "-1 is outside the range of 'right'"),
        ({}, 0.0, "scores nothing itself"),
    ):
        with pytest.raises(PluginError, match=why):
            scores_of_killed(Environment(use="a.py:A", on_kill=given), {"name": "world", "objectives": offered})
    rules = Environment(use="a.py:A", on_kill={"right": 0.5, "calls": 3})
    assert scores_of_killed(rules, {"name": "world", "objectives": bounded}) == {"right": 0.5, "calls": 3.0}
