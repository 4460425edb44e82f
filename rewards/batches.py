"""Which samples go into one call, and where a call that failed may be cut. A group is never cut against the will of a
plugin's scope; where it may be, it is cut last."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from rewards.api import Sample, Scope

Unit = tuple[int, ...]  # what is scored, retried and kept as one: one sample, or one whole group, by index
Job = tuple[Unit, ...]  # units that are scored in one call


def units_of(samples: Sequence[Sample], scope: Scope) -> list[Unit]:
    """Every sample for itself where a score depends on it alone, else whole groups."""
    if scope == "sample":
        return [(i,) for i in range(len(samples))]
    order = sorted(range(len(samples)), key=lambda i: samples[i].group_id)
    return [tuple(members) for _, members in groupby(order, key=lambda i: samples[i].group_id)]


def jobs_of(units: Sequence[Unit], samples: Sequence[Sample], scope: Scope, batch: int) -> list[Job]:
    """Calls of at most `batch` samples; a whole group that is larger is one of its own."""
    if scope == "group":
        return [(unit,) for unit in units]
    jobs: list[Job] = []
    waiting: list[Unit] = []
    size = 0
    for block in _blocks(units, samples, batch):
        count = sum(map(len, block))
        if waiting and size + count > batch:
            jobs.append(tuple(waiting))
            waiting, size = [], 0
        waiting += block
        size += count
    return [*jobs, tuple(waiting)] if waiting else jobs


def _blocks(units: Sequence[Unit], samples: Sequence[Sample], batch: int) -> list[Sequence[Unit]]:
    """Units of one group that stand side by side, in parts of at most `batch`."""
    runs = [list(run) for _, run in groupby(units, key=lambda unit: samples[unit[0]].group_id)]
    return [run[first : first + batch] for run in runs for first in range(0, len(run), batch)]


def halves(job: Job, samples: Sequence[Sample]) -> tuple[Job, Job]:
    """A job of several units in two: between two groups, as near to the middle as may be; within one where it is of
    one group alone."""
    groups = [samples[unit[0]].group_id for unit in job]
    cuts = [n for n in range(1, len(job)) if groups[n] != groups[n - 1]] or [len(job) // 2]
    before = [0]
    for unit in job:
        before.append(before[-1] + len(unit))
    cut = min(cuts, key=lambda n: abs(2 * before[n] - before[-1]))
    return job[:cut], job[cut:]
