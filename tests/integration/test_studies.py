"""A study of two objectives with real runs: a sweep from shared first stages, its front, its rollouts under other
weights, and a soup of its adapters. Every test looks at the same sweep."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from align.stages.files import read_json
from tests.runs import grpo, sft, weights, write_data, write_recipe

pytestmark = [pytest.mark.slow]

JUDGE = """from rewards import Objective, reward


@reward
def correct(samples):
    return [float(s.completion.strip() == s.row["reference_answer"]) for s in samples]


@reward(objectives={"length": Objective(kind="cost")})
def length(samples):
    return [float(len(s.token_ids)) for s in samples]
"""
REWARDS = [{"use": "judge.py:correct"}, {"use": "judge.py:length"}]
ROLLOUT = {"name": "transformers", "max_tokens": 6}


def align(folder: Path, *words: str) -> str:
    """What `align words...` prints in `folder`; it must end well."""
    command = [sys.executable, "-m", "align.cli.main", *words]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=560)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a recipe whose two weight vectors were swept, both runs at once."""
    folder = tmp_path_factory.mktemp("study")
    write_data(folder)
    (folder / "judge.py").write_text(JUDGE)
    online = grpo(rollout=ROLLOUT, rewards=REWARDS, steps=3, loss={"name": "grpo"}, optim={"lr": 3e-3})
    online |= {"from": "sft", "adapter": {"rank": 4, "alpha": 8}, "objectives": {"combine": "decoupled"}}
    exam = {"id": "exam", "kind": "evaluate", "of": ["grpo"], "data": {"path": "sums.jsonl", "limit": 16}}
    exam |= {"rewards": REWARDS, "rollout": {**ROLLOUT, "temperature": 0}}
    del online["eval"]
    stages = [sft(steps=20, save={"every": 20}), online, exam]
    write_recipe(folder, "study", stages)
    align(folder, "sweep", "study.yaml", "--simplex", "2", "--parallel", "2")
    return folder


RUNS = ("correct-0_length-1", "correct-1_length-0")


def test_every_vector_has_a_run_of_its_own_on_one_first_stage(study: Path) -> None:
    root = study / "runs" / "study" / "sweep"
    starts = [read_json(root / name / "run.json")["stages"]["grpo"]["start"]["base"] for name in RUNS]
    assert starts == [str(root / "shared" / "sft" / "model")] * 2
    assert weights(root / RUNS[0], "grpo") != weights(root / RUNS[1], "grpo")
    assert not (root / RUNS[0] / "sft").exists()


def test_a_sweep_that_is_done_starts_nothing_again(study: Path) -> None:
    said = align(study, "sweep", "study.yaml", "--simplex", "2", "--resume")
    assert "started" not in said and said.count("kept") == 3


def test_the_front_of_the_sweep_is_drawn(study: Path) -> None:
    root = study / "runs" / "study" / "sweep"
    said = align(study, "pareto", str(root))
    found = json.loads((root / "front.json").read_text())
    assert [point["label"] for point in found["points"]] == list(RUNS) and found["prompts"] == 16
    assert found["objectives"] == {"correct": "reward", "length": "cost"}
    assert "prompts of 'exam' are among those that 'grpo' trained on" in said


def test_old_rollouts_under_the_same_weights_have_the_advantages_that_the_run_trained_on(study: Path) -> None:
    run = study / "runs" / "study" / "sweep" / RUNS[0]
    said = align(study, "rescore", str(run), "--weights", "length=1", "--out", str(study / "same.parquet"))
    assert "correlation +1.000 with the run's; 0.0 % of" in said and "note:" not in said
    said = align(study, "rescore", str(run), "--weights", "correct=1,length=0", "--combine", "weighted_sum")
    assert "correlation +1.000" not in said


def test_a_soup_of_the_ends_is_examined_without_training(study: Path) -> None:
    adapters = [str(study / "runs" / "study" / "sweep" / name / "grpo" / "adapter") for name in RUNS]
    words = ["--weights", "0.5,0.5", "--weights", "0,1", "--parallel", "2", "--recipe", "study.yaml", "--out", "soups"]
    said = align(study, "soup", *adapters, *words)
    assert "rank 8, 14 modules" in said
    found = json.loads((study / "soups" / "front.json").read_text())
    assert [point["label"] for point in found["points"]] == ["0.5_0.5", "0_1"]
    trained = read_json(study / "runs" / "study" / "sweep" / RUNS[1] / "summary.json")["stages"]["grpo"]["metrics"]
    end = found["points"][1]["objectives"]
    assert end["length"]["mean"] == pytest.approx(trained["length"]), "an end of the grid is the adapter itself"
