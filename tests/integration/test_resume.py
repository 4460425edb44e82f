"""kill -9 and Ctrl-C of an online stage, then --resume: bit-equal to the undisturbed run. The other kinds are proved
by tests/prove/prove_resume.py."""

from __future__ import annotations

import os
import signal
import tempfile
from pathlib import Path

import pytest

from align.stages.checkpoint import list_checkpoints
from tests.runs import grpo, metrics, rollouts, run, stop_at, timeless, weights, write_data, write_recipe

pytestmark = [pytest.mark.slow, pytest.mark.vllm]

STAGE = grpo(**{"from": None}, adapter={"kind": "lora", "rank": 4, "alpha": 8}, steps=8)


def ours() -> set[str]:
    """Folders outside the run folder that runs make."""
    places = (Path("/dev/shm"), Path(tempfile.gettempdir()))
    return {str(p) for place in places if place.is_dir() for p in place.glob("align-*")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resume")
    write_data(folder)
    return folder


@pytest.fixture(scope="module")
def whole(folder: Path) -> Path:
    """The undisturbed run."""
    run(write_recipe(folder, "whole", [STAGE]))
    return folder / "runs" / "whole"


def assert_equal(one: Path, two: Path) -> None:
    assert timeless(one, "grpo") == timeless(two, "grpo")
    assert weights(one, "grpo") == weights(two, "grpo")
    assert rollouts(one, "grpo") == rollouts(two, "grpo")
    files = [sorted(os.listdir(run_folder / "grpo" / "rollouts")) for run_folder in (one, two)]
    assert files[0] == files[1]


def test_a_killed_online_stage_resumes_bit_equal_and_leaves_nothing(folder: Path, whole: Path) -> None:
    recipe = write_recipe(folder, "killed", [STAGE])
    run_folder = folder / "runs" / "killed"
    before = ours()
    code, left = stop_at(recipe, lambda: len(metrics(run_folder, "grpo")) >= 5, signal.SIGKILL)
    assert code == -signal.SIGKILL
    assert left == [], "every process of the run died with its driver"
    assert ours() <= before, "sockets and published versions went with it"
    steps = [p.name for p in list_checkpoints(run_folder / "grpo" / "checkpoints")]
    assert "step-000004" in steps and "step-000008" not in steps
    assert "continues from step" in run(recipe, "--resume")
    assert_equal(whole, run_folder)


def test_ctrl_c_saves_ends_everything_and_resumes_bit_equal(folder: Path, whole: Path) -> None:
    recipe = write_recipe(folder, "stopped", [STAGE])
    run_folder = folder / "runs" / "stopped"
    before = ours()
    code, left = stop_at(recipe, lambda: len(metrics(run_folder, "grpo")) >= 3, signal.SIGINT)
    text = (folder / "stopped.log").read_text()
    assert code == 130 and left == [] and ours() <= before
    assert "--resume" in text and "Traceback" not in text
    done = len(metrics(run_folder, "grpo"))
    latest = list_checkpoints(run_folder / "grpo" / "checkpoints")[-1]
    assert latest.name == f"step-{done:06d}", "the step in progress was finished and saved"
    run(recipe, "--resume")
    assert timeless(whole, "grpo") == timeless(run_folder, "grpo")
    assert weights(whole, "grpo") == weights(run_folder, "grpo")
    assert rollouts(whole, "grpo") == rollouts(run_folder, "grpo")
