from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest

from align.protocols.fleet import Completion, Group, group_seed
from align.protocols.scorer import ScoreTable
from align.stages.groups import group_metrics, to_trees, untrained
from align.stages.online import greedy_metrics
from tests.unit.stages.online_run import PROMPTS, Run
from tests.unit.stages.plain import PlainFleet, PlainScorer, prompt


def completion(length: int, finish: str = "eos", version: int = 0) -> Completion:
    return Completion(
        token_ids=np.arange(length, dtype=np.int64),
        logps=np.full(length, -0.5, dtype=np.float32),
        versions=np.full(length, version, dtype=np.int32),
        text="x" * length,
        finish=finish,  # type: ignore[arg-type]
    )


def test_each_turn_publishes_its_version_and_the_next_turn_samples_it(tmp_path: Path) -> None:
    run = Run(tmp_path, total=3)
    run()
    assert [c for c in run.trainer.calls if not c.startswith("close")] == [
        "publish 0", "step 0", "publish 1", "step 1", "publish 2", "step 2", "publish 3",
    ]  # fmt: skip
    assert run.lines.of("staleness/max") == [(1, 0.0), (2, 0.0), (3, 0.0)]
    for step, trees in enumerate(run.trainer.trees):
        for tree in trees:
            assert all((branch.versions == step).all() for branch in tree.branches)


def test_groups_reach_the_trainer_by_id_and_cover_every_prompt_once_an_epoch(tmp_path: Path) -> None:
    run = Run(tmp_path, total=5)
    run()
    assert all(ids == sorted(ids) for ids in run.trainer.seen)
    assert sorted(chain.from_iterable(run.trainer.seen)) == list(range(15)), "three epochs of five rows"
    trunks = {tree.id: tree.trunk.token_ids for trees in run.trainer.trees for tree in trees}
    assert all((trunks[i] == PROMPTS[i % 5].token_ids).all() for i in range(15))


def test_a_groups_seed_is_the_hash_of_run_stage_and_group(tmp_path: Path) -> None:
    run = Run(tmp_path, total=2)
    run()
    for (ids, _, _), seeds in zip(run.fleet.asked, run.fleet.seeds, strict=True):
        assert seeds == [group_seed(0, "grpo", i) for i in ids]


def test_a_resumed_stage_repeats_the_undisturbed_one_bit_for_bit(tmp_path: Path) -> None:
    whole = Run(tmp_path / "whole", eval_every=3, eval_at_start=True)
    whole()

    class Killed(Exception): ...

    def kill(step: int) -> None:
        if step == 10:
            raise Killed

    first = Run(tmp_path / "broken", eval_every=3, eval_at_start=True)
    first.trainer.during_step = kill
    with pytest.raises(Killed):
        first()
    (tmp_path / "broken" / "grpo" / "rollouts" / ".writing-step-000010.parquet").write_bytes(b"torn")
    second = Run(tmp_path / "broken", eval_every=3, eval_at_start=True)
    second()
    assert second.trainer.calls[0] == "publish 8"
    kept = [line for line in first.lines.timeless() if line[0] <= 8]
    assert kept + second.lines.timeless() == whole.lines.timeless()
    assert second.trainer.w == whole.trainer.w
    one, two = (sorted((tmp_path / name / "grpo" / "rollouts").iterdir()) for name in ("whole", "broken"))
    assert [p.name for p in one] == [p.name for p in two]
    for a, b in zip(one, two, strict=True):
        assert pyarrow.parquet.read_table(a).equals(pyarrow.parquet.read_table(b))


def test_a_checkpoint_says_how_far_prompts_were_handed_out(tmp_path: Path) -> None:
    run = Run(tmp_path, total=4)
    run()
    state = json.loads((tmp_path / "grpo" / "checkpoints" / "step-000004" / "state.json").read_text())
    assert state["extra"] == {"admission": {"drawn": 12, "running": []}, "objectives": {}}


def test_rollouts_have_every_completion_with_its_scores(tmp_path: Path) -> None:
    fleet = PlainFleet(truncate=lambda group, sample: sample == 1)
    scorer = PlainScorer(
        short=lambda group, c: -float(len(c.token_ids)),
        rare=lambda group, c: math.nan if c.truncated else 1.0,
    )
    Run(tmp_path, total=11, fleet=fleet, scorer=scorer)()
    folder = tmp_path / "grpo" / "rollouts"
    assert sorted(p.name for p in folder.iterdir()) == [f"step-{n:06d}.parquet" for n in (4, 8, 10, 11)], (
        "a file ends at every checkpoint, every tenth turn, and the last"
    )
    rows = [row for path in sorted(folder.iterdir()) for row in pyarrow.parquet.read_table(path).to_pylist()]
    assert len(rows) == 11 * 3 * 4
    assert {row["step"] for row in rows} == set(range(1, 12))
    first = rows[0]
    assert first["objective/short"] == -len(first["token_ids"]) and first["objective/rare"] == 1.0
    assert first["version"] == 0 and first["finish"] == "eos" and first["mean_logp"] < 0
    cut = rows[1]
    assert cut["finish"] == "length" and cut["objective/rare"] is None and cut["trained"] is False


def test_no_version_is_left_behind_but_the_newest_until_the_run_ends(tmp_path: Path) -> None:
    run = Run(tmp_path, total=3)
    seen: list[int] = []
    run.trainer.during_step = lambda step: seen.append(sum(p.is_dir() for p in run.publications.root.iterdir()))
    run()
    assert seen == [1, 1, 1]
    assert not run.publications.root.exists()


def test_greedy_evaluation_samples_one_completion_at_temperature_zero(tmp_path: Path) -> None:
    run = Run(tmp_path, total=2, eval_every=1, eval_at_start=True)
    run()
    greedy = [(size, s.temperature) for _, size, s in run.fleet.asked if size == 1]
    assert greedy == [(1, 0.0)] * 3
    assert [step for step, _ in run.lines.of("eval/accuracy")] == [0, 1, 2]
    assert [step for step, _ in run.lines.of("eval/short")] == [0, 1, 2]


# ---------------------------------------------------------------------------------------- groups to trees


def table(scores: list[float], dropped: tuple[int, ...] = ()) -> ScoreTable:
    return ScoreTable(("a",), np.asarray(scores, np.float32)[:, None], ("reward",), dropped=dropped)


def test_truncated_completions_are_masked_or_kept_as_asked() -> None:
    groups = [Group(prompt(0), (completion(2), completion(3, "length")))]
    assert untrained(groups, table([0, 1]), "mask").tolist() == [False, True]
    assert untrained(groups, table([0, 1]), "keep").tolist() == [False, False]


def test_a_dropped_group_is_not_trained() -> None:
    groups = [Group(prompt(0), (completion(2),)), Group(prompt(1), (completion(2),))]
    assert untrained(groups, table([0, 1], dropped=(1,)), "keep").tolist() == [False, True]


def test_branches_carry_what_was_sampled_and_nan_is_masked() -> None:
    groups = [Group(prompt(3), (completion(2, version=5), completion(4), completion(1)))]
    [tree] = to_trees(groups, np.asarray([0.5, math.nan, -1.0], np.float32), np.asarray([False, False, True]))
    good, unknown, masked = tree.branches
    assert tree.id == 3 and not tree.trunk.loss_mask.any()
    assert good.loss_mask.all() and good.advantages is not None and good.advantages.tolist() == [0.5, 0.5]
    assert good.behavior_logps is not None and good.behavior_logps.dtype == np.float32
    assert good.versions is not None and good.versions.tolist() == [5, 5]
    for branch in (unknown, masked):
        assert not branch.loss_mask.any() and branch.advantages is not None and not branch.advantages.any()


def test_an_empty_completion_leaves_its_group_and_a_group_of_them_leaves_the_step() -> None:
    groups = [Group(prompt(0), (completion(0), completion(2))), Group(prompt(1), (completion(0),))]
    masked = untrained(groups, table([0, 1, 0]), "keep")
    trees = to_trees(groups, np.zeros(3, np.float32), masked)
    assert masked.tolist() == [True, False, True]
    assert [(t.id, len(t.branches)) for t in trees] == [(0, 1)]


def test_groups_without_signal_are_counted_as_dead() -> None:
    groups = [Group(prompt(n), (completion(2), completion(4, "length"))) for n in range(3)]
    advantages = np.asarray([0, 0, 1, -1, 0, 2], np.float32)
    masked = np.asarray([False, False, False, False, False, True])
    metrics = group_metrics(groups, advantages, masked, version=1)
    assert metrics["groups/dead"] == 2 and metrics["groups/total"] == 3
    assert metrics["completion/truncated"] == 0.5 and metrics["completion/mean_length"] == 3
    assert metrics["staleness/mean"] == 1 and metrics["tokens/generated"] == 18


def test_what_rounding_leaves_of_a_zero_advantage_is_no_signal() -> None:
    groups = [Group(prompt(n), (completion(2), completion(4))) for n in range(2)]
    advantages = np.asarray([3e-17, -3e-17, 1, -1], np.float32)
    assert group_metrics(groups, advantages, np.zeros(4, bool), version=0)["groups/dead"] == 1


def test_accuracy_is_the_objective_of_that_name_or_else_the_first() -> None:
    groups = [Group(prompt(n), (completion(n + 1),)) for n in range(2)]
    scores = np.asarray([[1.0, 0.0], [math.nan, 1.0]], np.float32)
    named = greedy_metrics(groups, ScoreTable(("short", "accuracy"), scores, ("reward",) * 2))
    assert named["accuracy"] == 0.5 and named["short"] == 1.0 and named["mean_length"] == 1.5
    assert named["missing"] == 0.25
    first = greedy_metrics(groups, ScoreTable(("short", "other"), scores, ("reward",) * 2))
    assert first["accuracy"] == 1.0 and not any(name.startswith("reward/") for name in first)
    metrics = {
        "reward/a/error_rate": 0.5,
        "reward/a/failed_calls": 1.0,
        "reward/b/error_rate": 0.0,
        "reward/a/calls": 2,
    }
    failed = greedy_metrics(groups, ScoreTable(("short", "a"), scores, ("reward",) * 2, metrics=metrics))
    found = {name: value for name, value in failed.items() if name.startswith("reward/")}
    assert found == {"reward/a/error_rate": 0.5, "reward/a/failed_calls": 1.0}


def test_a_prompts_weight_multiplies_the_advantages_of_its_group_after_normalisation(tmp_path: Path) -> None:
    weights = [2.0, 1.0, 0.5, 1.0, 4.0]
    heavy = [replace(prompt, weight=weight) for prompt, weight in zip(PROMPTS, weights, strict=True)]
    plain, weighted = (Run(tmp_path / str(n), prompts=some, total=2) for n, some in enumerate((PROMPTS, heavy)))
    for run in (plain, weighted):
        run()
    seen = False
    for before, after in zip(plain.trainer.trees, weighted.trainer.trees, strict=True):
        for tree, other in zip(before, after, strict=True):
            weight = weights[tree.id % len(weights)]
            for one, two in zip(tree.branches, other.branches, strict=True):
                assert one.advantages is not None and two.advantages is not None
                np.testing.assert_allclose(two.advantages, weight * one.advantages, rtol=1e-6)
                seen |= weight != 1.0 and bool(one.advantages.any())
    assert seen
