"""All reward plugins of a stage, each in its own killable process. No Ray: an actor is a thin shell over this."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self, TypeVar

from rewards.api import FailedCall, Failure, Sample
from rewards.budget import Budget, Budgets
from rewards.cache import ScoreCache
from rewards.execution import Execution, PluginResult
from rewards.naming import Named, objective_names
from rewards.plugin import PluginSpec
from rewards.team import Team

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class PoolResult:
    """Scores of S samples on R objectives.

    scores[i][k]: None where missing (not applicable, or failed: see failures). dropped: group ids that a drop_group
    policy removed; their samples have no scores. errors: failed samples per plugin. failed_calls: calls that gave no
    scores, those included whose samples were scored by another. infos[i]: plugin -> what it told
    about sample i. metrics: reward/<plugin>/{seconds, busy_seconds, calls, failed_calls, errors, error_rate, retries,
    restarts, cache_hits}, where it is not 0 also `stripped` (completions whose special tokens the plugin did not
    see), and what plugins logged themselves. counts: of those metrics that are means, of how many numbers; the
    others are sums. series: reward/<plugin>/latency, seconds of each call, for mean and percentiles over a step.
    """

    objectives: tuple[str, ...]
    kinds: tuple[str, ...]
    scores: list[list[float | None]]
    failures: tuple[Failure, ...]
    dropped: tuple[int, ...]
    errors: dict[str, int]
    infos: list[dict[str, dict[str, Any]]]
    failed_calls: tuple[FailedCall, ...] = ()
    metrics: dict[str, float] = field(default_factory=dict)
    counts: dict[str, float] = field(default_factory=dict)
    series: dict[str, list[float]] = field(default_factory=dict)


class RewardPool:
    """Starts, feeds and ends the plugin processes.

    Args:
        specs: the plugins. folder: the recipe's folder, where relative names start and plugins run. seed: the run's.
        log_folder: receives <plugin>.log (their output), failures.jsonl and failed-calls.jsonl; None: nothing is kept.
        cache: file of scores that plugins with `cache` share with other pools and runs; None: nothing is looked up.
        share: pools, this one included, among which the samples of a stage are divided: concurrency and rate of a
            plugin hold over all of them. Budgets do not: whoever divides the samples adds the failures up.

    Raises:
        PluginError: from `start` and `score`, where a plugin cannot be loaded or two have the same name.
        RewardError: from `score`, where a plugin fails more often than it may.
    """

    def __init__(
        self,
        specs: Sequence[PluginSpec],
        folder: str | Path,
        seed: int,
        *,
        log_folder: Path | None = None,
        cache: Path | None = None,
        share: int = 1,
    ):
        self.specs = tuple(specs)
        self.folder = Path(folder)
        self.seed = seed
        self.log_folder = log_folder
        self.share = share
        self.cache_path = cache
        self._teams: list[Team] = []
        self._cache: ScoreCache | None = None
        self._names: list[tuple[str, ...]] = []
        self._reported: list[int] = []  # starts of each plugin's processes that results have told about
        self._budgets = Budgets()
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
                await self._start_teams()
        return [t.description for t in self._teams]

    async def _start_teams(self) -> None:
        if self.log_folder is not None:
            self.log_folder.mkdir(parents=True, exist_ok=True)
        made = enumerate(self.specs)
        self._teams = [Team(s, self.folder, self.seed, self._log_path(n), self.share) for n, s in made]
        try:
            async with asyncio.TaskGroup() as tasks:
                for team in self._teams:
                    tasks.create_task(team.start())
            described = [t.description for t in self._teams]
            self._reported = [t.starts for t in self._teams]
            self._names = objective_names(
                [
                    Named(d["name"], tuple(d["objectives"]), s.name is not None)
                    for d, s in zip(described, self.specs, strict=True)
                ]
            )
            if self.cache_path is not None and any(d["options"]["cache"] for d in described):
                self._cache = ScoreCache(self.cache_path)
        except BaseExceptionGroup as group:
            self._close_teams()
            raise group.exceptions[0] from None  # the first is enough to mend
        except BaseException:
            self._close_teams()
            raise

    def _log_path(self, number: int) -> Path | None:
        if self.log_folder is None:
            return None
        spec = self.specs[number]
        return self.log_folder / f"{number}-{spec.name or spec.own_name}.log"

    def close(self) -> None:
        """Kill every plugin process. May be called twice, and without an event loop."""
        self._close_teams()
        if self._runner is not None:
            self._runner.close()
            self._runner = None

    def _close_teams(self) -> None:
        for team in self._teams:
            team.close()
        self._teams, self._names = [], []
        if self._cache is not None:
            self._cache.close()
            self._cache = None

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
        shared = self._budgets.of(*budget, self._teams) if budget else [Budget(len(samples)) for _ in self._teams]
        pairs = zip(self._teams, shared, strict=True)
        executions = [Execution(t, samples, own, self._cache) for t, own in pairs]
        runs = [asyncio.create_task(execution.run()) for execution in executions]
        try:
            results = await asyncio.gather(*runs)
        finally:
            for run in runs:
                run.cancel()
            await asyncio.gather(*runs, return_exceptions=True)
            self._write_failures([execution.result for execution in executions], samples)
        return self._merge(samples, results, self._restarts())

    def _restarts(self) -> list[int]:
        """Restarts of each plugin that no result has told about yet: of calls that ran together, one tells."""
        before, self._reported = self._reported, [t.starts for t in self._teams]
        return [now - then for now, then in zip(self._reported, before, strict=True)]

    async def golds(self, rows: Sequence[Mapping[str, Any]]) -> list[str | Exception | None]:
        """Per row the completion that the first plugin says must score best on it, or the error that it raised."""
        await self.start()
        return await self._teams[0].golds(rows)

    def score_sync(self, samples: Sequence[Sample]) -> PoolResult:
        """`score` for callers without an event loop; the pool keeps one of its own."""
        return self.run(self.score(samples))

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Await this pool's `start`, `score` or `golds` on the loop that the pool keeps."""
        if self._runner is None:
            self._runner = asyncio.Runner()
        return self._runner.run(work)

    def _merge(self, samples: Sequence[Sample], results: Sequence[PluginResult], restarts: Sequence[int]) -> PoolResult:
        described = [t.description for t in self._teams]
        dropped = set().union(*(r.dropped for r in results))
        scores: list[list[float | None]] = []
        infos: list[dict[str, dict[str, Any]]] = []
        for i, sample in enumerate(samples):
            row = [value for r in results for value in r.values[i]]
            scores.append([None] * len(row) if sample.group_id in dropped else row)
            infos.append({d["name"]: r.infos[i] for d, r in zip(described, results, strict=True) if r.infos[i]})
        metrics: dict[str, float] = {}
        counts: dict[str, float] = {}
        blind = sum(sample.raw is not None for sample in samples)
        for d, r, n in zip(described, results, restarts, strict=True):
            metrics.update(_metrics(d["name"], r, len(samples), n))
            if blind and d["options"]["text"] == "stripped":
                metrics[f"reward/{d['name']}/stripped"] = float(blind)
            counts[f"reward/{d['name']}/error_rate"] = float(len(samples))
            counts.update({f"reward/{d['name']}/{key}": float(count) for key, (_, count) in r.metrics.items()})
        return PoolResult(
            objectives=tuple(n for names in self._names for n in names),
            kinds=tuple(o["kind"] for d in described for o in d["objectives"].values()),
            scores=scores,
            failures=tuple(f for r in results for f in r.failures),
            dropped=tuple(sorted(dropped)),
            errors={d["name"]: len(r.failed) for d, r in zip(described, results, strict=True)},
            infos=infos,
            failed_calls=tuple(call for r in results for call in r.failed_calls),
            metrics=metrics,
            counts=counts,
            series={f"reward/{d['name']}/latency": r.latencies for d, r in zip(described, results, strict=True)},
        )

    def _write_failures(self, results: Sequence[PluginResult], samples: Sequence[Sample]) -> None:
        """What failed, also where the run ends for it."""
        failures = [{**asdict(f), "completion": samples[f.index].completion} for r in results for f in r.failures]
        self._write("failures", failures)
        self._write("failed-calls", [asdict(call) for r in results for call in r.failed_calls])

    def _write(self, name: str, items: Sequence[Mapping[str, Any]]) -> None:
        """Add lines to <name>.jsonl in the log folder, if there is one."""
        if self.log_folder is None or not items:
            return
        with (self.log_folder / f"{name}.jsonl").open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(item) + "\n" for item in items)


def _metrics(name: str, result: PluginResult, samples: int, restarts: int) -> dict[str, float]:
    failed = len(result.failed)
    own = {key: total / count for key, (total, count) in result.metrics.items()}
    ours = {
        "seconds": result.seconds,
        "busy_seconds": result.busy_seconds,
        "calls": float(result.calls),
        "failed_calls": float(len(result.failed_calls)),
        "errors": float(failed),
        "error_rate": failed / samples if samples else 0.0,
        "retries": float(result.retried),
        "restarts": float(restarts),
        "cache_hits": float(result.cached),
    }
    return {f"reward/{name}/{key}": value for key, value in {**own, **ours}.items()}
