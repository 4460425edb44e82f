"""kill -9 and Ctrl-C of an online stage, then --resume: bit-equal to the undisturbed run. The other kinds are proved
by tests/prove/prove_resume.py."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from align.stages.checkpoint import list_checkpoints
from tests.runs import Stopped, grpo, metrics, rollouts, run, stop_at, timeless, weights, write_data, write_recipe

pytestmark = [pytest.mark.slow, pytest.mark.vllm]

STAGE = grpo(**{"from": None}, adapter={"kind": "lora", "rank": 4, "alpha": 8}, steps=12)


def test_an_online_stage_that_is_stopped_then_killed_resumes_bit_equal_and_leaves_nothing(tmp_path: Path) -> None:
    write_data(tmp_path)
    run(write_recipe(tmp_path, "whole", [STAGE]))
    recipe = write_recipe(tmp_path, "broken", [STAGE])
    whole, broken = tmp_path / "runs" / "whole", tmp_path / "runs" / "broken"

    stopped = stop_at(recipe, lambda: len(metrics(broken, "grpo")) >= 3, signal.SIGINT)
    text = recipe.with_suffix(".log").read_text()
    assert stopped == Stopped(130, [], []), "Ctrl-C ends engines and actors"
    assert "--resume" in text and "Traceback" not in text
    latest = list_checkpoints(broken / "grpo" / "checkpoints")[-1]
    assert latest.name == f"step-{len(metrics(broken, 'grpo')):06d}", "the step in progress was finished and saved"

    killed = stop_at(recipe, lambda: len(metrics(broken, "grpo")) >= 7, signal.SIGKILL, "--resume")
    assert killed == Stopped(-signal.SIGKILL, [], []), "processes, sockets and published versions die with the driver"
    assert not (broken / "grpo" / "adapter").exists(), "it was killed before its end"

    assert "continues from step" in run(recipe, "--resume")
    assert timeless(whole, "grpo") == timeless(broken, "grpo")
    assert weights(whole, "grpo") == weights(broken, "grpo")
    assert rollouts(whole, "grpo") == rollouts(broken, "grpo")
