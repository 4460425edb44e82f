"""Thirty asynchronous steps on Ray and vLLM, killed on the way: ages within the bound, every group trained once."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.runs import Stopped, grpo, metrics, rollouts, run, stop_at, write_data, write_recipe

pytestmark = [pytest.mark.slow, pytest.mark.vllm]

STEPS, GROUPS, SIZE, STALENESS = 30, 4, 4, 2


def test_an_asynchronous_stage_that_is_killed_trains_on_every_group_once_and_on_none_too_old(tmp_path: Path) -> None:
    write_data(tmp_path)
    stage = grpo(
        **{"from": None},
        adapter={"kind": "lora", "rank": 4, "alpha": 8},
        batch={"groups": GROUPS, "group_size": SIZE},
        steps=STEPS,
        staleness=STALENESS,
        save={"every": 5},
    )
    recipe = write_recipe(tmp_path, "ahead", [stage])
    folder = tmp_path / "runs" / "ahead"
    killed = stop_at(recipe, lambda: len(metrics(folder, "grpo")) >= 12, signal.SIGKILL)
    assert killed == Stopped(-signal.SIGKILL, [], [])
    assert "continues from step" in run(recipe, "--resume")

    rows = rollouts(folder, "grpo")
    assert [line["step"] for line in metrics(folder, "grpo")] == list(range(1, STEPS + 1))
    assert len(rows) == STEPS * GROUPS * SIZE
    assert len({(row["group_id"], row["sample"]) for row in rows}) == len(rows), "no group is trained twice"
    # the stream of prompts is taken without gaps: group ids of epoch e lie in [64 e, 64 (e + 1))
    whole_epochs = len({row["group_id"] for row in rows if row["group_id"] < 64})
    assert whole_epochs == 64, "and none is lost"
    ages = [row["step"] - 1 - row["version"] for row in rows]
    assert min(ages) >= 0 and 0 < max(ages) <= STALENESS
    seen = [line["monitor/max_difference"] for line in metrics(folder, "grpo") if "monitor/max_difference" in line]
    assert seen and max(seen) < 1e-3, "engines sample from what the trainer computes"
    assert all(line["staleness/max"] <= STALENESS for line in metrics(folder, "grpo"))
