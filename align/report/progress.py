"""What the user sees while a recipe runs: one live line a stage, or plain lines where the output is no terminal."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn

from align.recipe.schema import Recipe
from align.report.logs import open_logs
from align.report.screen import cut, real, screen_again, shown
from align.report.table import artefact_lines, exam_tables, forward_lines, stage_table

PLAIN_INTERVAL_S = 10.0
WINDOW = 20


@dataclass
class StageProgress:
    """Counts of one running stage. Rates are over the last `WINDOW` steps: the first ones compile and warm up."""

    stage: str
    kind: str
    total: int
    step: int
    started: float
    metrics: Mapping[str, float] = field(default_factory=dict)
    recent: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=WINDOW + 1))

    def __post_init__(self) -> None:
        self.recent.append((self.started, 0.0))

    def add(self, step: int, now: float, metrics: Mapping[str, float]) -> None:
        self.step, self.metrics = step, metrics
        self.recent.append((now, metrics.get("tokens/trained", 0.0)))

    @property
    def seconds_per_step(self) -> float | None:
        steps = len(self.recent) - 1
        return (self.recent[-1][0] - self.recent[0][0]) / steps if steps else None

    @property
    def tokens_per_second(self) -> float | None:
        """Trained tokens over wall time; generation, scoring and publishing included where the stage has them."""
        seconds = self.recent[-1][0] - self.recent[0][0]
        tokens = sum(tokens for _, tokens in list(self.recent)[1:])
        return tokens / seconds if seconds > 0 and tokens > 0 else None

    @property
    def eta(self) -> str:
        if self.seconds_per_step is None:
            return "-:--"
        minutes, seconds = divmod(round((self.total - self.step) * self.seconds_per_step), 60)
        hours, minutes = divmod(minutes, 60)
        return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"

    @property
    def headline(self) -> str:
        shown = headline(self.metrics).items()
        parts = [
            f"{label} {value:.1f}" if label.endswith("length") else f"{label} {value:.3f}" for label, value in shown
        ]
        if self.tokens_per_second is not None:
            parts.append(f"{self.tokens_per_second:,.0f} tok/s")
        return "  ".join(parts)


def headline(metrics: Mapping[str, float]) -> dict[str, float]:
    """The few numbers worth a place on the line, by metric name: loss, preference accuracy, mean of each objective,
    tokens of a completion, and what an evaluation found."""
    shown: dict[str, float] = {}
    if "loss/total" in metrics:
        shown["loss"] = metrics["loss/total"]
    if "rewards/accuracies" in metrics:
        shown["accuracy"] = metrics["rewards/accuracies"]
    for name, value in metrics.items():
        group, _, rest = name.partition("/")
        if group == "objective" and rest.endswith("/mean"):
            shown[rest.removesuffix("/mean")] = value
        elif name == "completion/mean_length":
            shown["length"] = value
        elif rest in ("accuracy", "mean_length"):
            shown[f"{group} {rest.replace('_', ' ')}"] = value
    return shown


class Display(Protocol):
    def started(self, progress: StageProgress) -> None: ...

    def stepped(self, progress: StageProgress) -> None: ...

    def finished(self, progress: StageProgress, seconds: float) -> None: ...

    def close(self) -> None: ...


class LiveDisplay:
    """One bar on a terminal, redrawn by rich; a finished stage leaves one line above it."""

    def __init__(self, console: Console):
        self._console = console
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", style="bold", markup=False),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("ETA {task.fields[eta]}"),
            TextColumn("{task.fields[headline]}", markup=False),
            console=console,
            transient=True,
        )
        self._task: TaskID | None = None

    def started(self, progress: StageProgress) -> None:
        self.close()
        self._progress.start()
        screen_again()
        self._task = self._progress.add_task(
            progress.stage, total=progress.total, completed=progress.step, eta=progress.eta, headline="starting"
        )

    def stepped(self, progress: StageProgress) -> None:
        if self._task is not None:
            self._progress.update(
                self._task, completed=progress.step, eta=progress.eta, headline=shown(progress.headline) or "working"
            )

    def finished(self, progress: StageProgress, seconds: float) -> None:
        self.close()
        self._console.print(shown(_finished_line(progress, seconds)), markup=False, highlight=False)

    def close(self) -> None:
        if self._task is not None:
            self._progress.remove_task(self._task)
            self._task = None
        self._progress.stop()


class PlainDisplay:
    """Lines for a log file: the first step, one about every ten seconds, and the stage's end."""

    def __init__(self, console: Console):
        self._console = console
        self._printed_at: float | None = None

    def started(self, progress: StageProgress) -> None:
        behind = f", {progress.step} behind" if progress.step else ""
        steps = f", {progress.total} steps" if progress.total > 1 else ""
        self._print(f"{progress.stage}: {progress.kind}{steps}{behind}")
        self._printed_at = None

    def stepped(self, progress: StageProgress) -> None:
        if progress.step >= progress.total:
            return  # the stage's last line says the same
        now = time.monotonic()
        if self._printed_at is not None and now - self._printed_at < PLAIN_INTERVAL_S:
            return
        self._printed_at = now
        self._print(f"{progress.stage}: {progress.step}/{progress.total}  ETA {progress.eta}  {progress.headline}")

    def finished(self, progress: StageProgress, seconds: float) -> None:
        self._print(_finished_line(progress, seconds))

    def close(self) -> None:
        pass

    def _print(self, line: str) -> None:
        # soft_wrap: a log file has no width; markup off: "[x]" in a message is text
        self._console.print(shown(line.rstrip()), soft_wrap=True, markup=False, highlight=False)


def _finished_line(progress: StageProgress, seconds: float) -> str:
    steps = f"{progress.step} steps, " if progress.total > 1 else ""
    return f"{progress.stage}: done, {steps}{seconds:.0f} s  {progress.headline}".rstrip()


class Reporter:
    """Shows a run and logs its metrics. Used by one thread: the driver's event loop.

    Args:
        run_folder: `<run>/<stage>/metrics.jsonl` and `<run>/tensorboard/<stage>/` are written below it.
        recipe: its `report:` chooses the logs, its name is W&B's run name.
        console: False shows nothing (the logs are still written).

    Raises:
        SetupError: W&B is asked for and not installed.
    """

    def __init__(self, run_folder: Path, recipe: Recipe, *, console: bool = True):
        self._console = Console(file=real(sys.stdout), quiet=not console)
        self._display: Display = (LiveDisplay if self._console.is_terminal else PlainDisplay)(self._console)
        self._logs = open_logs(run_folder, recipe)
        self._stages: dict[str, StageProgress] = {}

    def stage_started(self, stage: str, total: int, kind: str, *, done: int = 0) -> None:
        """`done`: steps that a resumed stage has behind it; metrics.jsonl has been cut back to them already."""
        progress = StageProgress(stage, kind, total, done, time.monotonic())
        self._stages[stage] = progress
        for log in self._logs:
            log.open_stage(stage, done)
        self._display.started(progress)

    def step(self, stage_id: str, step: int, metrics: Mapping[str, float]) -> None:
        """Records one finished step (counted from 1) of a started stage."""
        progress = self._stages[stage_id]
        progress.add(step, time.monotonic(), metrics)
        now = time.time()
        for log in self._logs:
            log.write(stage_id, step, now, metrics)
        self._display.stepped(progress)

    def stage_finished(self, stage_id: str, summary: Mapping[str, Any]) -> None:
        """`summary`: the stage's entry of summary.json."""
        progress = self._stages[stage_id]
        self._display.finished(progress, float(summary.get("seconds", time.monotonic() - progress.started)))

    def message(self, text: str) -> None:
        """One plain line, above the live display where there is one."""
        self._console.print(shown(cut(text)), soft_wrap=True, markup=False, highlight=False)

    def closing_table(self, summary: Mapping[str, Any]) -> None:
        """The table of all stages, from the content of summary.json, and where what they made lies."""
        self._display.close()
        self._console.print(stage_table(summary))
        for table in exam_tables(summary):
            self._console.print(table)
        for line in [*forward_lines(summary), *artefact_lines(summary)]:
            self.message(line)

    def close(self) -> None:
        """Ends the display and writes what the logs still hold; safe to call twice and after an error."""
        self._display.close()
        for log in self._logs:
            log.close()
        self._logs = []
