"""The tables of exams: a row for each of what was judged, with intervals."""

from __future__ import annotations

import io

from rich.console import Console

from align.report.table import exam_tables


def drawn(summary: dict[str, object]) -> list[str]:
    texts = []
    for table in exam_tables(summary):
        out = io.StringIO()
        Console(file=out, width=80).print(table)
        texts.append(out.getvalue())
    return texts


def test_an_exam_shows_each_judged_model_with_intervals_and_several_are_kept_apart() -> None:
    metrics = {
        "base/right": 0.25, "base/right/ci95": 0.05, "base/accuracy": 0.25, "base/mean_length": 31.0,
        "sft@best/right": 0.75, "sft@best/right/ci95": 0.04, "sft@best/mean_length": 7.25,
    }  # fmt: skip
    losses = {"base/eval/loss": 2.5, "base/eval/accuracies": 0.6, "base/eval/accuracies/ci95": 0.08}
    summary = {
        "stages": {
            "sft": {"steps": 3, "metrics": {"loss/total": 1.0}},
            "exam": {"of": ["base", "sft@best"], "metrics": metrics},
            "neutral": {"of": ["base"], "metrics": losses},
        }
    }
    exam, neutral = drawn(summary)
    assert "exam" in exam and "sft@best" in exam
    assert "0.250±0.05" in exam and "0.750±0.04" in exam
    assert "length" in exam and "31.0" in exam and "7.2" in exam
    assert "0.600±0.08" in neutral and "accuracies" in neutral and "2.5000" in neutral


def test_what_was_not_judged_yet_is_an_empty_cell() -> None:
    [exam] = drawn({"stages": {"exam": {"of": ["sft", "dpo"], "metrics": {"sft/right": 1.0, "sft/right/ci95": 0.1}}}})
    row = next(line for line in exam.splitlines() if "dpo" in line)
    assert "±" not in row


def test_five_columns_fit_a_terminal_of_80() -> None:
    names = ("follows", "overlap", "elsewhere", "knows")
    metrics = {f"release/{name}{end}": 0.8421 for name in names for end in ("", "/ci95")} | {
        "release/mean_length": 19.6
    }
    [exam] = drawn({"stages": {"exam": {"of": ["release"], "metrics": metrics}}})
    assert exam.count("0.842±0.84") == 4 and "release" in exam and "elsewhere" in exam and "…" not in exam
