"""An online stage with its loop and checkpoints on plain objects: in real time, or on a virtual clock where engines,
trainer and rewards take the seconds that a test gives them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from align.protocols.fleet import FailedPrompt, Group, PromptItem, Sampling
from align.protocols.scorer import ErrorBudget, ScoreTable
from align.protocols.trainer import Metrics
from align.protocols.trees import Tree
from align.recipe.objectives import Objectives
from align.recipe.parts import Save
from align.stages.groups import PromptCursor
from align.stages.loop import Loop, StageResult, latest_checkpoint
from align.stages.monitor import Monitor
from align.stages.online import OnlinePlan, OnlineStage
from align.stages.publication import PublicationFolder
from align.stages.rollout_log import RolloutLog
from align.stages.virtual_clock import run_virtually
from tests.unit.stages.plain import Lines, PlainFleet, PlainScorer, PlainTrainer, prompt

PROMPTS = [prompt(n) for n in range(5)]
SAMPLING = Sampling(max_tokens=8)
PLANNED = {"groups", "group_size", "objectives", "truncated", "staleness", "overdue", "refill", "max_failed"}


class Run:
    """One start of a stage: by default 3 groups of 4 over 5 prompts, 12 turns. settings: of its plan or its loop."""

    def __init__(
        self,
        folder: Path,
        *,
        total: int = 12,
        trainer: PlainTrainer | None = None,
        fleet: PlainFleet | None = None,
        scorer: PlainScorer | None = None,
        prompts: Sequence[PromptItem] = PROMPTS,
        watched: bool = False,
        **settings: Any,
    ) -> None:
        self.trainer, self.fleet, self.lines = trainer or PlainTrainer(), fleet or PlainFleet(), Lines()
        self.scorer = scorer or PlainScorer()
        self.publications = PublicationFolder(folder)
        planned: dict[str, Any] = {"groups": 3, "group_size": 4, "objectives": Objectives()}
        planned |= {key: settings.pop(key) for key in PLANNED & settings.keys()}
        self.stage = OnlineStage(
            OnlinePlan(stage_id="grpo", total=total, sampling=SAMPLING, **planned),
            trainer=self.trainer,
            fleet=self.fleet,
            scorer=self.scorer,
            cursor=PromptCursor(prompts, 0, "grpo", 7),
            publications=self.publications,
            log=RolloutLog(folder / "grpo" / "rollouts"),
            decode=lambda ids: " ".join(map(str, ids)),
            tell=self.lines.message,
            monitor=self._monitor(planned.get("staleness", 0)) if watched else None,
        )
        self.stop = asyncio.Event()
        self.loop = Loop(
            stage_id="grpo",
            kind="online",
            total=total,
            folder=folder / "grpo",
            trainer=self.trainer,
            report=self.lines,
            stop=self.stop,
            save=Save(every=settings.pop("save", 4)),
            artefact="adapter",
            extra=self.stage.extra,
            evaluate=lambda: self.stage.evaluate(prompts[:2], self.scorer),
            **settings,
        )
        self.left: list[str] = []  # tasks that outlived the stage

    def _monitor(self, staleness: int) -> Monitor:
        return Monitor(
            self.trainer, self.fleet, PROMPTS[0], SAMPLING, tolerance=0.01, ahead=staleness > 0, tell=self.lines.message
        )

    async def whole(self) -> StageResult:
        try:
            await self.loop.restore(latest_checkpoint(self.loop.folder, self.lines))
            async with self.stage:
                await self.stage.start(self.loop.state.step, self.loop.state.extra)
                return await self.loop.run(self.stage.turn)
        finally:
            self.left = [task.get_name() for task in asyncio.all_tasks() if task is not asyncio.current_task()]
            self.seconds = asyncio.get_running_loop().time()

    def __call__(self, run: Callable[..., StageResult] = asyncio.run) -> StageResult:
        try:
            return run(self.whole())
        finally:
            self.publications.close()

    def virtually(self) -> StageResult:
        return self(run_virtually)


# ------------------------------------------------------------------------------------------------ with delays


class SlowTrainer(PlainTrainer):
    """A step takes `seconds`."""

    def __init__(self, seconds: float = 1.0) -> None:
        super().__init__()
        self.seconds = seconds

    async def step(self, trees: Sequence[Tree], *, step: int, progress: float) -> Metrics:
        await asyncio.sleep(self.seconds)
        return await super().step(trees, step=step, progress=progress)


class SlowScorer(PlainScorer):
    """A call takes `seconds`, whatever it is given; `calls` are the group ids of each."""

    def __init__(self, seconds: float = 0.0, **objectives: Any) -> None:
        super().__init__(**objectives)
        self.seconds = seconds
        self.calls: list[list[int]] = []
        self.budgets: list[ErrorBudget | None] = []

    async def score(self, groups: Sequence[Group], budget: ErrorBudget | None = None) -> ScoreTable:
        self.calls.append([group.prompt.group_id for group in groups])
        self.budgets.append(budget)
        await asyncio.sleep(self.seconds)
        return await super().score(groups, budget)


class SlowFleet(PlainFleet):
    """Any number of engines: a group takes `seconds(item)`, and finishes on the version it began with.

    refuses: the message for prompts that cannot be sampled, None for the others. dies: how often the engine of a group
    dies on it; each time it is sampled again from the beginning, on the newest version.
    """

    def __init__(
        self,
        seconds: Callable[[PromptItem], float] = lambda item: 1.0,
        *,
        refuses: Callable[[PromptItem], str | None] = lambda item: None,
        dies: Callable[[PromptItem], int] = lambda item: 0,
    ) -> None:
        super().__init__()
        self.seconds, self.refuses, self.dies = seconds, refuses, dies
        self.lists: list[list[int]] = []

    async def stream(
        self, prompts: Sequence[PromptItem], group_size: int, sampling: Sampling
    ) -> AsyncIterator[Group | FailedPrompt]:
        assert self.version is not None, "nothing was published"
        self.lists.append([item.group_id for item in prompts])
        tasks = [asyncio.create_task(self._sampled(item, group_size)) for item in prompts]
        try:
            for next_one in asyncio.as_completed(tasks):
                yield await next_one
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _sampled(self, item: PromptItem, group_size: int) -> Group | FailedPrompt:
        message = self.refuses(item)
        if message is not None:
            return FailedPrompt(item, "too long", message)
        for _ in range(self.dies(item)):
            await asyncio.sleep(self.seconds(item) / 2)
        group = self._group(item, group_size)
        await asyncio.sleep(self.seconds(item))
        return group


def log_normal(item: PromptItem) -> float:
    """A duration of mean 1.65 and median 1 that belongs to the group."""
    return float(np.exp(np.random.default_rng(item.seed).standard_normal()))
