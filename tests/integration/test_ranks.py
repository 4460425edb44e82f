"""`placement: {trainer: {ranks: 2}}` in a real run: the metrics of one, a bit-equal resume, no hang when one dies."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from align.stages import processes
from tests.runs import (
    GONE_S,
    dpo,
    family,
    metrics,
    run,
    sft,
    started,
    stop_at,
    timeless,
    wait_until,
    weights,
    write_data,
    write_recipe,
)

pytestmark = pytest.mark.slow

TWO: dict[str, Any] = {"placement": {"trainer": {"ranks": 2, "threads": 1}}}
OF_RANKS = {"comm/bytes", "time/communicate"}  # what one process has nothing to say of
STAGES = [sft(steps=12, save={"every": 4}), dpo(steps=6)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("ranks")
    write_data(found)
    return found


@pytest.fixture(scope="module")
def two(folder: Path) -> Path:
    run(write_recipe(folder, "two", STAGES, **TWO))
    return folder / "runs" / "two"


def test_two_ranks_report_what_one_process_does(folder: Path, two: Path) -> None:
    run(write_recipe(folder, "one", STAGES, placement={"trainer": {"threads": 1}}))
    require_alike(two, folder / "runs" / "one")


def require_alike(run_folder: Path, other_folder: Path) -> None:
    for stage in ("sft", "dpo"):
        ours, theirs = metrics(run_folder, stage), metrics(other_folder, stage)
        assert len(ours) == len(theirs)
        for mine, other in zip(ours, theirs, strict=True):
            assert mine.keys() - OF_RANKS == other.keys() - OF_RANKS
            for name in ("loss/total", "optim/grad_norm", "eval/loss", "rewards/margins"):
                if name in other:
                    assert mine[name] == pytest.approx(other[name], rel=2e-3, abs=1e-4), (stage, mine["step"], name)
        scored = [line["tokens/scored"] for line in ours if "tokens/scored" in line]
        assert scored == [line["tokens/scored"] for line in theirs if "tokens/scored" in line]


def test_a_run_of_two_ranks_by_zero3_that_was_killed_goes_on_by_zero2_and_then_ends_as_any_other(
    folder: Path, two: Path
) -> None:
    spread = {"placement": {"trainer": {**TWO["placement"]["trainer"], "strategy": {"name": "zero3", "keep_whole": 0}}}}
    recipe = write_recipe(folder, "spread", STAGES, **spread)
    killed = stop_at(recipe, lambda: len(metrics(folder / "runs" / "spread", "sft")) >= 7, signal.SIGKILL)
    assert killed.processes == []
    run(recipe, "--resume", "placement.trainer.strategy=zero2")
    require_alike(folder / "runs" / "spread", two)


def test_two_ranks_that_were_killed_resume_bit_equal(folder: Path, two: Path) -> None:
    recipe = write_recipe(folder, "broken", STAGES, **TWO)
    broken = folder / "runs" / "broken"
    killed = stop_at(recipe, lambda: len(metrics(broken, "sft")) >= 7, signal.SIGKILL)
    assert killed.processes == [] and not (broken / "dpo").exists()
    run(recipe, "--resume")
    for stage in ("sft", "dpo"):
        assert timeless(two, stage) == timeless(broken, stage)
        assert weights(two, stage) == weights(broken, stage)


def test_a_rank_that_dies_ends_the_run_with_its_name_and_leaves_nothing(folder: Path) -> None:
    recipe = write_recipe(folder, "lost", [sft(steps=100_000)], **TWO)
    log = recipe.with_suffix(".log")
    with started(recipe) as process:
        wait_until(lambda: len(metrics(folder / "runs" / "lost", "sft")) >= 3, process, log)
        below = family(process)
        ranks = sorted(p.pid for p in actors(process.pid))
        assert len(ranks) == 2
        os.kill(ranks[1], signal.SIGKILL)
        begun = time.monotonic()
        assert process.wait(90) == 1
        assert time.monotonic() - begun < 45
    message = log.read_text().rpartition("error:")[2]
    assert "rank " in message and "died" in message and "--resume" in message and "Traceback" not in message
    deadline = time.monotonic() + GONE_S
    while any(processes.is_alive(p) for p in below) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not [p for p in below if processes.is_alive(p)]


def actors(pid: int) -> list[psutil.Process]:
    children = psutil.Process(pid).children(recursive=True)
    return [p for p in children if "PolicyActor" in " ".join(p.cmdline())]
