"""One plugin over one list of samples: batches, cache, retries, bisection, error policy and error budget."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from rewards.api import ErrorPolicy, FailedCall, Failure, Sample, Scope
from rewards.batches import Job, Unit, halves, jobs_of, units_of
from rewards.budget import Budget
from rewards.cache import ScoreCache, plugin_key, sample_key
from rewards.connection import Reply
from rewards.team import Team

log = logging.getLogger(__name__)

_BACKOFF_SECONDS = 0.2

Again = Literal["alone", "as a whole", "in parts", "no"]


@dataclass
class PluginResult:
    """values[i][k]: sample i, the plugin's objective k; None where not applicable or failed. failed: their indices.
    dropped: group ids. busy_seconds: inside the plugin, summed over calls; seconds: from first call to last answer;
    latencies: of each call, from sending to the answer or the end of its process. cached: samples not asked for.
    failed_calls: every call that gave no scores, also where another of the same samples did."""

    values: list[list[float | None]]
    failures: list[Failure] = field(default_factory=list)
    failed: set[int] = field(default_factory=set)
    failed_calls: list[FailedCall] = field(default_factory=list)
    dropped: set[int] = field(default_factory=set)
    infos: list[dict[str, Any]] = field(default_factory=list)
    metrics: dict[str, list[float]] = field(default_factory=dict)
    calls: int = 0
    retried: int = 0
    cached: int = 0
    latencies: list[float] = field(default_factory=list)
    busy_seconds: float = 0.0
    seconds: float = 0.0


class Execution:
    """Scores `samples` with one plugin's processes. Twice as many batches as these take at once are on their way: of
    all others, only the samples are in memory.

    Args:
        team: started. samples: what to score. budget: of failures, over all calls that share it. cache: where scores
            are looked for and kept, if the plugin says so.
    """

    def __init__(self, team: Team, samples: Sequence[Sample], budget: Budget, cache: ScoreCache | None = None):
        described = team.description
        self.team = team
        options = described["options"]
        raw = options["text"] == "raw"
        self.samples = [s if s.raw is None else replace(s, completion=s.raw) for s in samples] if raw else samples
        self.name: str = described["name"]
        self.objectives = list(described["objectives"])
        self.scope: Scope = described["scope"]
        self.batch: int = options["batch"]
        self.retries: int = options["retries"]
        self.backoff = _BACKOFF_SECONDS if described["is_async"] else 0.0
        self.policy = ErrorPolicy.parse(options["on_error"])
        self.rate: float = options["max_error_rate"]
        self.budget = budget
        self.cache = cache if options["cache"] else None
        self.keys: dict[Unit, bytes] = {}
        self.result = PluginResult(values=[[None] * len(self.objectives) for _ in samples], infos=[{} for _ in samples])

    async def run(self) -> PluginResult:
        """Raises RewardError where the policy is `fail` or more samples failed than may."""
        started = time.monotonic()
        units = units_of(self.samples, self.scope)
        self.budget.unit = max(self.budget.unit, *map(len, units), 1)
        jobs = jobs_of(await self._recall(units), self.samples, self.scope, self.batch)
        waiting = iter(jobs)
        tasks = [asyncio.create_task(self._feed(waiting)) for _ in range(min(len(jobs), 2 * self.team.places))]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            if self.cache is not None:
                await self.cache.flush()  # also where the run ends here: a judge's answers were paid for
        self.result.seconds = time.monotonic() - started
        return self.result

    async def _feed(self, jobs: Iterator[Job]) -> None:
        for job in jobs:
            await self._settle(job)

    async def _recall(self, units: list[Unit]) -> list[Unit]:
        """Take from the cache what is there; the units that must be asked for."""
        if self.cache is None:
            return units
        plugin = plugin_key(self.team.spec, self.team.description)
        for unit in units:
            key = sample_key(plugin, [self.samples[i] for i in unit])
            if key is not None:
                self.keys[unit] = key
        found = await self.cache.get(list(self.keys.values()))
        left = []
        for unit in units:
            kept = found.get(self.keys.get(unit, b""))
            if kept is None:
                left.append(unit)
                continue
            self.result.cached += len(unit)
            for i, values, info in zip(unit, kept["values"], kept["infos"], strict=True):
                self.result.values[i], self.result.infos[i] = values, info
        return left

    async def _settle(self, job: Job, *, alone: bool = False, cut: bool = False, attempt: int = 0) -> None:
        """Score a job. A failure is narrowed down, half by half, until the unit that causes it stands alone.

        alone: in its process; cut: out of a call that failed. A wrong number of results is not narrowed down: what
        gives one result for every call would give one to a call of one.
        """
        indices = [i for unit in job for i in unit]
        reply = await self.team.call([self.samples[i] for i in indices], alone=alone)
        self.result.calls += 1
        self.result.latencies.append(reply.seconds)
        if reply.error is None:
            self._keep(job, indices, reply)
            return
        again = self._again(job, reply, alone, cut, attempt)
        self._note(indices, *reply.error, again)
        if again == "alone":
            await self._settle(job, alone=True, cut=cut, attempt=attempt)
        elif again == "as a whole":
            self.result.retried += 1
            await asyncio.sleep(self.backoff * 2**attempt)
            await self._settle(job, alone=alone, cut=cut, attempt=attempt + 1)
        elif again == "in parts":
            for part in halves(job, self.samples):
                await self._settle(part, alone=alone or reply.lost, cut=True)
        else:
            for i in indices:
                self._fail(i, None, *reply.error)

    def _again(self, job: Job, reply: Reply, alone: bool, cut: bool, attempt: int) -> Again:
        """What is to be done about a call that failed. Several groups that are scored together are asked for once more
        together where the plugin raised, so that a service which hiccups changes no score."""
        assert reply.error is not None
        if reply.lost and not (reply.alone or alone):
            return "alone"  # perhaps another call's fault
        if reply.error[0] == "wrong_length":
            return "no"
        together = self.scope != "sample" and not reply.lost and not cut
        left = self.retries if len(job) == 1 else min(self.retries, 1) if together else 0
        if attempt < left:
            return "as a whole"
        return "in parts" if len(job) > 1 else "no"

    def _note(self, indices: Sequence[int], cause: str, message: str, again: Again) -> None:
        groups = tuple(dict.fromkeys(self.samples[i].group_id for i in indices))
        self.result.failed_calls.append(FailedCall(self.name, len(indices), groups, cause, message, again))
        log.warning(
            "reward %s: a call of %d samples of %d groups failed (%s): %s; asked again: %s",
            self.name, len(indices), len(groups), cause, message, again,
        )  # fmt: skip

    def _keep(self, job: Job, indices: Sequence[int], reply: Reply) -> None:
        body, result = reply.body, self.result
        result.busy_seconds += body["seconds"]
        for i, values in zip(indices, body["values"], strict=True):
            result.values[i] = values
        for position, info in body["infos"]:
            result.infos[indices[position]].update(info)
        for name, column in body["columns"].items():
            for i, value in zip(indices, column, strict=True):
                result.infos[i][name] = value
        for name, (total, count) in body["metrics"].items():
            kept = result.metrics.setdefault(name, [0.0, 0.0])
            kept[0] += total
            kept[1] += count
        if self.cache is not None:
            self._store(job, {indices[position] for position, *_ in body["errors"]}, self.cache)
        for position, k, cause, message in body["errors"]:
            self._fail(indices[position], None if k < 0 else k, cause, message)

    def _store(self, job: Job, failed: set[int], cache: ScoreCache) -> None:
        """Keep the scores of units in which nothing failed."""
        for unit in job:
            if unit in self.keys and failed.isdisjoint(unit):
                values = [self.result.values[i] for i in unit]
                cache.put(self.keys[unit], {"values": values, "infos": [self.result.infos[i] for i in unit]})

    def _fail(self, index: int, k: int | None, cause: str, message: str) -> None:
        """Record a failure with its sample, apply the policy, and stop the run where the budget is spent."""
        sample = self.samples[index]
        objective = None if k is None else self.objectives[k]
        failure = Failure(self.name, objective, index, sample.group_id, sample.sample_id, cause, message)
        self.result.failures.append(failure)
        self.budget.spend(failure, again=index in self.result.failed)
        self.result.failed.add(index)
        text = json.dumps(sample.completion[:500])
        log.warning(
            "reward %s failed (%s) on group %d sample %d: %s; completion: %s",
            self.name, cause, sample.group_id, sample.sample_id, message, text,
        )  # fmt: skip
        for place in range(len(self.objectives)) if k is None else (k,):
            self.result.values[index][place] = self.policy.value if self.policy.kind == "floor" else None
        if self.policy.kind == "drop_group":
            self.result.dropped.add(sample.group_id)
        if self.policy.kind == "fail":
            raise self.budget.stopped(self.name, "and its on_error is `fail`")
        self.budget.check(self.name, self.rate)
