"""Several updates on one batch: which groups an update takes, what it is told, and what a turn reports."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from align.protocols.trainer import Metrics
from align.protocols.trees import Segment, Tree
from align.recipe.stages import OnlineStage
from align.stages.updates import UpdatePlan, Updates, carrying, merged
from tests.unit.stages.plain import PlainTrainer
from tests.unit.stages.test_online import Run


def group(number: int, lengths: Sequence[int] = (3, 0, 2)) -> Tree:
    """A group with a completion of each length; one of length 0 stands for one that is masked, of 4 tokens."""
    branches = tuple(Segment(np.arange(n or 4), np.full(n or 4, n > 0)) for n in lengths)
    return Tree(number, Segment(np.arange(3), np.zeros(3, dtype=bool)), branches)


class Watched(PlainTrainer):
    """Keeps the progress of every update, and which groups it was asked the log-probabilities of, and when."""

    def __init__(self) -> None:
        super().__init__()
        self.progress: list[float] = []
        self.asked: list[tuple[list[int], float]] = []

    async def step(self, trees: Sequence[Tree], *, step: int, progress: float) -> Metrics:
        self.progress.append(progress)
        return await super().step(trees, step=step, progress=progress)

    async def logps(self, trees: Sequence[Tree]) -> list[list[np.ndarray]]:
        self.asked.append(([tree.id for tree in trees], self.w))
        return await super().logps(trees)


def turn(plan: UpdatePlan, groups: int, *, step: int = 0, total: int = 4) -> tuple[Watched, Metrics]:
    trainer = Watched()
    trees = [group(n) for n in range(groups)]
    metrics = asyncio.run(Updates(trainer, plan).train(trees, step=step, total=total))
    return trainer, metrics


def test_every_group_is_used_as_often_as_the_batch_is_gone_over_each_time_in_one_minibatch() -> None:
    trainer, metrics = turn(UpdatePlan(passes=3, minibatches=2), 6)
    assert len(trainer.seen) == metrics["train/updates"] == 6
    first, second = trainer.seen[:2]
    assert sorted(first + second) == list(range(6)) and len(first) == len(second) == 3
    assert trainer.seen == [first, second] * 3, "the same parts in every pass, so that each is packed alike"


def test_which_groups_share_a_minibatch_depends_on_seed_and_turn_alone() -> None:
    plan = UpdatePlan(minibatches=2, seed=5)
    assert turn(plan, 12, step=3)[0].seen == turn(plan, 12, step=3)[0].seen
    drawn = [turn(plan, 12, step=k)[0].seen for k in range(4)] + [turn(UpdatePlan(minibatches=2, seed=6), 12)[0].seen]
    assert len({str(seen) for seen in drawn}) == len(drawn)
    assert all(part == sorted(part) for seen in drawn for part in seen)


def test_the_schedule_counts_updates() -> None:
    plan = UpdatePlan(passes=2, minibatches=3)
    progress = [p for step in range(2) for p in turn(plan, 6, step=step, total=2)[0].progress]
    assert progress == pytest.approx([n / 12 for n in range(12)])
    assert turn(UpdatePlan(), 6, step=3, total=7)[0].progress == [3 / 7]


def test_fewer_groups_than_minibatches_make_fewer_updates_at_their_own_places_in_the_schedule() -> None:
    trainer, metrics = turn(UpdatePlan(passes=2, minibatches=4), 3, total=1)
    assert [len(part) for part in trainer.seen] == [1] * 6 and metrics["train/updates"] == 6
    assert trainer.progress == pytest.approx([0, 1 / 8, 2 / 8, 4 / 8, 5 / 8, 6 / 8])


def test_proximal_log_probabilities_are_those_before_the_turns_first_update_and_stay_in_every_pass() -> None:
    trainer, metrics = turn(UpdatePlan(passes=2, minibatches=2, proximal=True), 4)
    assert [ids for ids, _ in trainer.asked] == trainer.seen[:2], "asked for as they will be packed"
    assert {w for _, w in trainer.asked} == {1.0} and trainer.w != 1.0
    for trees in trainer.trees:
        for tree in trees:
            assert tree.trunk.proximal_logps is None
            for branch in tree.branches:
                assert branch.proximal_logps is not None and branch.proximal_logps.dtype == np.float32
                assert branch.proximal_logps.tolist() == [-1.0 if scored else 0.0 for scored in branch.loss_mask]
    assert metrics["time/proximal"] >= 0


def test_a_single_pass_asks_for_no_log_probabilities_of_its_first_minibatch() -> None:
    trainer, _ = turn(UpdatePlan(minibatches=3, proximal=True), 6)
    assert [ids for ids, _ in trainer.asked] == trainer.seen[1:]
    carried = [{tree.branches[0].proximal_logps is not None for tree in trees} for trees in trainer.trees]
    assert carried == [{False}, {True}, {True}], "its own forward is the policy at the start"


@pytest.mark.parametrize("plan", [UpdatePlan(proximal=True), UpdatePlan(passes=2, minibatches=2)])
def test_one_update_or_a_ratio_to_the_sampler_costs_no_forward(plan: UpdatePlan) -> None:
    trainer, metrics = turn(plan, 4)
    assert trainer.asked == [] and "time/proximal" not in metrics


def test_values_stand_where_tokens_are_scored() -> None:
    mask = np.asarray([False, True, False, True])
    tree = Tree(0, group(0).trunk, (Segment(np.arange(4), mask), Segment(np.arange(2), np.zeros(2, bool))))
    first, second = carrying(tree, [np.asarray([-1.0, -2.0], np.float32), np.zeros(0, np.float32)]).branches
    assert first.proximal_logps is not None and first.proximal_logps.tolist() == [0.0, -1.0, 0.0, -2.0]
    assert second.proximal_logps is not None and second.proximal_logps.tolist() == [0.0, 0.0]


def test_a_turn_reports_sums_of_times_and_counts_the_largest_gap_and_means_of_the_rest() -> None:
    first = {"loss/total": 1.0, "time/train": 2.0, "tokens/trained": 10.0, "train/microbatches": 1.0, "comm/bytes": 8.0}
    first |= {"mismatch/max_abs": 0.1, "mismatch/masked_sequences": 2.0, "policy/clip_fraction": 0.2}
    second = {name: 3 * value for name, value in first.items()}
    del second["policy/clip_fraction"]  # no token was scored
    assert merged([first, second]) == pytest.approx(
        {
            "train/updates": 2.0, "loss/total": 2.0, "time/train": 8.0, "tokens/trained": 40.0,
            "train/microbatches": 4.0, "comm/bytes": 32.0, "mismatch/max_abs": 0.3, "mismatch/masked_sequences": 8.0,
            "policy/clip_fraction": 0.2,
        }
    )  # fmt: skip
    assert merged([first]) == {**first, "train/updates": 1.0}


def test_a_plan_is_what_the_recipe_says() -> None:
    stage = {"id": "g", "kind": "online", "data": "p.jsonl", "rewards": "numeric", "updates_per_batch": 2}
    for loss, proximal in (("grpo", True), ({"name": "grpo", "correction": "off"}, False)):
        recipe = OnlineStage.model_validate({**stage, "minibatches": 4, "loss": loss})
        assert UpdatePlan.of(recipe, 9) == UpdatePlan(passes=2, minibatches=4, seed=9, proximal=proximal)
    assert UpdatePlan.of(recipe, 9).per_turn == 8


def online(folder: Path, **settings: Any) -> Run:
    run = Run(folder, **settings)
    run.stage.updates = Updates(run.trainer, UpdatePlan(passes=2, minibatches=3, seed=7, proximal=True))
    return run


def test_a_stage_publishes_once_a_turn_however_many_updates_it_makes(tmp_path: Path) -> None:
    run = online(tmp_path, total=2)
    run()
    assert [c for c in run.trainer.calls if not c.startswith("close")] == [
        "publish 0", *["step 0"] * 6, "publish 1", *["step 1"] * 6, "publish 2",
    ]  # fmt: skip
    assert run.lines.of("train/updates") == [(1, 6.0), (2, 6.0)]
    assert run.lines.of("staleness/max") == [(1, 0.0), (2, 0.0)]


def test_a_stage_killed_between_two_updates_of_a_turn_resumes_bit_for_bit(tmp_path: Path) -> None:
    whole = online(tmp_path / "whole")
    whole()

    class Killed(Exception): ...

    broken = online(tmp_path / "broken")

    def kill(step: int) -> None:
        if step == 6 and broken.trainer.calls.count("step 6") == 4:
            raise Killed

    broken.trainer.during_step = kill
    with pytest.raises(Killed):
        broken()
    second = online(tmp_path / "broken")
    second()
    assert second.trainer.calls[0] == "publish 4"
    kept = [line for line in broken.lines.timeless() if line[0] <= 4]
    assert kept + second.lines.timeless() == whole.lines.timeless()
    assert second.trainer.w == whole.trainer.w
