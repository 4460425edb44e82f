"""What every training stage does around its turns: resume, evaluate, report, save, stop.

The stage supplies one coroutine that performs turn k. Everything that must survive a kill is in `LoopState`; whatever
else a turn needs is arithmetic of k, so that a resumed run repeats the undisturbed one.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from align.errors import Interrupted, RecipeError
from align.protocols.trainer import Metrics, Trainer
from align.recipe.parts import Best, Save
from align.stages.checkpoint import (
    TRAINER,
    Checkpoint,
    checkpoint_name,
    discard_after,
    find_latest,
    prune,
    write_checkpoint,
)
from align.stages.files import written_aside
from align.stages.idle import closing_lines, told, why_idle
from align.stages.idle import words as idle_words
from align.stages.lost_words import lost_words


class Report(Protocol):
    """Where a stage's progress goes: the metrics file, the console, the plots."""

    def stage_started(self, stage_id: str, total: int, kind: str, *, done: int = 0) -> None: ...

    def step(self, stage_id: str, step: int, metrics: Metrics) -> None: ...

    def stage_finished(self, stage_id: str, summary: dict[str, Any]) -> None: ...

    def message(self, text: str) -> None: ...


@dataclass(frozen=True)
class LoopState:
    """What a checkpoint holds beside the trainer. step: turns done; tokens: trained so far; seconds: spent in turns
    so far, over all processes; best: value and step of the best checkpoint; evaluation: the latest eval metrics;
    idle: turns that trained nothing, by reason; extra: the stage's own (prompt cursor, objective state), JSON values
    only."""

    step: int = 0
    tokens: float = 0.0
    seconds: float = 0.0
    best: tuple[float, int] | None = None
    evaluation: Metrics = field(default_factory=dict)
    idle: dict[str, int] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "best": None if self.best is None else list(self.best),
            "evaluation": self.evaluation,
            "idle": self.idle,
            "extra": self.extra,
        }

    @classmethod
    def from_json(cls, value: Any) -> LoopState:
        best = value["best"]
        return cls(**{**value, "best": None if best is None else (float(best[0]), int(best[1]))})


@dataclass(frozen=True)
class StageResult:
    """What a finished stage reports: turns, seconds, trained tokens, its last metrics, paths of its artefacts, and how
    many turns trained nothing, by reason."""

    steps: int
    seconds: float
    tokens: float
    metrics: Metrics
    artefacts: dict[str, str]
    idle: dict[str, int] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {
            "steps": self.steps,
            "seconds": round(self.seconds, 3),
            "tokens": self.tokens,
            "tokens_per_second": round(self.tokens / self.seconds, 2) if self.seconds > 0 else 0.0,
            "metrics": self.metrics,
            "artefacts": self.artefacts,
            **({"idle": self.idle} if self.idle else {}),
        }


def every_steps(every: int | str, total: int) -> int:
    """Turns between two events: a number, or a percentage of the stage rounded up to whole turns."""
    if isinstance(every, str):
        return max(1, math.ceil(float(every.rstrip("%")) / 100 * total - 1e-9))
    return every


@dataclass
class Loop:
    """One stage's loop. `artefact` names the final folder: "adapter" or "model".

    turn(step) performs turn `step` (from 0) and returns its metrics; evaluate() returns metrics named "eval/...";
    extra() is the stage's own state, asked for at every checkpoint.
    """

    stage_id: str
    kind: str
    total: int
    folder: Path
    trainer: Trainer
    report: Report
    stop: asyncio.Event
    save: Save
    artefact: str
    eval_every: int | None = None
    eval_at_start: bool = False
    evaluate: Callable[[], Awaitable[Metrics]] | None = None
    extra: Callable[[], dict[str, Any]] = dict

    def __post_init__(self) -> None:
        self.state = LoopState()
        self.last_metrics: Metrics = {}
        self.save_every = every_steps(self.save.every, self.total)

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    async def restore(self, latest: Checkpoint | None) -> LoopState:
        """Bring trainer and loop to `latest` (None: the stage's start); newer remains are removed."""
        self.folder.mkdir(parents=True, exist_ok=True)
        discard_after(self.checkpoints, latest.step if latest else 0)
        if latest is not None:
            await self.trainer.restore(latest.trainer)
            self.state = LoopState.from_json(latest.state)
            self.report.message(f"{self.stage_id}: continues from step {latest.step}")
        return self.state

    async def run(self, turn: Callable[[int], Awaitable[Metrics]]) -> StageResult:
        """Turns from the restored step to the last, then the artefacts. Raises Interrupted once stopped and saved."""
        self.report.stage_started(self.stage_id, self.total, self.kind, done=self.state.step)
        if self.state.step == 0 and self.eval_at_start and self.evaluate is not None:
            self.report.step(self.stage_id, 0, await self._evaluated())
        for step in range(self.state.step, self.total):
            await self._one(turn, step)
            if self.stop.is_set() and self.state.step < self.total:
                raise Interrupted(
                    f"stopped after step {self.state.step} of {self.total}; a checkpoint was saved",
                    where=f"stage {self.stage_id!r}",
                    remedy="the same command with --resume continues",
                )
        return await self._finish()

    async def _one(self, turn: Callable[[int], Awaitable[Metrics]], step: int) -> None:
        begun = time.perf_counter()
        metrics = await turn(step)
        seconds = time.perf_counter() - begun
        done = step + 1
        saves = done == self.total or done % self.save_every == 0
        tokens = metrics.get("tokens/trained", 0.0)
        metrics = {**metrics, "time/step": seconds, "tokens/per_second": tokens / seconds}
        if self.evaluate is not None and self._evaluation_due(done, saves):
            metrics |= await self._evaluated()
        self.state = replace(
            self.state, step=done, tokens=self.state.tokens + tokens, seconds=self.state.seconds + seconds
        )
        self.last_metrics = metrics
        self.report.step(self.stage_id, done, metrics)
        self._note_idle(metrics)
        if (lost := lost_words(self.stage_id, done, metrics)) is not None:
            self.report.message(lost)
        if saves and self.save.best is not None:
            self._note_best(self.save.best, metrics)
        if saves or self.stop.is_set():
            await self._save()

    def _note_idle(self, metrics: Metrics) -> None:
        """Say that a turn trained nothing: at once the first time, then ever more rarely."""
        reason = why_idle(metrics)
        if reason is None:
            return
        idle = {**self.state.idle, reason: self.state.idle.get(reason, 0) + 1}
        self.state = replace(self.state, idle=idle)
        if told(idle[reason]):
            self.report.message(idle_words(self.stage_id, self.state.step, idle[reason], reason))

    def _evaluation_due(self, done: int, saves: bool) -> bool:
        """At its own turns, and wherever a checkpoint is weighed against the best; a stop changes neither, so that a
        resumed run evaluates where the undisturbed one does."""
        regular = self.eval_every is not None and (done % self.eval_every == 0 or done == self.total)
        return regular or (saves and self.save.best is not None)

    async def _evaluated(self) -> Metrics:
        assert self.evaluate is not None
        begun = time.perf_counter()
        metrics = await self.evaluate()
        self.state = replace(self.state, evaluation=metrics)
        return {**metrics, "time/eval": time.perf_counter() - begun}

    async def _save(self) -> None:
        self.state = replace(self.state, extra=self.extra())
        await write_checkpoint(self.checkpoints, self.state.step, self.state.to_json(), self.trainer.save)
        prune(self.checkpoints, self.save.keep, self.state.best[1] if self.state.best else None)

    def _note_best(self, best: Best, metrics: Metrics) -> None:
        if best.metric not in metrics:
            known = ", ".join(sorted(name for name in metrics if name.startswith("eval/"))) or "none: add `eval:`"
            raise RecipeError(
                f"{best.metric!r} is not among the evaluation's metrics",
                where=f"stages.{self.stage_id}.save.best.metric",
                remedy=f"choose one of: {known}",
            )
        value, old = float(metrics[best.metric]), self.state.best
        better = old is None or (value > old[0] if best.mode == "max" else value < old[0])
        if better and value == value:  # a NaN is never the best
            self.state = replace(self.state, best=(value, self.state.step))

    async def _finish(self) -> StageResult:
        """Write the last model as a folder that anybody can load; the best one lies in its checkpoint."""
        for line in closing_lines(self.stage_id, self.state.step, self.state.idle):
            self.report.message(line)
        artefacts = {self.artefact: str(await self._write(self.folder / self.artefact))}
        if self.state.best is not None:
            best = self.checkpoints / checkpoint_name(self.state.best[1])
            artefacts[f"best_{self.artefact}"] = str(best / TRAINER / self.artefact)
        return StageResult(
            steps=self.state.step,
            seconds=self.state.seconds,
            tokens=self.state.tokens,
            metrics={**self.last_metrics, **self.state.evaluation},
            artefacts=artefacts,
            idle=self.state.idle,
        )

    async def _write(self, target: Path) -> Path:
        with written_aside(target) as aside:
            await self.trainer.write_model(aside)
        return target


def latest_checkpoint(folder: Path, report: Report) -> Checkpoint | None:
    """The stage's newest checkpoint that holds; each damaged one is reported by name."""
    latest, refused = find_latest(folder / "checkpoints")
    for error in refused:
        report.message(f"checkpoint ignored: {error}")
    return latest
