from __future__ import annotations

import io
import json
import math
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from rich.console import Console

from align.errors import SetupError
from align.recipe.schema import Recipe
from align.report import progress as progress_module
from align.report.logs import read_metrics
from align.report.progress import LiveDisplay, Reporter, StageProgress, headline


def recipe(**report: object) -> Recipe:
    stages = [{"id": "sft", "kind": "sft", "data": "rows.jsonl"}]
    return Recipe.model_validate({"name": "trial", "model": {"path": "m"}, "stages": stages, "report": report})


def run_stage(reporter: Reporter, steps: range, total: int = 4, done: int = 0) -> None:
    reporter.stage_started("sft", total, "sft", done=done)
    for step in steps:
        reporter.step("sft", step, {"loss/total": 1.0 / step, "tokens/trained": 100.0})
    reporter.stage_finished("sft", {"seconds": 3.0})


def test_every_step_is_one_line_of_metrics_jsonl_as_soon_as_it_is_reported(tmp_path: Path) -> None:
    reporter = Reporter(tmp_path, recipe(), console=False)
    reporter.stage_started("sft", 2, "sft")
    reporter.step("sft", 1, {"loss/total": 0.5})
    (line,) = read_metrics(tmp_path / "sft")
    assert line["step"] == 1 and line["loss/total"] == 0.5 and line["time"] > 1.6e9
    reporter.close()


def test_a_resumed_stage_appends_to_its_metrics(tmp_path: Path) -> None:
    for steps, done in ((range(1, 3), 0), (range(3, 5), 2)):
        reporter = Reporter(tmp_path, recipe(), console=False)
        run_stage(reporter, steps, done=done)
        reporter.close()
    assert [line["step"] for line in read_metrics(tmp_path / "sft")] == [1, 2, 3, 4]


def test_a_number_that_is_not_finite_is_null_because_nan_is_not_json(tmp_path: Path) -> None:
    reporter = Reporter(tmp_path, recipe(), console=False)
    reporter.stage_started("sft", 1, "sft")
    reporter.step("sft", 1, {"loss/total": math.nan, "grad/norm": math.inf})
    reporter.close()
    text = (tmp_path / "sft" / "metrics.jsonl").read_text()
    assert "NaN" not in text and "Infinity" not in text
    assert json.loads(text)["loss/total"] is None and json.loads(text)["grad/norm"] is None


def test_tensorboard_reads_back_the_scalars_and_forgets_what_a_resume_repeats(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    first = Reporter(tmp_path, recipe(), console=False)
    run_stage(first, range(1, 4))
    first.close()
    second = Reporter(tmp_path, recipe(), console=False)
    run_stage(second, range(3, 5), done=2)
    second.close()
    events = EventAccumulator(str(tmp_path / "tensorboard" / "sft")).Reload()
    scalars = events.Scalars("loss/total")
    assert [s.step for s in scalars] == [1, 2, 3, 4]
    assert [s.value for s in scalars] == pytest.approx([1.0, 1 / 2, 1 / 3, 1 / 4])


def test_no_event_files_when_the_recipe_turns_tensorboard_off(tmp_path: Path) -> None:
    reporter = Reporter(tmp_path, recipe(tensorboard=False), console=False)
    run_stage(reporter, range(1, 3))
    reporter.close()
    assert not (tmp_path / "tensorboard").exists()


def test_wandb_that_is_asked_for_and_missing_is_an_error_with_a_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(SetupError, match="pip install wandb") as caught:
        Reporter(tmp_path, recipe(wandb={"project": "p"}), console=False)
    assert caught.value.where == "report.wandb"


def test_wandb_gets_every_stage_with_an_x_axis_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, object]] = []

    class Run:
        def define_metric(self, name: str, step_metric: str | None = None) -> None:
            calls.append(("define", (name, step_metric)))

        def log(self, values: dict[str, float]) -> None:
            calls.append(("log", values))

        def finish(self) -> None:
            calls.append(("finish", None))

    def init(**settings: object) -> Run:
        calls.append(("init", settings))
        return Run()

    wandb = ModuleType("wandb")
    wandb.init = init  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    reporter = Reporter(tmp_path, recipe(wandb={"project": "mine", "mode": "offline"}), console=False)
    run_stage(reporter, range(1, 2))
    reporter.close()
    settings = calls[0][1]
    assert isinstance(settings, dict)
    assert settings["project"] == "mine" and settings["mode"] == "offline" and settings["name"] == "trial"
    assert ("define", ("sft/*", "sft/step")) in calls
    assert ("log", {"sft/step": 1, "sft/loss/total": 1.0, "sft/tokens/trained": 100.0}) in calls
    assert calls[-1] == ("finish", None)


def test_without_a_terminal_the_stage_is_a_few_plain_lines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress_module, "PLAIN_INTERVAL_S", 1000.0)
    reporter = Reporter(tmp_path, recipe())
    reporter.message("data: 3 rows kept [none refused]")
    run_stage(reporter, range(1, 5))
    reporter.close()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "data: 3 rows kept [none refused]"
    assert lines[1] == "sft: sft, 4 steps"
    assert lines[2].startswith("sft: 1/4  ETA ") and "loss 1.000" in lines[2] and "tok/s" in lines[2]
    assert lines[3].startswith("sft: done, 4 steps, 3 s") and len(lines) == 4
    assert "\x1b" not in "".join(lines)


def test_on_a_terminal_the_bar_is_gone_when_the_stage_is_done() -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=120)
    display = LiveDisplay(console)
    stage = StageProgress("grpo", "online", 2, 0, started=0.0)
    display.started(stage)
    stage.add(1, 2.0, {"loss/total": 0.25, "objective/correct/mean": 0.5})
    display.stepped(stage)
    display.finished(stage, 4.0)
    display.close()
    shown = screen.getvalue()
    assert "0/2" in shown and "ETA -:--" in shown
    assert shown.rstrip().endswith("grpo: done, 1 steps, 4 s  loss 0.250  correct 0.500")


def test_eta_and_rate_come_from_the_latest_steps_only() -> None:
    stage = StageProgress("sft", "sft", 200, 0, started=0.0)
    stage.add(1, 100.0, {"tokens/trained": 50.0})  # the first step compiled something
    for step in range(2, 62):
        stage.add(step, 100.0 + step, {"tokens/trained": 50.0})
    assert stage.seconds_per_step == pytest.approx(1.0)
    assert stage.tokens_per_second == pytest.approx(50.0)
    assert stage.eta == "2:19"


def test_the_line_shows_loss_preference_accuracy_and_each_objective() -> None:
    metrics = {"loss/total": 1.0, "rewards/accuracies": 0.7, "objective/short/mean": 0.2, "objective/short/std": 9.0}
    assert headline(metrics) == {"loss": 1.0, "accuracy": 0.7, "short": 0.2}
    assert headline({"completion/mean_length": 4.06, "completion/truncated": 0.0}) == {"length": 4.06}
    assert headline({"sft/accuracy": 0.5, "sft/mean_length": 9.0, "sft/missing": 0.0}) == {
        "sft accuracy": 0.5,
        "sft mean length": 9.0,
    }


def test_the_closing_table_names_every_stage_its_figures_and_what_it_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    entry = {"steps": 300, "seconds": 61.2, "tokens": 9, "tokens_per_second": 12345.0}
    figures = {"loss/total": 0.51234}
    summary = {
        "stages": {
            "sft": {**entry, "metrics": figures, "artefacts": {"model": "runs/demo/sft/model"}},
            "release": {"steps": 0, "seconds": 2.0, "tokens": 0, "metrics": {}, "artefacts": {}},
        }
    }
    reporter = Reporter(tmp_path, recipe())
    reporter.closing_table(summary)
    reporter.close()
    out = capsys.readouterr().out
    row = next(line for line in out.splitlines() if "sft " in line)
    assert [cell.strip() for cell in row.strip("│ ").split("│")] == ["sft", "300", "61", "12,345", "0.512"]
    assert "release" in out and "sft: model in runs/demo/sft/model" in out
    assert "without training" not in out and "layout" not in out


def test_the_closing_table_says_how_a_stage_was_computed_and_why_that_was_slower(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    entry = {"steps": 3, "seconds": 6.0, "metrics": {}, "artefacts": {}}
    plain = {"layout": "shared", "attention": "sdpa", "words": "packed", "slower": [], "notes": []}
    rows = {"layout": "padded", "attention": "sdpa", "words": "a sequence a row", "notes": []}
    stages = {"sft": {**entry, "forward": plain}, "dpo": {**entry, "forward": rows | {"slower": ["m.conv is off"]}}}
    reporter = Reporter(tmp_path, recipe())
    reporter.closing_table({"stages": stages})
    reporter.close()
    out = capsys.readouterr().out
    assert "shared (sdpa)" in out and "padded (sdpa)" in out
    assert "dpo: slower than it could be: a sequence a row; m.conv is off" in out and "sft: slower" not in out


def test_importing_the_reporter_imports_no_torch() -> None:
    code = "import sys, align.report.progress, align.report.quiet; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
