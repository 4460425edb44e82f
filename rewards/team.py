"""The processes of one plugin as one: calls are dealt to those that are free, within its concurrency and rate."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

from rewards.api import Sample, per_second
from rewards.connection import Reply
from rewards.plugin import PluginSpec
from rewards.worker import Worker


class Gate:
    """Deals places in processes: `capacity` calls at once in each, or one call alone. First come, first served."""

    def __init__(self, processes: int, capacity: int):
        self._capacity = capacity
        self._active = [0] * processes
        self._waiting: deque[tuple[asyncio.Future[int], bool]] = deque()

    @contextlib.asynccontextmanager
    async def enter(self, alone: bool) -> AsyncIterator[int]:
        """The number of the process that takes the call."""
        place: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._waiting.append((place, alone))
        self._admit()
        try:
            number = await place
        except asyncio.CancelledError:
            if not place.cancelled():  # the place was given in the same turn of the loop
                self._leave(place.result(), alone)
            raise
        try:
            yield number
        finally:
            self._leave(number, alone)

    def _leave(self, number: int, alone: bool) -> None:
        self._active[number] -= self._capacity if alone else 1
        self._admit()

    def _admit(self) -> None:
        while self._waiting:
            place, alone = self._waiting[0]
            number = min(range(len(self._active)), key=self._active.__getitem__)
            if not place.done():
                if self._active[number] > (0 if alone else self._capacity - 1):
                    return
                self._active[number] += self._capacity if alone else 1
                place.set_result(number)
            self._waiting.popleft()


class Pace:
    """Spaces samples evenly, `rate` of them a second; None: at once."""

    def __init__(self, rate: float | None):
        self._seconds = 1 / rate if rate else 0.0
        self._next = 0.0

    async def take(self, samples: int) -> None:
        if not self._seconds:
            return
        now = asyncio.get_running_loop().time()
        turn = max(self._next, now)
        self._next = turn + samples * self._seconds
        await asyncio.sleep(turn - now)


class Team:
    """One plugin's processes. Not shared between event loops.

    Args:
        spec, folder, seed: see Worker. log_path: of the first process; the others' have their number before the suffix.
        share: teams elsewhere that run the same plugin for the same stage; its concurrency and rate hold over all.
    """

    def __init__(self, spec: PluginSpec, folder: Path, seed: int, log_path: Path | None, share: int = 1):
        self.spec = spec
        self._start = (spec, folder, seed)
        self._log_path = log_path
        self._share = share
        self.workers = [Worker(*self._start, log_path)]
        self._gate = Gate(1, 1)
        self._pace = Pace(None)
        self.places = 1  # calls that may be in flight

    @property
    def description(self) -> dict[str, Any]:
        return self.workers[0].description

    @property
    def starts(self) -> int:
        return sum(w.starts for w in self.workers)

    async def start(self) -> None:
        """Start every process. PluginError if the plugin cannot be loaded."""
        await self.workers[0].start()
        options = self.description["options"]
        for number in range(1, options["processes"]):
            log = self._log_path and self._log_path.with_suffix(f".{number}{self._log_path.suffix}")
            self.workers.append(Worker(*self._start, log))
        try:
            async with asyncio.TaskGroup() as tasks:  # where one does not start, none is left starting
                for worker in self.workers[1:]:
                    tasks.create_task(worker.start())
        except BaseExceptionGroup as group:
            raise group.exceptions[0] from None
        capacity = self._capacity()
        self.places = capacity * len(self.workers)
        self._gate = Gate(len(self.workers), capacity)
        self._pace = Pace(per_second(options["rate"]) / self._share if options["rate"] is not None else None)

    def _capacity(self) -> int:
        """Calls in flight per process: one for a sync plugin; for an async one its part of `concurrency` samples."""
        options = self.description["options"]
        if not self.description["is_async"]:
            return 1
        calls = options["concurrency"] // options["batch"]
        return max(1, calls // (self._share * len(self.workers)))

    async def call(self, samples: Sequence[Sample], *, alone: bool) -> Reply:
        """One call under the plugin's deadline, which does not run while it waits for its turn.

        alone: with nothing else in flight in its process, so that blame is certain.
        """
        async with self._gate.enter(alone) as number:
            await self._pace.take(len(samples))
            return await self.workers[number].call(samples)

    async def golds(self, rows: Sequence[Any]) -> list[str | Exception | None]:
        """Per row what the plugin's `gold` gives, or the error that it raised."""
        async with self._gate.enter(True) as number:
            return await self.workers[number].golds(rows)

    def close(self) -> None:
        """End every process, without an event loop; blocks until they are gone."""
        for worker in self.workers:
            worker.close()
