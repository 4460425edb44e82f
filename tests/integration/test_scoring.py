"""Rewards behind the Scorer protocol, in this process and below a Ray actor."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from align.actors.cluster import Cluster
from align.actors.places import Places
from align.actors.reward_actors import RayScorer
from align.actors.scoring import LocalScorer
from align.errors import AlignError, PluginError, RewardError
from align.protocols.fleet import Completion, Group, PromptItem
from align.protocols.scorer import ErrorBudget, ScoreTable
from align.recipe.parts import Reward
from align.recipe.placement import Placement
from align.stages.backend import Needs
from align.stages.roles import roles_of

PLUGINS = """
import os, re, time
from pathlib import Path
from rewards import reward

@reward(on_error="mask", retries=0)
def correct(samples):
    if any(s.completion == "crash" for s in samples):
        os._exit(5)
    return [None if s.truncated else float(s.completion == s.row["answer"]) for s in samples]

@reward
def short(samples, *, longest: int):
    Path("pid").write_text(str(os.getpid()))
    return [1 - len(s.token_ids) / longest for s in samples]

@reward
def waits(samples):
    time.sleep(2)
    return [1.0] * len(samples)

@reward(timeout_s=600)
def hangs(samples):
    Path("pid").write_text(str(os.getpid()))
    re.match("(a+)+$", "a" * 60 + "b")
"""

REWARDS = (
    Reward(use="rewards.py:correct", max_error_rate=0.5),
    Reward.model_validate({"use": "rewards.py:short", "as": "brief", "args": {"longest": 10}}),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe")
    (path / "rewards.py").write_text(PLUGINS)
    return path


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    cluster = Cluster(None, run_folder=tmp_path_factory.mktemp("run"))
    yield cluster
    cluster.close()


def group(number: int, *texts: str, truncated: str | None = None) -> Group:
    prompt = PromptItem(number, np.arange(3), 0, ({"role": "user", "content": "?"},), {"answer": "yes"})
    return Group(
        prompt,
        tuple(
            Completion(
                np.arange(len(t)), np.zeros(len(t), np.float32), np.full(len(t), 4, np.int32), t,
                "length" if t == truncated else "eos",
            )
            for t in texts
        ),
    )  # fmt: skip


GROUPS = [group(11, "yes", "no"), group(12, "cut off", "yes", truncated="cut off")]


def check(table: ScoreTable) -> None:
    assert table.objectives == ("correct", "brief") and table.kinds == ("reward", "reward")
    assert table.scores.dtype == np.float32
    expected = [[1, 0.7], [0, 0.8], [np.nan, 0.3], [1, 0.7]]
    np.testing.assert_allclose(table.scores, np.array(expected, np.float32), rtol=1e-6)
    assert table.failures == () and table.dropped == ()
    assert table.metrics["reward/correct/errors"] == 0 and table.metrics["reward/brief/seconds"] > 0


def check_crash(table: ScoreTable) -> None:
    np.testing.assert_array_equal(np.isnan(table.scores[:, 0]), [False, True, False, False])
    assert [(f.group_id, f.sample, f.plugin, f.cause) for f in table.failures] == [(1, 1, "correct", "crashed")]


CRASH = [group(1, "yes", "crash"), group(2, "yes", "no")]


def test_a_local_scorer_gives_the_table_and_survives_a_crash(folder: Path) -> None:
    async def run() -> None:
        scorer = LocalScorer(REWARDS, folder, seed=0)
        check(await scorer.score(GROUPS))
        check_crash(await scorer.score(CRASH))
        await scorer.close()

    asyncio.run(run())


def test_dropped_groups_are_named_by_index_and_have_no_scores(folder: Path) -> None:
    async def run() -> ScoreTable:
        rewards = (Reward(use="rewards.py:correct", on_error="drop_group", max_error_rate=0.5), REWARDS[1])
        scorer = LocalScorer(rewards, folder, seed=0)
        table = await scorer.score([GROUPS[0], group(9, "crash", "no"), GROUPS[1]])
        await scorer.close()
        return table

    table = asyncio.run(run())
    assert table.dropped == (1,)
    assert np.isnan(table.scores[2:4]).all() and not np.isnan(table.scores[:2]).any()


def test_a_ray_scorer_equals_the_local_one(cluster: Cluster, folder: Path) -> None:
    async def run() -> None:
        scorer = RayScorer(REWARDS, folder, seed=0)
        try:
            described = await scorer.start()
            assert [d["name"] for d in described] == ["correct", "brief"]
            check(await scorer.score(GROUPS))
            check_crash(await scorer.score(CRASH))
        finally:
            await scorer.close()

    asyncio.run(run())


def test_several_actors_divide_the_groups_and_join_their_tables_in_order(
    cluster: Cluster, folder: Path, tmp_path: Path
) -> None:
    groups = [group(n, *["yes"] * (n % 3), "crash" if n == 5 else "no") for n in range(8)]

    async def score(actors: int) -> ScoreTable:
        rewards = (Reward(use="rewards.py:correct", on_error="drop_group", max_error_rate=0.5), REWARDS[1])
        logs = tmp_path / str(actors)
        scorer = RayScorer(rewards, folder, seed=0, placements=[{}] * actors, log_folder=logs)
        try:
            table = await scorer.score(groups)
            assert (await scorer.score([])).scores.shape == (0, 2)
            return table
        finally:
            await scorer.close()

    one, two = asyncio.run(score(1)), asyncio.run(score(2))
    np.testing.assert_array_equal(one.scores, two.scores)
    assert one.dropped == two.dropped == (5,)
    assert [(f.group_id, f.sample, f.cause) for f in two.failures] == [(5, 2, "crashed")]
    assert one.metrics["reward/correct/error_rate"] == pytest.approx(two.metrics["reward/correct/error_rate"])
    assert two.counts["reward/correct/error_rate"] == sum(len(g.completions) for g in groups)
    assert two.metrics["reward/brief/calls"] == len(two.series["reward/brief/latency"]) == 2
    assert [p.name for p in (tmp_path / "2").iterdir() if p.is_dir()] == ["1"]


def test_failures_on_several_actors_are_failures_of_one_budget(cluster: Cluster, folder: Path) -> None:
    """Two of 40 samples may fail: one on each of three actors is too many, though each alone would go on."""
    rewards = (Reward(use="rewards.py:correct", max_error_rate=0.05),)

    async def run() -> None:
        scorer = RayScorer(rewards, folder, seed=0, placements=[{}] * 3)
        try:
            await scorer.start()
            await scorer.score([group(n, "crash", "yes") for n in range(2)], ErrorBudget(0, 40))
            await scorer.score([group(n, "no", "yes") for n in range(3)], ErrorBudget(0, 40))
            await scorer.score([group(9, "crash", "yes")], ErrorBudget(1, 40))
            with pytest.raises(RewardError, match=r"correct failed on 3 of 40 samples so far.*allows \(2\)"):
                await scorer.score([group(n, "crash", "yes") for n in range(7, 8)], ErrorBudget(0, 40))
        finally:
            await scorer.close()

    asyncio.run(run())


def test_the_groups_of_an_actor_that_dies_go_to_another(cluster: Cluster, folder: Path) -> None:
    (folder / "pid").unlink(missing_ok=True)

    async def run() -> ScoreTable:
        scorer = RayScorer((REWARDS[1], Reward(use="rewards.py:waits")), folder, seed=0, placements=[{}] * 2)
        try:
            first, _ = await scorer.processes()
            scoring = asyncio.create_task(scorer.score([group(n, "yes", "no") for n in range(4)]))
            await asyncio.sleep(1.0)  # processes start, and calls wait two seconds
            os.kill(first, 9)
            table = await scoring
            assert len((await scorer.score(GROUPS)).scores) == 4, "and the one that is left goes on"
            return table
        finally:
            await scorer.close()

    table = asyncio.run(run())
    np.testing.assert_allclose(table.scores[:, 0], np.array([0.7, 0.8] * 4, np.float32), rtol=1e-6)


def test_an_only_actor_that_dies_is_started_again_and_its_groups_wait_for_it(cluster: Cluster, folder: Path) -> None:
    async def run() -> tuple[ScoreTable, ScoreTable]:
        scorer = RayScorer((REWARDS[1], Reward(use="rewards.py:waits")), folder, seed=0)
        try:
            [pid] = await scorer.processes()
            scoring = [asyncio.create_task(scorer.score([group(n, "yes", "no")])) for n in range(2)]
            await asyncio.sleep(1.0)
            os.kill(pid, 9)
            first, second = await asyncio.gather(*scoring)
            assert await scorer.processes() != [pid]
            return first, second
        finally:
            await scorer.close()

    tables = asyncio.run(run())
    for table in tables:
        np.testing.assert_allclose(table.scores[:, 0], np.array([0.7, 0.8], np.float32), rtol=1e-6)
    assert sum(table.metrics["reward/restarts"] for table in tables) == 1


def test_reward_actors_are_spread_and_the_others_packed(cluster: Cluster) -> None:
    placement = Placement.model_validate({"rewards": {"count": 2, "cpus": 0.1}, "trainer": {"cpus": 0.5}})
    roles = roles_of(Needs(trainer=True, scorers=2), placement, cores=2, gpus=0, threads={})
    names = ["rewards-0-0", "rewards-0-1", "rewards-1-0", "rewards-1-1"]
    assert [r.name for r in roles if r.spread] == names

    async def run() -> None:
        places = await Places.reserve(roles)
        try:
            groups = {name: places.at(name)["scheduling_strategy"].placement_group.id for name in ("trainer", *names)}
            assert groups["trainer"] not in [groups[name] for name in names]
            scorer = RayScorer(REWARDS, Path("."), seed=0, placements=[places.at(name) for name in names[:2]])
            assert len(set(await scorer.processes())) == 2
            await scorer.close()
        finally:
            places.release()

    asyncio.run(run())


def test_errors_arrive_from_ray_as_our_own(cluster: Cluster, folder: Path) -> None:
    async def run(reward: Reward) -> None:
        scorer = RayScorer((reward,), folder, seed=0)
        try:
            await scorer.score(CRASH)
        finally:
            await scorer.close()

    with pytest.raises(PluginError, match="functions there") as missing:
        asyncio.run(run(Reward(use="rewards.py:nothing")))
    assert missing.value.exit_code == 2
    with pytest.raises(RewardError, match="on_error is `fail`"):
        asyncio.run(run(Reward(use="rewards.py:correct", on_error="fail")))


def test_plugins_die_with_their_actor_even_while_they_hang(cluster: Cluster, folder: Path) -> None:
    (folder / "pid").unlink(missing_ok=True)

    async def run() -> int:
        scorer = RayScorer((Reward(use="rewards.py:hangs"),), folder, seed=0, restarts=0)
        [pid] = await scorer.processes()
        scoring = asyncio.create_task(scorer.score(GROUPS))
        while not (folder / "pid").exists() or not (folder / "pid").read_text():
            assert not scoring.done(), scoring.result()
            await asyncio.sleep(0.05)
        os.kill(pid, 9)
        with pytest.raises(AlignError, match="the reward actor died"):
            await scoring
        await scorer.close()
        return int((folder / "pid").read_text())

    child = asyncio.run(run())
    deadline = time.monotonic() + 10
    while os.path.exists(f"/proc/{child}"):
        assert time.monotonic() < deadline, "the plugin outlived its actor"
        time.sleep(0.05)
