"""The one loop with engines, rewards and a trainer that take time, on a virtual clock: overlap, bounds, replacement."""

from __future__ import annotations

import asyncio
import itertools
import json
import math
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest

from align.errors import DataError, EngineError, Interrupted, RewardError, StalenessError
from align.protocols.fleet import Completion, Group, PromptItem
from align.stages.virtual_clock import run_virtually
from tests.unit.stages.online_run import Run, SlowFleet, SlowScorer, SlowTrainer, log_normal
from tests.unit.stages.plain import PlainFleet, PlainScorer, prompt

MANY = [prompt(n) for n in range(1000)]


def trained(run: Run) -> list[int]:
    """Ids of all groups that were trained on, in order."""
    return list(itertools.chain.from_iterable(run.trainer.seen))


def ages(run: Run) -> list[int]:
    """The age of every trained group, by its versions and the turn."""
    steps = enumerate(run.trainer.trees, start=run.lines.steps[0][1] - 1)
    return [step - int(tree.branches[0].versions.min()) for step, trees in steps for tree in trees]


# ------------------------------------------------------------------------------------------------ time


def test_synchronous_phases_follow_each_other_and_asynchronous_ones_overlap(tmp_path: Path) -> None:
    """G = 3 s, L = 2 s, T = 4 s, each on its own machine. A step takes G + L + T, at staleness 1 half of it in the mean
    (two steps' groups are on their way in that time), at staleness 2 the trainer never waits."""
    seconds = {}
    for staleness in (0, 1, 2):
        run = Run(
            tmp_path / str(staleness),
            trainer=SlowTrainer(4.0),
            fleet=SlowFleet(lambda item: 3.0),
            scorer=SlowScorer(2.0),
            staleness=staleness,
            total=9,
        )
        run.virtually()
        seconds[staleness] = run.seconds
        steps = [metrics for _, _, metrics in run.lines.steps]
        assert [metrics["time/train"] for metrics in steps] == [4.0] * 9
        assert (steps[0]["time/generate"], steps[0]["time/score"]) == (3.0, 2.0)
    assert seconds == {0: 9 * 9.0, 1: 9.0 + 8 * 4.5, 2: 9.0 + 8 * 4.0}


def test_groups_are_scored_as_they_finish_and_those_that_finish_together_share_a_call(tmp_path: Path) -> None:
    scorer = SlowScorer(1.0)
    fleet = SlowFleet(lambda item: 10.0 if item.group_id == 0 else 2.0)
    run = Run(tmp_path, fleet=fleet, scorer=scorer, groups=4, total=1, prompts=MANY[:4])
    run.virtually()
    assert scorer.calls == [[1, 2, 3], [0]]
    [(_, _, metrics)] = run.lines.steps
    assert (metrics["time/generate"], metrics["time/score"]) == (10.0, 1.0)
    assert metrics["time/group_generate"] == 4.0 and metrics["time/group_wait"] == 6.0


def test_all_calls_of_a_step_share_one_error_budget(tmp_path: Path) -> None:
    scorer = SlowScorer(0.5)
    Run(tmp_path, fleet=SlowFleet(log_normal), scorer=scorer, groups=6, total=2, prompts=MANY).virtually()
    assert len(scorer.calls) > 2
    sizes = {(budget.id, budget.samples) for budget in scorer.budgets if budget}
    assert sizes == {(0, 24), (1, 24)} and None not in scorer.budgets


# ------------------------------------------------------------------------------------------------ bounds


@pytest.mark.parametrize("overdue", ["wait", "drop"])
@pytest.mark.parametrize("staleness", [1, 2, 3])
def test_no_group_is_older_than_the_bound_or_trained_twice_though_engines_die(
    tmp_path: Path, staleness: int, overdue: str
) -> None:
    fleet = SlowFleet(log_normal, dies=lambda item: item.seed % 5 == 0)
    run = Run(
        tmp_path, fleet=fleet, trainer=SlowTrainer(0.7), prompts=MANY, staleness=staleness, overdue=overdue, total=60
    )
    run.virtually()
    assert max(ages(run)) == staleness and min(ages(run)) >= 0
    assert len(set(trained(run))) == len(trained(run)) == 180
    assert [metrics["staleness/max"] for _, _, metrics in run.lines.steps][-1] == staleness
    if overdue == "wait":
        assert sorted(trained(run)) == sorted(set(itertools.chain.from_iterable(fleet.lists))), "and none is lost"


def test_waiting_for_the_old_trains_on_the_lengths_of_a_synchronous_run_and_dropping_them_does_not(
    tmp_path: Path,
) -> None:
    """Lengths are log-normal and take time; what dropping does to them is in its metrics."""

    class Skewed(SlowFleet):
        def _group(self, item: PromptItem, group_size: int) -> Group:
            n = max(1, round(10 * log_normal(item)))
            ids, version = np.arange(n, dtype=np.int64), np.full(n, self.version, dtype=np.int32)
            return Group(item, (Completion(ids, np.zeros(n, np.float32), version, "", "eos"),) * group_size)

    settings = {"groups": 8, "group_size": 2, "total": 200, "prompts": [prompt(n) for n in range(4000)], "save": 200}
    runs: dict[str, Run] = {}
    for name, plan in {"sync": {}, "wait": {"staleness": 1}, "drop": {"staleness": 1, "overdue": "drop"}}.items():
        runs[name] = Run(tmp_path / name, fleet=Skewed(log_normal), trainer=SlowTrainer(0.5), **settings, **plan)
        runs[name].virtually()
    length = {
        name: np.mean([value for _, value in run.lines.of("completion/mean_length")]) for name, run in runs.items()
    }
    assert sorted(trained(runs["wait"])) == sorted(trained(runs["sync"]))
    assert length["wait"] == pytest.approx(length["sync"])
    assert length["drop"] < 0.8 * length["sync"]
    dropped = sum(value for _, value in runs["drop"].lines.of("groups/dropped"))
    known = [value for _, value in runs["drop"].lines.of("groups/dropped_mean_length")]
    assert dropped > 0.05 * 1600 and np.mean(known) > 1.5 * length["sync"]
    assert any("dropped as overdue: groups " in line for line in runs["drop"].lines.messages)
    assert runs["wait"].seconds < 0.9 * runs["sync"].seconds


def test_a_fleet_that_serves_an_older_version_than_it_holds_is_found_before_training(tmp_path: Path) -> None:
    class Stale(PlainFleet):
        def _group(self, item: PromptItem, group_size: int) -> Group:
            group = super()._group(item, group_size)
            for completion in group.completions:
                completion.versions[:] = 0
            return group

    run = Run(tmp_path, fleet=Stale())
    with pytest.raises(StalenessError, match="sampled by version 0, and turn 1"):
        run.virtually()
    assert len(run.trainer.seen) == 1


# ------------------------------------------------------------------------------------------------ ends


class Judge(SlowScorer):
    """Fails once it is asked about group 7 or later."""

    async def score(self, groups, budget=None):
        table = await super().score(groups, budget)
        if any(group.prompt.group_id >= 7 for group in groups):
            raise RewardError("the judge is gone")
        return table


def test_an_error_in_the_background_ends_the_step_in_progress_as_itself_and_leaves_no_task(tmp_path: Path) -> None:
    run = Run(
        tmp_path, trainer=SlowTrainer(1000.0), scorer=Judge(1.0), prompts=[prompt(n) for n in range(30)], staleness=2
    )
    with pytest.raises(RewardError, match="the judge is gone"):
        run.virtually()
    assert run.seconds < 10 and run.left == []


def test_an_engine_error_in_a_stream_ends_the_stage_as_itself(tmp_path: Path) -> None:
    class Broken(SlowFleet):
        async def _sampled(self, item: PromptItem, group_size: int) -> Group:
            raise EngineError("no engine can be kept alive")

    run = Run(tmp_path, fleet=Broken())
    with pytest.raises(EngineError, match="kept alive"):
        run.virtually()
    assert run.left == []


def test_a_stream_that_ends_early_is_an_error_and_no_endless_wait(tmp_path: Path) -> None:
    class Short(PlainFleet):
        async def stream(self, prompts, group_size, sampling):
            async for group in super().stream(prompts[1:], group_size, sampling):
                yield group

    with pytest.raises(EngineError, match="never answered for groups"):
        Run(tmp_path, fleet=Short()).virtually()


def test_a_stop_ends_after_the_step_with_a_checkpoint_of_what_was_on_its_way_and_no_task(tmp_path: Path) -> None:
    run = Run(tmp_path, fleet=SlowFleet(log_normal), trainer=SlowTrainer(1.0), prompts=MANY, staleness=2)
    run.trainer.during_step = lambda step: run.stop.set() if step == 5 else None
    with pytest.raises(Interrupted):
        run.virtually()
    assert run.left == []
    state = json.loads((tmp_path / "grpo" / "checkpoints" / "step-000006" / "state.json").read_text())
    admission = state["extra"]["admission"]
    assert admission["drawn"] == 3 * (6 + 2) and len(admission["running"]) == 3 * 2
    assert set(admission["running"]).isdisjoint(trained(run))


def test_cancelling_a_stage_leaves_no_task(tmp_path: Path) -> None:
    run = Run(tmp_path, fleet=SlowFleet(lambda item: 5.0), prompts=MANY, staleness=1)

    async def cancelled() -> None:
        task = asyncio.ensure_future(run.whole())
        await asyncio.sleep(12.0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert asyncio.all_tasks() == {asyncio.current_task()}

    run_virtually(cancelled())
    run.publications.close()


# ------------------------------------------------------------------------------------------------ starting again


class Killed(Exception): ...


def kill_at(step: int):
    def during(now: int) -> None:
        if now == step:
            raise Killed

    return during


@pytest.mark.parametrize("staleness", [1, 3])
def test_after_a_kill_groups_in_flight_are_sampled_again_under_their_ids_none_lost_and_none_twice(
    tmp_path: Path, staleness: int
) -> None:
    def start() -> Run:
        fleet = SlowFleet(log_normal)
        return Run(tmp_path, fleet=fleet, trainer=SlowTrainer(0.5), prompts=MANY, staleness=staleness, total=20)

    first = start()
    first.trainer.during_step = kill_at(10)
    with pytest.raises(Killed):
        first.virtually()
    assert first.left == []
    second = start()
    second.virtually()
    kept = list(itertools.chain.from_iterable(first.trainer.seen[:8]))
    assert len(kept) + len(trained(second)) == 60
    assert sorted(kept + trained(second)) == sorted(item.group_id for item in second.stage.supply.cursor.take(0, 60))
    assert max(ages(second)) <= staleness


# ------------------------------------------------------------------------------------------------ dynamic sampling


def half_without_signal(group: Group, completion: Completion) -> float:
    """Groups with an even seed are scored alike throughout."""
    return 1.0 if group.prompt.seed % 2 == 0 else float(len(completion.token_ids) + completion.token_ids[0])


def rows(folder: Path) -> list[dict]:
    files = sorted((folder / "grpo" / "rollouts").iterdir())
    return [row for path in files for row in pyarrow.parquet.read_table(path).to_pylist()]


@pytest.mark.parametrize("staleness", [0, 2])
def test_groups_without_signal_are_replaced_so_that_every_step_learns_from_all_its_groups(
    tmp_path: Path, staleness: int
) -> None:
    run = Run(
        tmp_path,
        fleet=SlowFleet(log_normal),
        scorer=SlowScorer(0.1, even=half_without_signal),
        prompts=MANY,
        staleness=staleness,
        refill=20.0,
        save=12,
    )
    run.virtually()
    assert [value for _, value in run.lines.of("groups/dead")] == [0.0] * 12
    assert [value for _, value in run.lines.of("groups/total")] == [3.0] * 12
    refilled = sum(value for _, value in run.lines.of("groups/refilled"))
    assert refilled > 10
    logged = {row["group_id"]: row["trained"] for row in rows(tmp_path)}
    assert sum(not kept for kept in logged.values()) == refilled, "they stand in rollouts/, untrained"
    assert {group for group, kept in logged.items() if kept} == set(trained(run))
    generated = sum(value for _, value in run.lines.of("tokens/generated"))
    assert generated == sum(len(row["token_ids"]) for row in rows(tmp_path))
    if staleness:
        assert max(ages(run)) <= staleness


@pytest.mark.parametrize("overdue", ["wait", "drop"])
def test_whatever_comes_to_nothing_every_group_is_accounted_for_once(tmp_path: Path, overdue: str) -> None:
    """Engines die, prompts fail, groups have no signal or come too late, all in one run."""
    fleet = SlowFleet(
        log_normal,
        refuses=lambda item: "it is too long" if item.row["n"] % 29 == 0 else None,
        dies=lambda item: item.seed % 7 == 0,
    )
    run = Run(
        tmp_path,
        fleet=fleet,
        scorer=SlowScorer(0.2, even=half_without_signal),
        trainer=SlowTrainer(1.0),
        prompts=MANY,
        total=40,
        staleness=2,
        overdue=overdue,
        refill=1.0,
        max_failed=1.0,
    )
    run.virtually()
    sampled = list(itertools.chain.from_iterable(fleet.lists))
    logged = {row["group_id"]: row["trained"] for row in rows(tmp_path)}
    failed = {item.group_id for item in run.stage.supply.cursor.of(sampled) if item.row["n"] % 29 == 0}
    dropped = {
        int(group) for line in run.lines.messages if "overdue" in line for group in line.split("groups ")[1].split(", ")
    }
    assert len(set(sampled)) == len(sampled) and len(trained(run)) == 120 == len(set(trained(run)))
    replaced = {group for group, kept in logged.items() if not kept} - set(trained(run))
    accounts = [set(trained(run)), replaced, failed - dropped, dropped]
    assert sum(map(len, accounts)) == len(set.union(*accounts)), "none twice"
    if overdue == "wait":
        assert set.union(*accounts) == set(sampled) and not dropped, "none lost"
    else:
        assert dropped and set.union(*accounts) <= set(sampled)
    assert max(ages(run)) <= 2


def test_when_the_refills_of_a_step_are_used_up_it_trains_on_what_there_is(tmp_path: Path) -> None:
    scorer = PlainScorer(same=lambda group, completion: 1.0)
    run = Run(tmp_path, scorer=scorer, prompts=MANY, refill=2.0, total=2)
    run.virtually()
    assert [value for _, value in run.lines.of("groups/refilled")] == [6.0, 6.0]
    assert [value for _, value in run.lines.of("groups/dead")] == [3.0, 3.0]
    assert len(run.trainer.seen) == 2


def test_replacement_is_repeated_bit_for_bit_whoever_was_faster_and_after_a_kill(tmp_path: Path) -> None:
    def start(name: str, seconds) -> Run:
        scorer = SlowScorer(0.1, even=half_without_signal)
        return Run(tmp_path / name, fleet=SlowFleet(seconds), scorer=scorer, prompts=MANY[:40], refill=20.0)

    whole = start("whole", log_normal)
    whole.virtually()
    other = start("other", lambda item: 1 / log_normal(item))
    other.trainer.during_step = kill_at(6)
    with pytest.raises(Killed):
        other.virtually()
    again = start("other", lambda item: 1.0)
    again.virtually()
    kept = [line for line in other.lines.timeless() if line[0] <= 4]
    assert kept + again.lines.timeless() == whole.lines.timeless()
    assert again.trainer.w == whole.trainer.w and rows(tmp_path / "other") == rows(tmp_path / "whole")
    assert whole.fleet.lists[-3:] == again.fleet.lists[-3:]


def test_a_group_that_could_not_be_scored_has_no_signal_either(tmp_path: Path) -> None:
    scorer = PlainScorer(rare=lambda group, c: math.nan if group.prompt.seed % 2 else len(c.token_ids) + c.token_ids[0])
    run = Run(tmp_path, scorer=scorer, prompts=MANY, refill=20.0, total=4)
    run.virtually()
    assert [value for _, value in run.lines.of("advantage/missing")] == [0.0] * 4


def test_an_infinite_score_stops_the_run_and_is_not_replaced(tmp_path: Path) -> None:
    scorer = PlainScorer(broken=lambda group, c: math.inf)
    with pytest.raises(RewardError, match="inf"):
        Run(tmp_path, scorer=scorer, prompts=MANY, refill=2.0).virtually()


# ------------------------------------------------------------------------------------------------ failed prompts


def refuses(*numbers: int):
    return lambda item: "it has 9 tokens, and 8 fit" if item.row["n"] in numbers else None


ROWS = [prompt(n) for n in range(40)]
for number, item in enumerate(ROWS):
    object.__setattr__(item, "origin", f"rows.jsonl:{number + 1}")


@pytest.mark.parametrize("staleness", [0, 1])
def test_a_prompt_that_cannot_be_sampled_is_reported_by_row_and_the_next_takes_its_place(
    tmp_path: Path, staleness: int
) -> None:
    run = Run(tmp_path, fleet=SlowFleet(refuses=refuses(3, 17)), prompts=ROWS, staleness=staleness, total=10, save=10)
    run.virtually()
    assert len(trained(run)) == 30 and not {3, 17} & set(trained(run))
    assert sum(value for _, value in run.lines.of("groups/failed")) == 2
    said = [line for line in run.lines.messages if "not sampled" in line]
    assert sorted(said) == [
        f"grpo: rows.jsonl:{row}: not sampled: it has 9 tokens, and 8 fit; the next prompt takes its place"
        for row in (18, 4)
    ]


def test_more_failed_prompts_in_a_step_than_may_stop_the_run_with_their_rows(tmp_path: Path) -> None:
    run = Run(tmp_path, fleet=SlowFleet(refuses=refuses(*range(0, 40, 2))), prompts=ROWS, groups=20, max_failed=0.1)
    with pytest.raises(DataError, match=r"3 prompts of a step of 20 .* allows \(2\)") as caught:
        run.virtually()
    assert str(caught.value).count("rows.jsonl:") == 3 and "max_failed_prompts" in str(caught.value.remedy)
    assert run.left == []


def test_none_may_fail_where_the_recipe_says_so(tmp_path: Path) -> None:
    run = Run(tmp_path, fleet=SlowFleet(refuses=refuses(3)), prompts=ROWS, groups=40, max_failed=0.0)
    with pytest.raises(DataError, match=r"rows\.jsonl:4"):
        run.virtually()
