"""The other parts of a stage, each as much of its protocol as a turn of the loop uses: they only take time."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from align.protocols.fleet import Group
from align.protocols.scorer import ErrorBudget, ScoreTable
from align.protocols.trainer import Metrics, Publication
from align.protocols.trees import Tree
from align.simulate.workload import Workload

_SEEDS = float(2**63)


class SimulatedTrainer:
    """ages: groups trained by the age of their oldest token, in versions; busy_s: both since they were last cleared."""

    def __init__(self, work: Workload):
        self.work = work
        self.ages: Counter[int] = Counter()
        self.busy_s = 0.0

    async def step(self, trees: Sequence[Tree], *, step: int, progress: float) -> Metrics:
        mean = self.work.groups * self.work.group_size * self.work.lengths.mean
        tokens = sum(float(self.work.lengths.of(tree.id).sum()) for tree in trees)
        seconds = self.work.train_s * tokens / mean
        for tree in trees:
            versions = tree.branches[0].versions
            assert versions is not None, "a sampled completion knows its version"
            self.ages[step - int(versions[0])] += 1
        self.busy_s += seconds
        await asyncio.sleep(seconds + self.work.loop_s)
        return {"tokens/trained": tokens}

    async def publish(self, folder: Path, version: int) -> Publication:
        return Publication(version, "base", str(folder), "")


class SimulatedScorer:
    """Answers a call after `reward_s`. A group is silent or not by its seed."""

    def __init__(self, work: Workload):
        self.work = work

    async def score(self, groups: Sequence[Group], budget: ErrorBudget | None = None) -> ScoreTable:
        size = self.work.group_size
        alternating = np.arange(size, dtype=np.float32)[None, :] % 2
        speaks = np.array([group.prompt.seed / _SEEDS >= self.work.silent for group in groups], dtype=np.float32)
        scores = (speaks[:, None] * alternating).reshape(-1, 1)
        await asyncio.sleep(self.work.reward_s)
        return ScoreTable(("reward",), scores, ("reward",), infos=({},) * len(scores))


class NoFolders:
    """Where versions would be written."""

    def folder(self, stage_id: str, version: int) -> Path:
        return Path(stage_id)

    def supersede(self, newest: Path) -> None:
        pass


class NoLog:
    """Where completions would be written."""

    def cut_back(self, step: int) -> None:
        pass

    def add(self, *rows: object) -> None:
        pass

    def close_file(self) -> None:
        pass
