"""Plain in-memory implementations of the three protocols: small enough to compute by hand, exact on restore."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from align.protocols.fleet import Completion, FailedPrompt, Group, PromptItem, Sampling
from align.protocols.scorer import ErrorBudget, ScoreTable
from align.protocols.trainer import Metrics, Publication, digest_arrays
from align.protocols.trees import Segment, Tree


def tree(number: int, length: int = 4) -> Tree:
    ids = np.arange(length, dtype=np.int64) + number
    return Tree(id=number, trunk=Segment(ids, np.ones(length, dtype=bool)), origin=f"rows.jsonl:{number + 1}")


def prompt(number: int, length: int = 3) -> PromptItem:
    return PromptItem(group_id=number, token_ids=np.arange(length, dtype=np.int64) + number, seed=0, row={"n": number})


class PlainTrainer:
    """One weight w. A step moves it by progress-dependent arithmetic of the trees it is given, in their order."""

    def __init__(self, base: Path | None = None) -> None:
        """base: a model folder whose files a written model carries (its tokenizer)."""
        self.base = base
        self.w = 1.0
        self.seen: list[list[int]] = []
        self.trees: list[Sequence[Tree]] = []
        self.calls: list[str] = []
        self.slower: list[str] = []
        self.during_step: Callable[[int], None] = lambda step: None

    async def step(self, trees: Sequence[Tree], *, step: int, progress: float) -> Metrics:
        assert 0.0 <= progress < 1.0
        self.calls.append(f"step {step}")
        self.seen.append([t.id for t in trees])
        self.trees.append(trees)
        for t in trees:
            self.w = 0.9 * self.w + 1e-3 * t.id * (1 - progress)
        self.during_step(step)
        return {"loss/total": self.w, "tokens/trained": float(sum(t.tokens for t in trees))}

    async def evaluate(self, trees: Sequence[Tree]) -> Metrics:
        self.calls.append("evaluate")
        return {"loss/total": self.w + len(trees), "rewards/accuracies": 1.0 / (1.0 + abs(self.w))}

    async def logps(self, trees: Sequence[Tree]) -> list[list[np.ndarray]]:
        return [[np.full(int(s.loss_mask.sum()), -self.w, dtype=np.float32) for s in t.sequences] for t in trees]

    async def forward(self) -> dict[str, Any]:
        return {"layout": "shared", "attention": "sdpa", "words": "packed", "slower": self.slower, "notes": []}

    async def numerics(self) -> dict[str, Any]:
        return {"dtype": "float64"}

    async def publish(self, folder: Path, version: int) -> Publication:
        self.calls.append(f"publish {version}")
        folder.mkdir(exist_ok=True)
        (folder / "w.json").write_text(json.dumps(self.w))
        return Publication(version, "weights", str(folder), digest_arrays({"w": np.asarray(self.w)}))

    async def save(self, folder: Path) -> None:
        assert folder.is_dir() and not any(folder.iterdir())
        (folder / "state.json").write_text(json.dumps(self.w))
        (folder / "adapter").mkdir()
        (folder / "adapter" / "w.json").write_text(json.dumps(self.w))

    async def restore(self, folder: Path) -> None:
        self.w = json.loads((folder / "state.json").read_text())

    async def write_model(self, folder: Path) -> None:
        for path in self.base.iterdir() if self.base else ():
            (folder / path.name).write_bytes(path.read_bytes())
        (folder / "w.json").write_text(json.dumps(self.w))

    async def close(self) -> None:
        self.calls.append("close")


class PlainFleet:
    """Completions are arithmetic of (published weight, prompt seed, sample); a stream gives
    them in reverse."""

    def __init__(self, truncate: Callable[[int, int], bool] = lambda group, sample: False) -> None:
        self.version: int | None = None
        self.w = 0.0
        self.truncate = truncate
        self.asked: list[tuple[list[int], int, Sampling]] = []
        self.seeds: list[list[int]] = []

    async def publish(self, publication: Publication) -> Metrics:
        self.w = json.loads((Path(publication.path) / "w.json").read_text())
        assert digest_arrays({"w": np.asarray(self.w)}) == publication.digest
        self.version = publication.version
        return {"publish/engines": 1.0}

    async def generate(self, prompts: Sequence[PromptItem], group_size: int, sampling: Sampling) -> list[Group]:
        assert self.version is not None, "nothing was published"
        self.asked.append(([p.group_id for p in prompts], group_size, sampling))
        self.seeds.append([p.seed for p in prompts])
        return [self._group(p, group_size) for p in prompts]

    async def stream(
        self, prompts: Sequence[PromptItem], group_size: int, sampling: Sampling
    ) -> AsyncIterator[Group | FailedPrompt]:
        for group in reversed(await self.generate(prompts, group_size, sampling)):
            yield group

    async def probe(self, item: PromptItem, sampling: Sampling) -> list[Group]:
        """As likely as `PlainTrainer.logps` says of the version that is held."""
        [drawn] = self._group(item, 1).completions
        held = np.full(len(drawn.token_ids), -self.w, np.float32)
        return [Group(item, (replace(drawn, logps=held),))]

    def metrics(self) -> Metrics:
        return {}

    def _group(self, item: PromptItem, group_size: int) -> Group:
        completions = []
        for sample in range(group_size):
            random = np.random.default_rng([item.seed, sample, int(self.w * 1e6) & 0xFFFF])
            n = int(random.integers(1, 6))
            ids = random.integers(0, 50, size=n)
            cut = self.truncate(item.group_id, sample)
            completions.append(
                Completion(
                    token_ids=ids.astype(np.int64),
                    logps=-random.random(n).astype(np.float32),
                    versions=np.full(n, self.version, dtype=np.int32),
                    text=" ".join(map(str, ids)),
                    finish="length" if cut else "eos",
                )
            )
        return Group(item, tuple(completions))

    async def close(self) -> None: ...


class PlainScorer:
    """Objectives from functions of a completion; a function may answer NaN."""

    def __init__(self, dropped: tuple[int, ...] = (), **objectives: Callable[[Group, Completion], float]) -> None:
        self.objectives = objectives or {"short": lambda group, c: -float(len(c.token_ids))}
        self.dropped = dropped

    async def score(self, groups: Sequence[Group], budget: ErrorBudget | None = None) -> ScoreTable:
        rows = [[f(g, c) for f in self.objectives.values()] for g in groups for c in g.completions]
        names = tuple(self.objectives)
        return ScoreTable(names, np.asarray(rows, dtype=np.float32), ("reward",) * len(names), dropped=self.dropped)

    async def close(self) -> None: ...


class Lines:
    """A report that keeps what it is told."""

    def __init__(self) -> None:
        self.steps: list[tuple[str, int, Metrics]] = []
        self.messages: list[str] = []
        self.events: list[str] = []

    def stage_started(self, stage_id: str, total: int, kind: str, *, done: int = 0) -> None:
        self.events.append(f"started {stage_id} {done}/{total} {kind}")

    def step(self, stage_id: str, step: int, metrics: Metrics) -> None:
        self.steps.append((stage_id, step, metrics))

    def stage_finished(self, stage_id: str, summary: dict[str, Any]) -> None:
        self.events.append(f"finished {stage_id}")

    def message(self, text: str) -> None:
        self.messages.append(text)

    def of(self, name: str) -> list[tuple[int, float]]:
        return [(step, metrics[name]) for _, step, metrics in self.steps if name in metrics]

    def timeless(self) -> list[tuple[int, Metrics]]:
        """Steps and metrics without times and rates: what a resumed run must repeat bit for bit."""
        return [
            (
                step,
                {
                    k: v
                    for k, v in m.items()
                    if not k.startswith("time/") and not k.endswith("_per_second") and k != "tokens/per_second"
                },
            )
            for _, step, m in self.steps
        ]
