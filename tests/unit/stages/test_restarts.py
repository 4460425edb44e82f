"""A stage whose trainer is lost is run again; one that makes no progress is not."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from align.errors import AlignError, LostError, RanksError
from align.stages.metrics_file import last_step
from align.stages.restarts import Restarts
from align.stages.runfolder import RUN, RunFolder

LOST = LostError("rank 1 died", remedy="--resume continues")


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    (tmp_path / "sft").mkdir()
    return RunFolder(tmp_path, {"stages": {}, "processes": []}, "")


def survive(run: RunFolder, outcomes: list[Any], allowed: int) -> tuple[Any, list[str]]:
    """What comes of attempts that reach a step and then end as told: (step, error or result) each."""
    said: list[str] = []
    restarts, left = Restarts(allowed, run, said.append), iter(outcomes)

    async def attempt() -> Any:
        step, outcome = next(left)
        (run.path / "sft" / "metrics.jsonl").write_text("".join(f'{{"step": {n + 1}}}\n' for n in range(step)))
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    return asyncio.run(restarts.survive("sft", attempt)), said


def test_each_restart_is_in_the_run_folder_with_its_step_and_cause(run: RunFolder) -> None:
    (run.path / "sft" / ".writing-step-000004").mkdir()
    result, said = survive(run, [(3, LOST), (9, RanksError("rank 0 is gone")), (12, "done")], allowed=2)
    assert result == "done" and len(said) == 2
    noted = json.loads((run.path / RUN).read_text())["restarts"]
    assert [(n["stage"], n["step"], n["cause"]) for n in noted] == [
        ("sft", 3, "rank 1 died"),
        ("sft", 9, "rank 0 is gone"),
    ]
    assert Restarts(2, run, said.append).count("sft") == 2 and Restarts(2, run, said.append).count("dpo") == 0
    assert not (run.path / "sft" / ".writing-step-000004").exists(), "half a checkpoint is no checkpoint"


@pytest.mark.parametrize(
    ("outcomes", "allowed", "message"),
    [
        ([(3, LOST), (3, LOST)], 9, "lost again after step 3: the cause stays"),
        ([(0, LOST), (0, LOST)], 9, "lost again after step 0"),
        ([(3, LOST), (4, LOST), (5, LOST)], 2, "restarted 2 times, as placement.max_restarts allows"),
        ([(3, LOST)], 0, r"^rank 1 died\n"),
    ],
)
def test_a_loss_at_the_same_step_or_one_too_many_ends_the_run(
    run: RunFolder, outcomes: list[Any], allowed: int, message: str
) -> None:
    with pytest.raises(LostError, match=message) as ended:
        survive(run, outcomes, allowed)
    assert ended.value.remedy == LOST.remedy and ended.value.exit_code == 1


def test_what_is_no_loss_ends_the_run_at_once(run: RunFolder) -> None:
    with pytest.raises(AlignError, match="out of memory"):
        survive(run, [(3, AlignError("the trainer failed: out of memory"))], allowed=3)
    assert "restarts" not in run.state


def test_the_last_step_is_that_of_the_last_whole_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert last_step(path) == 0
    path.write_text('{"step": 1}\n{"step": 2}\n{"ste')
    assert last_step(path) == 2
