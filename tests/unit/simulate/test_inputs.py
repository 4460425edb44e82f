"""Inputs: lengths, the service model, what a run measured, and which source wins."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import yaml

from align.errors import RecipeError, RunFolderError
from align.recipe.load import load_recipe
from align.simulate.inputs import gather, workload
from align.simulate.lengths import Empirical, LogNormal
from align.simulate.measured import non_negative, online_stage, read_run
from align.simulate.stage import simulate
from align.simulate.workload import EngineModel

FIXED, EACH, PROMPT, TRAIN, REWARD, PUBLISH, WAIT = 0.02, 0.001, 0.05, 3.0, 0.7, 0.4, 2.0
RECIPE: dict[str, Any] = {
    "name": "run",
    "model": {"path": "model"},
    "stages": [
        {
            "id": "grpo",
            "kind": "online",
            "data": "prompts.jsonl",
            "batch": {"groups": 4, "group_size": 2},
            "rewards": ["numeric"],
            "rollout": {"max_tokens": 100, "workers": 2},
            "steps": 12,
        }
    ],
}


def write_run(folder: Path, **changes: Any) -> Path:
    """A run whose engines have exactly FIXED, EACH and PROMPT: 4 groups of 2 on 2 engines, 12 steps. Episodes wait for
    their environment, one of each group half as long as the other, and have twice as many tokens as were sampled."""
    waits = (0.0, 0.0) if "environment" not in changes else (WAIT, WAIT / 2)
    stage = {**RECIPE["stages"][0], **changes}
    (folder / "grpo" / "rollouts").mkdir(parents=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump({**RECIPE, "stages": [stage]}))
    chance = np.random.default_rng(0)
    lines, rows = [], []
    for step in range(1, 13):
        lengths = chance.integers(5, 90, size=(4, 2))
        engines = [np.concatenate([lengths[0], lengths[2]]), np.concatenate([lengths[1], lengths[3]])]
        generate = max(FIXED * own.max() + EACH * own.sum() + 2 * PROMPT for own in engines) + waits[0]
        seconds = {"generate": generate, "score": REWARD, "group_score": REWARD, "train": TRAIN, "publish": PUBLISH}
        times = {f"time/{name}": value for name, value in seconds.items()}
        times["time/step"] = generate + REWARD + TRAIN + PUBLISH + 0.1
        lines.append({"step": step, "groups/dead": 1.0, "groups/total": 4.0, **times})
        rows += [
            {"step": step, "group_id": 4 * step + group, "token_ids": [0] * int(length)}
            if not waits[0]
            else {
                "step": step,
                "group_id": 4 * step + group,
                "token_ids": [0] * int(2 * length),
                "sampled": [True, False] * int(length),
                "waited_seconds": wait,
            }
            for group in range(4)
            for length, wait in zip(lengths[group], waits, strict=True)
        ]
    (folder / "grpo" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "grpo" / "rollouts" / "step-000012.parquet")
    return folder


def of_run(folder: Path, *overrides: str, **flags: float) -> Any:
    recipe, measured = load_recipe(folder / "recipe.yaml", overrides), read_run(folder)
    stage = online_stage(recipe, None, "recipe")
    inputs = gather(recipe, stage, flags, measured)
    return inputs, workload(recipe, stage, inputs, measured), measured


def test_an_engine_has_the_speeds_that_it_was_given() -> None:
    engine = EngineModel.of(50.0, 4000.0, 256)
    assert engine.alone == pytest.approx(50.0) and engine.peak == pytest.approx(4000.0)
    assert EngineModel.of(50.0, 50.0, 8).step_s(8) == pytest.approx(8 / 50), "no gain from company"
    assert EngineModel.of(50.0, 400.0, 8).step_s(8) == pytest.approx(1 / 50), "no loss from it"
    assert EngineModel.of(30.0, 30.0, 1).alone == pytest.approx(30.0)


@pytest.mark.parametrize("peak", [40.0, 500.0])
def test_speeds_that_no_engine_has_are_refused_with_those_that_it_may_have(peak: float) -> None:
    with pytest.raises(RecipeError, match="from 50 to slots"):
        EngineModel.of(50.0, peak, 8)


def test_log_normal_lengths_have_their_mean_and_are_cut() -> None:
    lengths = LogNormal(100, 0.8, limit=10_000, group_size=8)
    drawn = np.concatenate([lengths.of(n) for n in range(1024)])
    assert drawn.mean() == pytest.approx(100, rel=0.05) and lengths.mean == pytest.approx(drawn.mean(), rel=0.02)
    assert np.log(drawn).std() == pytest.approx(0.8, rel=0.05)
    assert (lengths.of(5) == LogNormal(100, 0.8, limit=10_000, group_size=8).of(5)).all()
    assert max(LogNormal(100, 0.8, limit=50, group_size=8).of(3)) <= 50
    assert LogNormal(100, 0.0, limit=50, group_size=2).mean == 50


def test_a_runs_groups_are_drawn_whole_where_their_size_fits() -> None:
    groups = [np.array([1.0, 10.0]), np.array([2.0, 20.0])]
    whole = Empirical(groups, limit=100, group_size=2)
    assert {tuple(whole.of(n)) for n in range(50)} == {(1.0, 10.0), (2.0, 20.0)}
    apart = Empirical(groups, limit=15, group_size=3)
    assert {int(n) for g in range(50) for n in apart.of(g)} == {1, 2, 10, 15} and len(apart.of(0)) == 3


def test_costs_below_nothing_are_left_out() -> None:
    columns = np.array([[1.0, 1.0], [2.0, 1.0], [3.0, 1.0]])
    assert non_negative(columns, np.array([2.0, 4.0, 6.0])) == pytest.approx((2.0, 0.0))
    assert non_negative(columns, np.array([3.0, 2.0, 1.0])) == pytest.approx((0.0, 2.0))


def test_what_engines_take_is_told_from_a_synchronous_run(tmp_path: Path) -> None:
    measured = read_run(write_run(tmp_path))
    assert (measured.fixed_s, measured.per_sequence_s, measured.prompt_s) == pytest.approx((FIXED, EACH, PROMPT))
    assert (measured.train_s, measured.reward_s, measured.publish_s) == pytest.approx((TRAIN, REWARD, PUBLISH))
    assert measured.loop_s == pytest.approx(0.1) and measured.silent == 0.25 and len(measured.lengths) == 48


def test_what_episodes_wait_for_is_none_of_the_engines_time(tmp_path: Path) -> None:
    inputs, work, measured = of_run(write_run(tmp_path, environment="world.py:World"))
    assert (measured.fixed_s, measured.per_sequence_s, measured.prompt_s) == pytest.approx((FIXED, EACH, PROMPT))
    assert measured.environment_s == WAIT and max(length.max() for length in measured.lengths) < 90
    assert inputs["environment_s"].source == "run" and work.reward_s == pytest.approx(REWARD + WAIT)
    assert simulate(work, 0, turns=200).steps_per_minute == pytest.approx(measured.steps_per_minute, rel=0.03)
    assert simulate(work, 1, turns=200).steps_per_minute > 1.4 * measured.steps_per_minute


def test_a_run_is_predicted_from_what_it_measured(tmp_path: Path) -> None:
    _, work, measured = of_run(write_run(tmp_path))
    predicted = simulate(work, 0, turns=200)
    assert predicted.steps_per_minute == pytest.approx(measured.steps_per_minute, rel=0.03)


def test_flags_win_over_the_run_and_the_run_over_defaults(tmp_path: Path) -> None:
    inputs, work, _ = of_run(write_run(tmp_path), train_s=9.0)
    assert (inputs["train_s"].value, inputs["train_s"].source) == (9.0, "flag")
    assert (inputs["reward_s"].source, inputs["engines"].source) == ("run", "recipe")
    assert inputs["restart_s"].source == "default"
    assert work.train_s == 9.0 and work.engines == 2 and isinstance(work.lengths, Empirical)
    _, work, _ = of_run(tmp_path, length_mean=40.0)
    assert isinstance(work.lengths, LogNormal) and work.lengths.sigma > 0.3, "the run's spread around another mean"


def test_a_runs_times_are_taken_in_proportion_to_the_recipes_batch_and_trainer(tmp_path: Path) -> None:
    folder = write_run(tmp_path)
    _, work, _ = of_run(folder, "stages.grpo.batch.groups=12", "stages.grpo.updates_per_batch=2")
    assert work.train_s == pytest.approx(6 * TRAIN) and work.loop_s == pytest.approx(0.3)
    assert work.publish_s == pytest.approx(PUBLISH)
    _, work, _ = of_run(folder, "placement.trainer.ranks=2")
    assert work.train_s == pytest.approx(TRAIN / 2)


def test_a_run_of_a_version_without_these_times_says_so(tmp_path: Path) -> None:
    folder = write_run(tmp_path)
    path = folder / "grpo" / "metrics.jsonl"
    path.write_text(path.read_text().replace("time/group_score", "time/other"))
    with pytest.raises(RunFolderError, match="has no time/group_score"):
        read_run(folder)


def test_an_asynchronous_run_needs_the_speed_of_its_engines_as_flags(tmp_path: Path) -> None:
    folder = write_run(tmp_path, staleness=1)
    with pytest.raises(RunFolderError, match="asynchronous") as caught:
        of_run(folder)
    assert "staleness: 0" in str(caught.value) and "--engine-speed" in str(caught.value)
    inputs, _, _ = of_run(folder, engine_speed=50.0, engine_peak=2000.0)
    assert inputs["train_s"].source == "run"


def test_a_folder_that_is_no_run_or_too_short_says_so(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match=r"no recipe\.yaml"):
        read_run(tmp_path)
    folder = write_run(tmp_path / "short")
    path = folder / "grpo" / "metrics.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:3]))
    with pytest.raises(RunFolderError, match="1 turns after the first 2"):
        read_run(folder)
    path.unlink()
    with pytest.raises(RunFolderError, match="no metrics"):
        read_run(folder)
