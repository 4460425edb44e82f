"""Engines that only take time, as one: `align.protocols.fleet.Fleet` with the routing, publishing and restarts of a
real one.

Completions have one token, which says by which version they were sampled; how many tokens they stand for is known to
`Lengths`. So what the loop does with a group costs the same however long its completions are.
"""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import AsyncIterator, Sequence
from functools import lru_cache

import numpy as np

from align.errors import DataError
from align.protocols.fleet import Completion, FailedPrompt, Group, PromptItem, Sampling
from align.protocols.trainer import Metrics, Publication
from align.simulate.engine import Agenda, Engine, Job
from align.simulate.workload import NEVER, Workload

_IDS = np.zeros(1, dtype=np.int64)
_LOGPS = np.zeros(1, dtype=np.float32)


class SimulatedFleet:
    """For one event loop, on a virtual clock. Groups go to engines as `rollout.ledger` routes them where no prompts
    begin alike: in turn where all engines are idle, else to the one with the fewest."""

    def __init__(self, work: Workload):
        self.work = work
        # vLLM samples a group from the version it was given under; what swaps weights in place, or begins batch by
        # batch, from the one that it holds when the group begins
        stamps = work.publishing == "in_flight" or work.engine.whole_batches
        self._agenda = Agenda()
        self.engines = [Engine(work.engine, self._agenda, self._done, stamps=stamps) for _ in range(work.engines)]
        self.version = 0
        self._up = [True] * work.engines
        self._down_since = [0.0] * work.engines
        self._chance = np.random.default_rng([work.seed, 1])
        self._loop = asyncio.get_running_loop()
        self._timers: dict[int, asyncio.TimerHandle] = {}
        self._homeless: list[Job] = []  # no engine is up
        self._behind: list[Job] | None = None  # given while engines drain for a version: sampled from it
        self._held = 0  # jobs that engines have
        self._empty = asyncio.Event()
        self._empty.set()
        self._counts = _zeros()
        if work.between_failures_s < NEVER:
            for number in range(work.engines):
                self._expect_failure(number)

    # ------------------------------------------------------------------------------------------------ the protocol

    async def probe(self, prompt: PromptItem, sampling: Sampling) -> list[Group]:
        """None: nothing is computed that could be compared."""
        return []

    async def publish(self, publication: Publication) -> Metrics:
        """See `align.protocols.fleet.Fleet`. Adapters load while engines sample; those of whole batches load when
        theirs ends. `drain` waits until they have no group, `in_flight` pauses them."""
        begun = self._loop.time()
        if self.work.publishing == "drain":
            self._behind = []
            await self._empty.wait()
        elif self.work.publishing == "in_flight":
            for engine in self.engines:
                engine.pause(self.work.publish_s)
        await asyncio.sleep(self.work.publish_s)
        self.version = publication.version
        loads = [engine.load(self.version) for engine in self.engines]
        await asyncio.gather(*(load for load in loads if load is not None))
        behind, self._behind = self._behind or [], None
        self._route(behind)
        return {"time/publish": self._loop.time() - begun}

    async def stream(
        self, prompts: Sequence[PromptItem], group_size: int, sampling: Sampling
    ) -> AsyncIterator[Group | FailedPrompt]:
        done: asyncio.Queue[Job] = asyncio.Queue()
        assert group_size == self.work.group_size, "lengths are drawn for groups of one size"
        self._route([Job(item, self.work.lengths.of(item.group_id).tolist(), done.put_nowait) for item in prompts])
        for _ in prompts:
            job = await done.get()
            yield Group(job.prompt, (_completion(job.version),) * group_size)

    async def generate(self, prompts: Sequence[PromptItem], group_size: int, sampling: Sampling) -> list[Group]:
        answers = [answer async for answer in self.stream(prompts, group_size, sampling)]
        failed = [answer for answer in answers if isinstance(answer, FailedPrompt)]
        if failed:
            raise DataError(failed[0].message, where=failed[0].prompt.origin)
        found = {answer.prompt.group_id: answer for answer in answers if isinstance(answer, Group)}
        return [found[item.group_id] for item in prompts]

    def metrics(self) -> Metrics:
        counts, self._counts = self._counts, _zeros()
        return counts

    async def close(self) -> None:
        self._agenda.close()
        for timer in self._timers.values():
            timer.cancel()

    # ------------------------------------------------------------------------------------------------ what engines did

    @property
    def busy_s(self) -> float:
        """Seconds in which an engine had work, summed over engines, so far."""
        return sum(engine.busy_s(self._loop.time()) for engine in self.engines)

    @property
    def tokens(self) -> float:
        """Of groups that are done, so far."""
        return sum(engine.tokens for engine in self.engines)

    # ------------------------------------------------------------------------------------------------ groups

    def _route(self, jobs: Sequence[Job]) -> None:
        if self._behind is not None:
            self._behind += jobs
            return
        if not jobs:
            return
        serving = [number for number, up in enumerate(self._up) if up]
        if not serving:
            self._homeless += jobs
            return
        given: dict[int, list[Job]] = {}
        if len(serving) == len(self.engines) and not self._held:
            for place, job in enumerate(jobs):
                given.setdefault(serving[place % len(serving)], []).append(job)
        else:
            loads = [(self.engines[number].jobs, number) for number in serving]
            heapq.heapify(loads)
            for job in jobs:
                load, number = loads[0]
                heapq.heapreplace(loads, (load + 1, number))
                given.setdefault(number, []).append(job)
        self._hold(len(jobs))
        for number, share in given.items():
            for job in share:
                job.version = self.version
            self.engines[number].give(share)

    def _done(self, job: Job) -> None:
        self._hold(-1)
        job.deliver(job)

    def _hold(self, more: int) -> None:
        self._held += more
        if self._held:
            self._empty.clear()
        else:
            self._empty.set()

    # ------------------------------------------------------------------------------------------------ failures

    def _expect_failure(self, number: int) -> None:
        lived = float(self._chance.exponential(self.work.between_failures_s))
        self._timers[number] = self._loop.call_later(lived, self._fail, number)

    def _fail(self, number: int) -> None:
        """The engine's groups go to the others, and are sampled from the newest version."""
        self._up[number], self._down_since[number] = False, self._loop.time()
        jobs = self.engines[number].lose()
        self._hold(-len(jobs))
        self._counts["rollout/restarts"] += 1
        self._counts["rollout/reissued"] += len(jobs)
        self._timers[number] = self._loop.call_later(self.work.restart_s, self._serve, number)
        self._route(jobs)

    def _serve(self, number: int) -> None:
        self._up[number] = True
        self._counts["time/engine_lost"] += self._loop.time() - self._down_since[number]
        self._expect_failure(number)
        homeless, self._homeless = self._homeless, []
        self._route(homeless)


@lru_cache(maxsize=64)
def _completion(version: int) -> Completion:
    return Completion(_IDS, _LOGPS, np.full(1, version, dtype=np.int32), "", "eos")


def _zeros() -> Metrics:
    return dict.fromkeys(("rollout/restarts", "rollout/reissued", "time/engine_lost"), 0.0)
