"""The bench script's sums, on figures that are easy to add up."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.bench.phase_times import COLUMNS, run_times, show


def write_run(folder: Path) -> None:
    entry = {"state": "finished", "begun": 110.0, "ended": 150.0}
    run = {"started": 100.0, "stages": {"grpo": entry, "later": {"state": "running", "begun": 150.0}}}
    (folder / "run.json").write_text(json.dumps(run))
    times = {"time/generate": 2.0, "time/score": 1.0, "time/train": 3.0, "time/publish": 0.5, "time/step": 7.0}
    lines = [
        {"step": 1, "time": 90.0, **times},  # of an earlier start, which a resume went on from
        {"step": 2, "time": 125.0, **times},
        {"step": 3, "time": 136.0, **times, "time/eval": 4.0},
    ]
    (folder / "grpo").mkdir()
    (folder / "grpo" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_every_second_of_a_stage_is_in_one_column(tmp_path: Path) -> None:
    write_run(tmp_path)
    rows = run_times(tmp_path)
    assert rows["grpo"] == pytest.approx(
        {
            "total": 40.0,
            "start-up": 8.0,  # the first step of this start ended 15 s after it and took 7
            "generate": 4.0,
            "score": 2.0,
            "train": 6.0,
            "publish": 1.0,
            "eval": 4.0,
            "other": 15.0,
        }
    )
    assert sum(rows["grpo"][column] for column in COLUMNS[1:]) == pytest.approx(rows["grpo"]["total"])


def test_the_start_of_the_driver_is_a_row_and_unfinished_stages_are_none(tmp_path: Path) -> None:
    write_run(tmp_path)
    rows = run_times(tmp_path)
    assert list(rows) == ["(start)", "grpo", "sum"]
    assert rows["(start)"]["start-up"] == pytest.approx(10.0)
    assert rows["sum"]["total"] == pytest.approx(50.0)
    table = show(rows)
    assert [line.split()[0] for line in table.splitlines()] == ["total", "(start)", "grpo", "sum"]
    assert len({len(line) for line in table.splitlines()[1:]}) == 1
