"""Scores as groups finish: what waits goes into the next call, and the tables of a step become one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from align.protocols.fleet import Group
from align.protocols.scorer import ErrorBudget, Scorer, ScoreTable
from align.protocols.trainer import Metrics
from align.stages.background import Background

CALLS = 4
"""Scoring calls at once. What has finished while they all run becomes one call: rewards that compute keep their
batches. With one call alone, a group that finishes right after a slow judge was asked would wait for it twice."""


@dataclass(frozen=True, slots=True)
class _Waiting:
    group: Group
    budget: ErrorBudget
    done: Callable[[Group, ScoreTable], None]


class ScoringQueue:
    """Groups go in one by one; `done` is called with each group and its own rows of a score table.

    A call covers groups of one error budget, sorted by id. What a call raises ends the block of `background`.
    """

    def __init__(self, scorer: Scorer, background: Background):
        self._scorer, self._background = scorer, background
        self._waiting: list[_Waiting] = []
        self._workers = 0
        self._totals = MetricTotals()

    def add(self, group: Group, budget: ErrorBudget, done: Callable[[Group, ScoreTable], None]) -> None:
        self._waiting.append(_Waiting(group, budget, done))
        if self._workers < CALLS:
            self._workers += 1
            self._background.start(self._work())

    def take_metrics(self) -> Metrics:
        """The scorer's metrics over all calls since the last time."""
        totals, self._totals = self._totals, MetricTotals()
        return totals.metrics()

    async def _work(self) -> None:
        while self._waiting:
            budget = self._waiting[0].budget
            batch = sorted((w for w in self._waiting if w.budget.id == budget.id), key=_group_id)
            self._waiting = [w for w in self._waiting if w.budget.id != budget.id]
            table = await self._scorer.score([w.group for w in batch], budget)
            self._totals.add(table)
            for waiting, part in zip(batch, split_table([w.group for w in batch], table), strict=True):
                waiting.done(waiting.group, part)
        self._workers -= 1


def _group_id(waiting: _Waiting) -> int:
    return waiting.group.prompt.group_id


def split_table(groups: Sequence[Group], table: ScoreTable) -> list[ScoreTable]:
    """Each group's own rows, without the metrics, which belong to the call."""
    if len(groups) == 1:
        return [replace(table, metrics={}, counts={}, series={})]
    failures: dict[int, list[int]] = {}
    for number, failure in enumerate(table.failures):
        failures.setdefault(failure.group_id, []).append(number)
    dropped = set(table.dropped)
    parts, first = [], 0
    for index, group in enumerate(groups):
        end = first + len(group.completions)
        parts.append(
            ScoreTable(
                table.objectives,
                table.scores[first:end],
                table.kinds,
                failures=tuple(table.failures[n] for n in failures.get(group.prompt.group_id, ())),
                dropped=(0,) if index in dropped else (),
                infos=table.infos[first:end],
            )
        )
        first = end
    assert first == len(table.scores), "one row per completion"
    return parts


def join_tables(tables: Sequence[ScoreTable], metrics: Metrics) -> ScoreTable:
    """Undo `split_table`, over groups in this order: one table per group in, one for all out."""
    first = tables[0]
    assert all((t.objectives, t.kinds) == (first.objectives, first.kinds) for t in tables), "one set of objectives"
    return ScoreTable(
        first.objectives,
        np.concatenate([t.scores for t in tables]),
        first.kinds,
        failures=tuple(failure for t in tables for failure in t.failures),
        dropped=tuple(index for index, t in enumerate(tables) if t.dropped),
        metrics=metrics,
        infos=tuple(info for t in tables for info in t.infos),
    )


class MetricTotals:
    """Metrics of several tables as those of one: sums add up, means are weighted by what each is the mean of, and
    percentiles are taken over all the numbers of a series."""

    def __init__(self) -> None:
        self._sums: Metrics = {}
        self._series: dict[str, list[float]] = {}
        self.means: dict[str, tuple[float, float]] = {}

    def add(self, table: ScoreTable) -> None:
        for name, value in table.metrics.items():
            count = table.counts.get(name)
            if count is None:
                self._sums[name] = self._sums.get(name, 0.0) + value
            else:
                total, before = self.means.get(name, (0.0, 0.0))
                self.means[name] = (total + value * count, before + count)
        for name, numbers in table.series.items():
            self._series.setdefault(name, []).extend(numbers)

    def metrics(self) -> Metrics:
        means = {name: total / count for name, (total, count) in self.means.items() if count}
        return {**self._sums, **means, **self._spread()}

    def _spread(self) -> Metrics:
        found: Metrics = {}
        for name, numbers in self._series.items():
            if numbers:
                p50, p95 = np.percentile(numbers, [50, 95])
                found |= {f"{name}_mean": float(np.mean(numbers)), f"{name}_p50": float(p50), f"{name}_p95": float(p95)}
        return found
