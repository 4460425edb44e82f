"""What the online loop itself costs per group: admission, streams, scoring calls, advantages, trees, rollout files and
the buffer, with an engine, a reward and a trainer that answer at once. The goal is 2 ms at 1,000 groups per step.

    python -m tests.bench.orchestration [--groups 1000 --group-size 8 --tokens 64 --steps 12 --staleness 0 1]
        [--dynamic]     replace groups without signal (here half of them): they count as groups, and each is judged
        [--record]      write the figures to tests/bench/results/
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from align.protocols.fleet import Completion, FailedPrompt, Group, PromptItem, Sampling
from align.protocols.scorer import ErrorBudget, ScoreTable
from align.protocols.trainer import Metrics, Publication
from align.protocols.trees import Tree
from align.recipe.objectives import Objectives
from align.stages.groups import PromptCursor
from align.stages.online import OnlinePlan, OnlineStage
from align.stages.publication import PublicationFolder
from align.stages.rollout_log import RolloutLog
from tests.bench import common

GOAL_MS = 2.0
PARTS = ("generate", "score", "prepare", "train", "publish", "log")


class InstantTrainer:
    async def step(self, trees: Sequence[Tree], *, step: int, progress: float) -> Metrics:
        return {"loss/total": 0.0}

    async def publish(self, folder: Path, version: int) -> Publication:
        return Publication(version, "base", str(folder), "")


class InstantFleet:
    """Gives the control back after every group, as an engine does that answers one at a time."""

    def __init__(self, tokens: int) -> None:
        self.ids = np.arange(tokens, dtype=np.int64)
        self.logps = np.full(tokens, -0.5, dtype=np.float32)
        self.versions = np.zeros(tokens, dtype=np.int32)

    async def publish(self, publication: Publication) -> Metrics:
        self.versions = np.full(len(self.ids), publication.version, dtype=np.int32)
        return {}

    async def stream(
        self, prompts: Sequence[PromptItem], group_size: int, sampling: Sampling
    ) -> AsyncIterator[Group | FailedPrompt]:
        for item in prompts:
            await asyncio.sleep(0)
            completion = Completion(self.ids, self.logps, self.versions, "forty-two is the answer", "eos")
            yield Group(item, (completion,) * group_size)

    def metrics(self) -> Metrics:
        return {}


class InstantScorer:
    async def score(self, groups: Sequence[Group], budget: ErrorBudget | None = None) -> ScoreTable:
        size = len(groups[0].completions)
        column = np.arange(len(groups) * size, dtype=np.float32) % 3
        silent = np.repeat([group.prompt.seed % 2 == 0 for group in groups], size)
        scores = np.stack([column, np.where(silent, 1.0, column)], axis=1).astype(np.float32)
        return ScoreTable(("correct", "brief"), scores, ("reward", "reward"), infos=({},) * len(scores))


def run(arguments: argparse.Namespace, staleness: int, folder: Path) -> dict[str, float]:
    """Milliseconds per group that was sampled, of a whole turn and of its parts, over all turns but the first."""
    prompts = [PromptItem(n, np.arange(64, dtype=np.int64), 0, row={"n": n}) for n in range(4 * arguments.groups)]
    publications = PublicationFolder(folder)
    fleet: Any = InstantFleet(arguments.tokens)
    trainer: Any = InstantTrainer()
    scorer: Any = InstantScorer()
    stage = OnlineStage(
        OnlinePlan(
            stage_id="bench",
            groups=arguments.groups,
            group_size=arguments.group_size,
            total=arguments.steps,
            sampling=Sampling(),
            objectives=Objectives(weights={"correct": 0.0} if arguments.dynamic else {}),
            staleness=staleness,
            refill=2.0 if arguments.dynamic else 0.0,
        ),
        trainer=trainer,
        fleet=fleet,
        scorer=scorer,
        cursor=PromptCursor(prompts, 0, "bench", 0),
        publications=publications,
        log=RolloutLog(folder / f"rollouts-{staleness}"),
        decode=lambda ids: "What is six times seven?",
        tell=lambda line: None,
    )
    seconds: list[dict[str, float]] = []
    sampled: list[float] = []

    async def turns() -> None:
        async with stage:
            await stage.start(0, {})
            for step in range(arguments.steps):
                begun = time.perf_counter()
                metrics = await stage.turn(step)
                parts = {name: metrics[f"time/{name}"] for name in PARTS}
                sampled.append(metrics["groups/total"] + metrics.get("groups/refilled", 0.0))
                seconds.append({"turn": time.perf_counter() - begun, **parts})

    try:
        asyncio.run(turns())
    finally:
        publications.close()
    groups = sum(sampled[1:])
    return {name: 1e3 * sum(s[name] for s in seconds[1:]) / groups for name in seconds[0]}


def main(words: list[str]) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", type=int, default=1000)
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--staleness", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--dynamic", action="store_true")
    parser.add_argument("--record", action="store_true")
    arguments = parser.parse_args(words)
    started = time.perf_counter()
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for staleness in arguments.staleness:
            found = run(arguments, staleness, Path(folder))
            figures[f"staleness {staleness}"] = found
            parts = ", ".join(f"{name} {found[name]:.3f}" for name in PARTS)
            print(f"staleness {staleness}: {found['turn']:.3f} ms per group ({parts})", flush=True)
    worst = max(found["turn"] for found in figures.values())
    print(f"goal: at most {GOAL_MS:g} ms per group: {'met' if worst <= GOAL_MS else 'missed'}")
    if arguments.record:
        figures |= {"groups": arguments.groups, "group_size": arguments.group_size, "dynamic": arguments.dynamic}
        common.write_result(
            "orchestration",
            goal=f"the online loop costs at most {GOAL_MS:g} ms per group",
            met=worst <= GOAL_MS,
            figures=figures,
            started=started,
        )
    return figures


if __name__ == "__main__":
    main(sys.argv[1:])
