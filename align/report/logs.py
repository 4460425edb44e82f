"""Where metrics go: metrics.jsonl, TensorBoard event files, Weights & Biases. No torch, no tensorflow."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, TextIO

from align.errors import SetupError
from align.jsonl import read_lines
from align.oserrors import naming
from align.recipe.schema import Recipe


class Log(Protocol):
    """One destination of metrics. `resumed_at`: steps that a resumed stage has behind it (0 for a fresh one)."""

    def open_stage(self, stage: str, resumed_at: int) -> None: ...

    def write(self, stage: str, step: int, now: float, metrics: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class MetricsFile:
    """`<run>/<stage>/metrics.jsonl`: one object a step, flushed line by line, so that a kill loses no finished step.

    Each line is {"step": int, "time": seconds since 1970, "<group>/<name>": float, ...}. A number that is not finite
    is written as null, because NaN is not JSON; readers must treat null as not finite, never as absent.
    """

    def __init__(self, run_folder: Path):
        self._run_folder = run_folder
        self._files: dict[str, TextIO] = {}

    def open_stage(self, stage: str, resumed_at: int) -> None:
        folder = self._run_folder / stage
        folder.mkdir(parents=True, exist_ok=True)
        if stage in self._files:  # it starts again, and what was written was cut back
            self._files[stage].close()
        self._files[stage] = (folder / "metrics.jsonl").open("a", encoding="utf-8")

    def write(self, stage: str, step: int, now: float, metrics: Mapping[str, float]) -> None:
        numbers = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        line = json.dumps({"step": step, "time": round(now, 3), **numbers}, allow_nan=False)
        with naming(self._files[stage].name):
            self._files[stage].write(line + "\n")
            self._files[stage].flush()

    def close(self) -> None:
        for file in self._files.values():
            with naming(file.name), file:  # closed, whatever becomes of what is still to be written
                file.flush()
        self._files.clear()


def read_metrics(stage_folder: Path) -> list[dict[str, Any]]:
    """The lines of a stage's metrics.jsonl in order; an empty list where the stage wrote none. A last line that a kill
    tore is left out. Raises RunFolderError with the line where another is damaged."""
    path = stage_folder / "metrics.jsonl"
    return read_lines(path, numbered="step")[0] if path.exists() else []


class TensorBoardLog:
    """Scalars of each stage under `<run>/tensorboard/<stage>/`, one TensorBoard run a stage."""

    def __init__(self, run_folder: Path):
        # tensorboard's own writer falls back to its small stand-in where tensorflow is not installed
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._event, self._summary, self._writer = event_pb2, summary_pb2, EventFileWriter
        self._run_folder = run_folder
        self._writers: dict[str, EventFileWriter] = {}

    def open_stage(self, stage: str, resumed_at: int) -> None:
        folder = self._run_folder / "tensorboard" / stage
        if stage in self._writers:
            self._writers[stage].close()
        self._writers[stage] = self._writer(str(folder), flush_secs=10)
        if resumed_at:  # readers drop what an earlier process wrote from this step on
            start = self._event.SessionLog(status=self._event.SessionLog.START)
            event = self._event.Event(wall_time=time.time(), step=resumed_at + 1, session_log=start)
            self._writers[stage].add_event(event)

    def write(self, stage: str, step: int, now: float, metrics: Mapping[str, float]) -> None:
        values = [self._summary.Summary.Value(tag=name, simple_value=value) for name, value in metrics.items()]
        summary = self._summary.Summary(value=values)
        self._writers[stage].add_event(self._event.Event(wall_time=now, step=step, summary=summary))

    def close(self) -> None:
        for writer in self._writers.values():
            writer.close()
        self._writers.clear()


class WandbLog:
    """Weights & Biases, when `report.wandb` asks for it; its keys go to `wandb.init` (project, entity, mode, ...).

    Stages share one W&B run; `<stage>/step` is the x axis of `<stage>/*`, because W&B's own step may never go back.
    """

    def __init__(self, run_folder: Path, recipe: Recipe):
        try:
            import wandb
        except ImportError as cause:
            raise SetupError(
                "the recipe asks for Weights & Biases, and the package `wandb` is not installed",
                where="report.wandb",
                remedy="pip install wandb, or take `report.wandb` out of the recipe",
            ) from cause
        settings = {"project": "align", "name": recipe.name, "dir": str(run_folder), **(recipe.report.wandb or {})}
        self._run = wandb.init(config=recipe.model_dump(mode="json", by_alias=True), **settings)

    def open_stage(self, stage: str, resumed_at: int) -> None:
        self._run.define_metric(f"{stage}/step")
        self._run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")

    def write(self, stage: str, step: int, now: float, metrics: Mapping[str, float]) -> None:
        self._run.log({f"{stage}/step": step, **{f"{stage}/{name}": value for name, value in metrics.items()}})

    def close(self) -> None:
        self._run.finish()


def open_logs(run_folder: Path, recipe: Recipe) -> list[Log]:
    """The logs that the recipe's `report:` asks for; metrics.jsonl always.

    Raises:
        SetupError: W&B is asked for and not installed.
    """
    logs: list[Log] = [MetricsFile(run_folder)]
    if recipe.report.tensorboard:
        logs.append(TensorBoardLog(run_folder))
    if recipe.report.wandb is not None:
        logs.append(WandbLog(run_folder, recipe))
    return logs
