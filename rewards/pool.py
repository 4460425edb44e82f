"""All reward plugins of a stage, each in its own killable process. No Ray: an actor is a thin shell over this."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from rewards.api import Failure, Sample
from rewards.execution import Budget, Execution, PluginResult
from rewards.naming import Named, objective_names
from rewards.plugin import PluginSpec
from rewards.worker import Worker

_BUDGETS_KEPT = 256  # of the newest steps; far more than can be scored at the same time


@dataclass(frozen=True, slots=True)
class PoolResult:
    """Scores of S samples on R objectives.

    scores[i][k]: None where missing (not applicable, or failed: see failures). dropped: group ids that a drop_group
    policy removed; their samples have no scores. errors: failed samples per plugin. infos[i]: plugin -> what it told
    about sample i. metrics: reward/<plugin>/{seconds, busy_seconds, calls, errors, error_rate, retries, restarts} and
    what plugins logged themselves. counts: of those metrics that are means, of how many numbers; the others are sums.
    """

    objectives: tuple[str, ...]
    kinds: tuple[str, ...]
    scores: list[list[float | None]]
    failures: tuple[Failure, ...]
    dropped: tuple[int, ...]
    errors: dict[str, int]
    infos: list[dict[str, dict[str, Any]]]
    metrics: dict[str, float] = field(default_factory=dict)
    counts: dict[str, float] = field(default_factory=dict)


class RewardPool:
    """Starts, feeds and ends the plugin processes.

    Args:
        specs: the plugins. folder: the recipe's folder, where relative names start and plugins run. seed: the run's.
        log_folder: receives <plugin>.log (their output) and failures.jsonl; None: nothing is kept.

    Raises:
        PluginError: from `start` and `score`, where a plugin cannot be loaded or two have the same name.
        RewardError: from `score`, where a plugin fails more often than it may.
    """

    def __init__(self, specs: Sequence[PluginSpec], folder: str | Path, seed: int, *, log_folder: Path | None = None):
        self.specs = tuple(specs)
        self.folder = Path(folder)
        self.seed = seed
        self.log_folder = log_folder
        self._workers: list[Worker] = []
        self._names: list[tuple[str, ...]] = []
        self._reported: list[int] = []  # starts of each worker that results have told about
        self._budgets: dict[int, list[Budget]] = {}
        self._runner: asyncio.Runner | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._starting: asyncio.Lock | None = None

    # ------------------------------------------------------------------------------------------------ life

    async def start(self) -> list[dict[str, Any]]:
        """Start every process; the plugins' descriptions, in the order of the specs (see `Plugin.describe`)."""
        loop = asyncio.get_running_loop()
        if self._loop is None:
            self._loop, self._starting = loop, asyncio.Lock()
        if self._loop is not loop:
            raise RuntimeError("a RewardPool belongs to the event loop that first used it; make another one here")
        assert self._starting is not None
        async with self._starting:
            if not self._names:
                await self._start_workers()
        return [w.description for w in self._workers]

    async def _start_workers(self) -> None:
        if self.log_folder is not None:
            self.log_folder.mkdir(parents=True, exist_ok=True)
        self._workers = [Worker(s, self.folder, self.seed, self._log_path(n)) for n, s in enumerate(self.specs)]
        try:
            async with asyncio.TaskGroup() as tasks:
                for worker in self._workers:
                    tasks.create_task(worker.start())
            described = [w.description for w in self._workers]
            self._reported = [w.starts for w in self._workers]
            self._names = objective_names(
                [
                    Named(d["name"], tuple(d["objectives"]), s.name is not None)
                    for d, s in zip(described, self.specs, strict=True)
                ]
            )
        except BaseExceptionGroup as group:
            self._close_workers()
            raise group.exceptions[0] from None  # the first is enough to mend
        except BaseException:
            self._close_workers()
            raise

    def _log_path(self, number: int) -> Path | None:
        if self.log_folder is None:
            return None
        spec = self.specs[number]
        return self.log_folder / f"{number}-{spec.name or spec.own_name}.log"

    def close(self) -> None:
        """Kill every plugin process. May be called twice, and without an event loop."""
        self._close_workers()
        if self._runner is not None:
            self._runner.close()
            self._runner = None

    def _close_workers(self) -> None:
        for worker in self._workers:
            worker.close()
        self._workers, self._names = [], []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ------------------------------------------------------------------------------------------------ scoring

    async def score(self, samples: Sequence[Sample], budget: tuple[int, int] | None = None) -> PoolResult:
        """Score samples with all plugins at once. Concurrent calls share the processes.

        budget: (id, size) where the samples are some of a step's `size` samples: all calls with that id share the
        failures that max_error_rate allows for so many. None: these samples are all.
        """
        await self.start()
        shared = self._shared(budget) if budget else [Budget(len(samples)) for _ in self._workers]
        pairs = zip(self._workers, shared, strict=True)
        runs = [asyncio.create_task(Execution(w, samples, own).run()) for w, own in pairs]
        try:
            results = await asyncio.gather(*runs)
        finally:
            for run in runs:
                run.cancel()
            await asyncio.gather(*runs, return_exceptions=True)
        return self._merge(samples, results, self._restarts())

    def _shared(self, budget: tuple[int, int]) -> list[Budget]:
        """One budget per plugin, with what earlier calls of the same id have spent of it."""
        number, size = budget
        found = self._budgets.setdefault(number, [Budget(size) for _ in self._workers])
        for own in found:
            own.samples = max(own.samples, size)
        while len(self._budgets) > _BUDGETS_KEPT:
            del self._budgets[min(self._budgets)]
        return found

    def _restarts(self) -> list[int]:
        """Restarts of each worker that no result has told about yet: of calls that ran together, one tells."""
        before, self._reported = self._reported, [w.starts for w in self._workers]
        return [now - then for now, then in zip(self._reported, before, strict=True)]

    def score_sync(self, samples: Sequence[Sample]) -> PoolResult:
        """`score` for callers without an event loop; the pool keeps one of its own."""
        if self._runner is None:
            self._runner = asyncio.Runner()
        return self._runner.run(self.score(samples))

    def _merge(self, samples: Sequence[Sample], results: Sequence[PluginResult], restarts: Sequence[int]) -> PoolResult:
        described = [w.description for w in self._workers]
        dropped = set().union(*(r.dropped for r in results))
        scores: list[list[float | None]] = []
        infos: list[dict[str, dict[str, Any]]] = []
        for i, sample in enumerate(samples):
            row = [value for r in results for value in r.values[i]]
            scores.append([None] * len(row) if sample.group_id in dropped else row)
            infos.append({d["name"]: r.infos[i] for d, r in zip(described, results, strict=True) if r.infos[i]})
        failures = tuple(f for r in results for f in r.failures)
        self._write_failures(failures, samples)
        metrics: dict[str, float] = {}
        counts: dict[str, float] = {}
        for d, r, n in zip(described, results, restarts, strict=True):
            metrics.update(_metrics(d["name"], r, len(samples), n))
            counts[f"reward/{d['name']}/error_rate"] = float(len(samples))
            counts.update({f"reward/{d['name']}/{key}": float(count) for key, (_, count) in r.metrics.items()})
        return PoolResult(
            objectives=tuple(n for names in self._names for n in names),
            kinds=tuple(o["kind"] for d in described for o in d["objectives"].values()),
            scores=scores,
            failures=failures,
            dropped=tuple(sorted(dropped)),
            errors={d["name"]: len(r.failed) for d, r in zip(described, results, strict=True)},
            infos=infos,
            metrics=metrics,
            counts=counts,
        )

    def _write_failures(self, failures: Sequence[Failure], samples: Sequence[Sample]) -> None:
        if self.log_folder is None or not failures:
            return
        with (self.log_folder / "failures.jsonl").open("a", encoding="utf-8") as file:
            for f in failures:
                file.write(json.dumps({**asdict(f), "completion": samples[f.index].completion}) + "\n")


def _metrics(name: str, result: PluginResult, samples: int, restarts: int) -> dict[str, float]:
    failed = len(result.failed)
    own = {key: total / count for key, (total, count) in result.metrics.items()}
    ours = {
        "seconds": result.seconds,
        "busy_seconds": result.busy_seconds,
        "calls": float(result.calls),
        "errors": float(failed),
        "error_rate": failed / samples if samples else 0.0,
        "retries": float(result.retried),
        "restarts": float(restarts),
    }
    return {f"reward/{name}/{key}": value for key, value in {**own, **ours}.items()}
