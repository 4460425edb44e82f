from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np

from align.report.plots import panels, write_report

PNG = b"\x89PNG\r\n\x1a\n"


def write_stage(folder: Path, lines: list[dict[str, float | None]]) -> None:
    folder.mkdir(parents=True)
    text = "".join(json.dumps({"step": i + 1, "time": 0.0, **line}) + "\n" for i, line in enumerate(lines))
    (folder / "metrics.jsonl").write_text(text)


def size(path: Path) -> tuple[int, int]:
    content = path.read_bytes()
    assert content.startswith(PNG)
    width, height = struct.unpack(">II", content[16:24])
    return width, height


def test_a_run_becomes_one_picture_with_a_panel_for_every_curve(tmp_path: Path) -> None:
    write_stage(tmp_path / "sft", [{"loss/total": 5.0 / (i + 1)} for i in range(100)])
    one = write_report(tmp_path, {"stages": {"sft": {"metrics": {}}}})
    assert one == tmp_path / "report.png"
    first = size(one)
    write_stage(tmp_path / "grpo", [{"loss/total": 1.0, "objective/short/mean": 0.5} for _ in range(10)])
    metrics = {"accuracy": 0.5, "mean_length": 4.0}
    two = write_report(tmp_path, {"stages": {"sft": {"metrics": metrics}, "grpo": {"metrics": metrics}}})
    assert two is not None
    assert size(two)[0] == 4 * first[0] and size(two)[1] == 2 * first[1]  # five panels, four in a row


def test_a_value_that_was_not_finite_is_a_gap_and_no_error(tmp_path: Path) -> None:
    write_stage(tmp_path / "sft", [{"loss/total": None if i % 7 == 0 else 1.0} for i in range(60)])
    summary = {"stages": {"sft": {"metrics": {"accuracy": float("nan"), "mean_length": 1.0}}}}
    path = write_report(tmp_path, summary)
    assert path is not None and size(path)[0] > 0


def test_a_run_without_curves_has_no_picture(tmp_path: Path) -> None:
    write_stage(tmp_path / "merged", [{"kl": 0.0}])
    assert write_report(tmp_path, {"stages": {"merged": {"metrics": {"kl": 0.0}}}}) is None
    assert not (tmp_path / "report.png").exists()


def test_panels_are_chosen_by_what_a_stage_logged() -> None:
    names = {"loss/total", "objective/b/mean", "objective/a/mean", "objective/a/std", "optim/lr", "policy/entropy"}
    assert [p.metric for p in panels(names)] == ["loss/total", "objective/a/mean", "objective/b/mean", "policy/entropy"]


def test_smoothing_keeps_the_level_of_a_constant_and_skips_what_is_missing() -> None:
    from align.report.plots import _smooth

    values = np.array([2.0, np.nan, 2.0, 2.0, np.nan, np.nan, np.nan])
    assert np.array_equal(_smooth(values, 1), [2.0, 2.0, 2.0, 2.0, 2.0, np.nan, np.nan], equal_nan=True)
