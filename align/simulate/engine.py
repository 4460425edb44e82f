"""One engine as arithmetic: all its running sequences gain tokens at the same speed, so what there is to know is how
far they have come, and which of them ends next: O(log n) for each sequence, never anything for a token. The event loop
is woken for what somebody waits for, a whole group, or a slot.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from align.protocols.fleet import PromptItem
from align.simulate.workload import EngineModel

_ROUNDING = 1e-6  # tokens: what ends within so little ends at the same step
_INSTANT_S = 1e-9  # the clock's own rounding


@dataclass(slots=True, eq=False)
class Job:
    """A group to be sampled. lengths: its tokens, by completion; version: that it is sampled from; entered, left: how
    many of its sequences were begun, and how many are not done; deliver: told once all are."""

    prompt: PromptItem
    lengths: Sequence[float]
    deliver: Callable[[Job], None]
    version: int = 0
    entered: int = 0
    left: int = 0

    def __post_init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        self.entered, self.left = 0, len(self.lengths)


class Agenda:
    """Wakes engines when their next sequences end, in order of time: one timer of the event loop for all of them."""

    def __init__(self) -> None:
        self._events: list[tuple[float, int, Engine]] = []
        self._numbers = itertools.count()
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._due = math.inf

    def add(self, engine: Engine, when: float) -> None:
        """Wake `engine` at `when`, and not when it was to be woken before."""
        engine.planned = next(self._numbers)
        heapq.heappush(self._events, (when, engine.planned, engine))
        if when < self._due:
            self._set()

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer, self._due = None, math.inf

    def _set(self) -> None:
        self.close()
        if self._events:
            self._due = self._events[0][0]
            self._timer = self._loop.call_at(self._due, self._wake)

    def _wake(self) -> None:
        self._due = -math.inf  # what engines add now is seen below
        until = self._loop.time() + _INSTANT_S
        while self._events and self._events[0][0] <= until:
            _, number, engine = heapq.heappop(self._events)
            if number == engine.planned:
                engine.step()
        self._set()


class Engine:
    """Samples jobs in the order in which they come, as `model` says. For one event loop.

    ended: told of each job that is done. stamps: a job is sampled from the version that is held when its first sequence
    begins, not from the one under which it was given. tokens: of jobs that are done, so far.
    """

    def __init__(self, model: EngineModel, agenda: Agenda, ended: Callable[[Job], None], *, stamps: bool = False):
        self.model, self._agenda, self._deliver, self._stamps = model, agenda, ended, stamps
        self.version = 0
        self._loads: list[tuple[int, asyncio.Future[None]]] = []  # versions that wait for a batch to end
        self.jobs = 0
        self.tokens = 0.0
        self._busy_s = 0.0
        self._busy_since: float | None = None
        self._waiting: deque[Job] = deque()
        self._running: list[tuple[float, int, Job]] = []  # a heap: by the steps after which a sequence ends
        self._together: list[Job] = []  # done, and answered with their batch
        self._ended: list[Job] = []  # to be handed over
        self._numbers = itertools.count()
        self._steps = 0.0  # since the engine was last empty
        self._from = asyncio.get_running_loop().time()  # up to when `_steps` counts, or from when: prompts come first
        self.planned = -1  # the agenda's number of its next event; any other is out of date
        self._loop = asyncio.get_running_loop()

    def busy_s(self, now: float) -> float:
        """Seconds in which it had work, so far."""
        return self._busy_s + (now - self._busy_since if self._busy_since is not None else 0.0)

    def give(self, jobs: Sequence[Job]) -> None:
        self._advance()
        self.jobs += len(jobs)
        self._waiting.extend(jobs)
        self._fill()
        self._go_on()

    def load(self, version: int) -> asyncio.Future[None] | None:
        """Hold a version from now on (None), or an engine of whole batches from the end of its batch: a future."""
        self._advance()
        if not (self.model.whole_batches and self._running):
            self.version = version
            return None
        self._loads.append((version, self._loop.create_future()))
        return self._loads[-1][1]

    def pause(self, seconds: float) -> None:
        """Sample nothing for so long, and then go on."""
        self._advance()
        self._from += seconds
        self._go_on()

    def lose(self) -> list[Job]:
        """The engine is gone: the jobs it had, in order, to be sampled from their beginning."""
        self._advance()
        held = dict.fromkeys(job for _, _, job in sorted(self._running, key=lambda entry: entry[1]))
        jobs = list(dict.fromkeys([*self._ended, *self._together, *held, *self._waiting]))
        self._waiting.clear()
        self._running.clear()
        self._together.clear()
        self._ended.clear()
        self.jobs = 0
        self._take_loads()  # it starts again with the newest version
        self._rest()
        self._go_on()
        for job in jobs:
            job.restart()
        return jobs

    # ------------------------------------------------------------------------------------------------ at work

    def step(self) -> None:
        """A job ends now, or what waits may begin."""
        self._advance()
        self._go_on()

    def _advance(self) -> None:
        """Up to now: end the sequences that ended meanwhile, each at its own time, and begin what waited for a slot."""
        now = self._loop.time()
        while self._running:
            last = self._running[0][0]
            speed = self.model.step_s(len(self._running))
            when = self._from + max(0.0, last - self._steps) * speed
            if when > now + _INSTANT_S:
                if now > self._from:
                    self._steps += (now - self._from) / speed
                    self._from = now
                return
            self._steps, self._from = max(self._steps, last), when
            while self._running and self._running[0][0] <= self._steps + _ROUNDING:
                _, _, job = heapq.heappop(self._running)
                job.left -= 1
                if not job.left:
                    (self._together if self.model.whole_batches else self._ended).append(job)
            if not self._running:
                self._ended += self._together
                self._together.clear()
                self._rest()
            self._fill()
        self._from = max(self._from, now)

    def _fill(self) -> None:
        """Begin sequences while there are slots, at the time up to which the engine has come."""
        whole = self.model.whole_batches
        if whole and self._running:
            return
        if whole:
            self._take_loads()
        while self._waiting and len(self._running) < self.model.slots:
            job = self._waiting[0]
            if whole and self._running and len(self._running) + job.left > self.model.slots:
                break
            if self._busy_since is None:
                self._busy_since = self._from
            if not job.entered:
                job.version = self.version if self._stamps else job.version
                self._from += self.model.prompt_s
            room = len(job.lengths) if whole else self.model.slots - len(self._running)
            for length in job.lengths[job.entered : job.entered + room]:
                heapq.heappush(self._running, (self._steps + length, next(self._numbers), job))
                job.entered += 1
            if job.entered == len(job.lengths):
                self._waiting.popleft()

    def _go_on(self) -> None:
        """Hand over what is done, and plan to wake up when the next job is, or the next sequence where others wait."""
        ended, self._ended = self._ended, []
        self.planned = -1
        if self._running:
            self._agenda.add(self, self._next_change())
        self.jobs -= len(ended)
        self.tokens += sum(sum(job.lengths) for job in ended)
        for job in ended:
            self._deliver(job)

    def _next_change(self) -> float:
        """When the first job ends that has all its sequences, of whole batches the last; when a sequence does, where
        another may take its slot. What only ends until then is nobody's business but `_advance`'s."""
        whole = self.model.whole_batches
        one = bool(self._waiting) and not whole
        when, steps, running = self._from, self._steps, len(self._running)
        done: dict[Job, int] = {}
        for last, _, job in [self._running[0]] if one else sorted(self._running):
            when += max(0.0, last - steps) * self.model.step_s(running)
            steps, running = max(steps, last), running - 1
            done[job] = done.get(job, 0) + 1
            if not whole and done[job] == job.left:
                break
        return when

    def _take_loads(self) -> None:
        loads, self._loads = self._loads, []
        for version, loaded in loads:
            self.version = version
            if not loaded.done():
                loaded.set_result(None)

    def _rest(self) -> None:
        self._steps = 0.0
        if self._busy_since is not None:
            self._busy_s += self._from - self._busy_since
            self._busy_since = None
