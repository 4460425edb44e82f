"""One plugin over one list of samples: batches, retries, bisection, error policy and error budget."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from rewards.api import ErrorPolicy, Failure, RewardError, Sample
from rewards.worker import Reply, Worker

log = logging.getLogger(__name__)

_BACKOFF_SECONDS = 0.2
_SHOWN = 5

Job = tuple[tuple[int, ...], ...]  # units that are scored together; a unit is one sample, or one whole group


@dataclass
class Budget:
    """What a plugin's max_error_rate is a share of: `samples`, scored in one call or in several that share this.

    failed: samples that failed so far; first: the first failures, for the message that ends the run.
    """

    samples: int
    failed: int = 0
    first: list[Failure] = field(default_factory=list)


@dataclass
class PluginResult:
    """values[i][k]: sample i, the plugin's objective k; None where not applicable or failed. failed: their indices.
    dropped: group ids. busy_seconds: inside the plugin, summed over calls; seconds: from first call to last answer."""

    values: list[list[float | None]]
    failures: list[Failure] = field(default_factory=list)
    failed: set[int] = field(default_factory=set)
    dropped: set[int] = field(default_factory=set)
    infos: list[dict[str, Any]] = field(default_factory=list)
    metrics: dict[str, list[float]] = field(default_factory=dict)
    calls: int = 0
    retried: int = 0
    busy_seconds: float = 0.0
    seconds: float = 0.0


class Execution:
    """Scores `samples` with one worker.

    Args:
        worker: a started worker. samples: what to score. budget: of failures, over all calls that share it.
    """

    def __init__(self, worker: Worker, samples: Sequence[Sample], budget: Budget):
        described = worker.description
        self.worker = worker
        self.samples = samples
        self.name: str = described["name"]
        self.objectives = list(described["objectives"])
        self.by_group = described["scope"] == "group"
        options = described["options"]
        self.batch: int = options["batch"]
        self.retries: int = options["retries"]
        self.backoff = _BACKOFF_SECONDS if described["is_async"] else 0.0
        self.policy = ErrorPolicy.parse(options["on_error"])
        self.rate: float = options["max_error_rate"]
        self.budget = budget
        self.result = PluginResult(values=[[None] * len(self.objectives) for _ in samples], infos=[{} for _ in samples])

    async def run(self) -> PluginResult:
        """Raises RewardError where the policy is `fail` or more samples failed than may."""
        started = time.monotonic()
        tasks = [asyncio.create_task(self._settle(job)) for job in self._jobs()]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        self.result.seconds = time.monotonic() - started
        return self.result

    def _jobs(self) -> list[Job]:
        if self.by_group:
            order = sorted(range(len(self.samples)), key=lambda i: self.samples[i].group_id)
            groups = groupby(order, key=lambda i: self.samples[i].group_id)
            return [(tuple(members),) for _, members in groups]
        units = [(i,) for i in range(len(self.samples))]
        return [tuple(units[i : i + self.batch]) for i in range(0, len(units), self.batch)]

    async def _settle(self, job: Job, *, alone: bool = False, attempt: int = 0) -> None:
        """Score a job. A failure is narrowed down, half by half, until the unit that causes it stands alone."""
        indices = [i for unit in job for i in unit]
        reply = await self.worker.call([self.samples[i] for i in indices], alone=alone)
        self.result.calls += 1
        if reply.error is None:
            self._keep(indices, reply)
        elif reply.lost and not (reply.alone or alone):
            await self._settle(job, alone=True, attempt=attempt)  # perhaps another call's fault
        elif len(job) > 1:
            half = len(job) // 2
            await self._settle(job[:half], alone=alone or reply.lost)
            await self._settle(job[half:], alone=alone or reply.lost)
        elif attempt < self.retries:
            self.result.retried += 1
            await asyncio.sleep(self.backoff * 2**attempt)
            await self._settle(job, alone=alone, attempt=attempt + 1)
        else:
            cause, message = reply.error
            for i in indices:
                self._fail(i, None, cause, message)

    def _keep(self, indices: Sequence[int], reply: Reply) -> None:
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
        for position, k, cause, message in body["errors"]:
            self._fail(indices[position], None if k < 0 else k, cause, message)

    def _fail(self, index: int, k: int | None, cause: str, message: str) -> None:
        """Record a failure with its sample, apply the policy, and stop the run where the budget is spent."""
        sample = self.samples[index]
        objective = None if k is None else self.objectives[k]
        failure = Failure(self.name, objective, index, sample.group_id, sample.sample_id, cause, message)
        self.result.failures.append(failure)
        if len(self.budget.first) < _SHOWN:
            self.budget.first.append(failure)
        if index not in self.result.failed:
            self.result.failed.add(index)
            self.budget.failed += 1
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
            raise self.stopped("and its on_error is `fail`")
        allowed = allowed_failures(self.rate, self.budget.samples)
        if self.budget.failed > allowed:
            raise self.stopped(f"more than max_error_rate = {self.rate:g} allows ({allowed})")

    def stopped(self, why: str) -> RewardError:
        """The error that ends the run, with the first failures."""
        shown = "\n".join(
            f"     group {f.group_id} sample {f.sample_id}, {f.objective or 'all objectives'}: {f.cause}: {f.message}"
            for f in self.budget.first
        )
        share = f"{self.budget.failed} of {self.budget.samples} samples"
        return RewardError(
            f"{self.name} failed on {share} so far, {why}; the first failures:\n{shown}",
            remedy="mend the plugin, raise its timeout_s, or allow more with max_error_rate",
        )


def allowed_failures(rate: float, samples: int) -> int:
    """How many of a step's samples may fail: the share, rounded down, but one where any may."""
    return 0 if rate == 0 else max(1, int(rate * samples + 1e-9))
