"""One engine of a fleet: its actor, which is made anew when it is lost, and the calls that say whether it lives."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from align.errors import AlignError, EngineError, EngineLostError
from align.protocols.trainer import Publication
from rollout.base import EngineSpec
from rollout.stepping import Command, Report, first_line
from rollout.worker import WATCH, Home, engine_actor

POLL_S = 1.0


class Lost(Exception):
    """The engine is gone or of no use: what is known of the cause. Another start may help. hung: its process may be
    stopped, and hear nothing. died: its process, or the node, is gone."""

    def __init__(self, what: str, remedy: str | None = None, *, hung: bool = False, died: bool = False):
        super().__init__(what)
        self.what, self.remedy, self.hung, self.died = what, remedy, hung, died


@dataclass(frozen=True)
class Limits:
    """Seconds. place: until a restarted actor has a process (the first has what was reserved for it; where its node was
    lost, another must have room, or join); start: until its engine is up; heartbeat: until a poll is answered; request:
    that an engine with work may go without progress; close: to shut down before it is ended."""

    place: float = 240.0
    start: float = 300.0
    heartbeat: float = 60.0
    request: float = 600.0
    close: float = 10.0


class Member:
    """Worker `index` of a fleet. Whoever drives it calls `launch`, `started`, then `poll` until one raises `Lost`.

    loads: by version, a future of the digest for each `load` that is not answered; None when the engine was lost.
    ready: an actor to start in the first time. starts: that succeeded; losses: in a row, without a finished group
    between them.
    """

    def __init__(
        self,
        index: int,
        spec: EngineSpec,
        options: Mapping[str, Any],
        limits: Limits,
        token: Path | None = None,
        ready: Any = None,
    ):
        self.place = f"rollout worker {index}"
        self.index, self.limits = index, limits
        self.losses = self.starts = 0
        self.lost_at: float | None = None
        self.up = False  # started: commands reach an engine
        self.loads: dict[int, asyncio.Future[str | None]] = {}
        self._spec, self._options, self._token = spec, dict(options), token
        self._actor: Any = None
        self._ready = ready
        self._home: Home | None = None
        self._progress, self._progressed_at = -1, 0.0

    def launch(self) -> None:
        """Make the actor, unless one is ready, and start its engine; returns at once."""
        ready, self._ready = self._ready, None
        self._actor = ready or engine_actor(self._spec.threads, self._spec.passive, **self._options)
        self._homed = self._actor.home.remote()
        self._starting = self._actor.start.remote(self._spec, self._token)

    async def started(self) -> None:
        """Wait for the engine. Raises Lost where it does not come up in time or dies, EngineError where one that was
        lost has no place. What its start raises is passed on the first time; later the engine is known to start, so
        that may be a matter of time (memory to be freed)."""
        limit_s = self.limits.place if self.starts else max(self.limits.place, self.limits.start)
        try:
            self._home = await self._answer(self._homed, limit_s, f"get a process with {self._resources()}")
        except Lost as lost:
            if not self.starts or not lost.hung:
                raise
            raise EngineError(
                f"the engine was lost, and no node had room for another within {limit_s:g} s",
                where=self.place,
                remedy="--resume continues once the cluster has its nodes again; placement.replacement_s waits longer",
            ) from lost
        try:
            await self._answer(self._starting, self.limits.start, "start")
        except EngineError as error:
            if not self.starts:
                raise
            raise Lost(error.what, error.remedy) from error
        self.up, self.starts = True, self.starts + 1
        self._progress = -1

    def _resources(self) -> str:
        wanted = {"CPU": self._options["num_cpus"], "GPU": self._options["num_gpus"]}
        return ", ".join(f"{amount:g} {name}" for name, amount in wanted.items())

    def give(self, command: Command) -> None:
        self._actor.give.remote(command)

    def load(self, publication: Publication) -> asyncio.Future[str | None]:
        """Send a version; the digest of what the engine holds then, or None when it was lost meanwhile."""
        loaded = self.loads.get(publication.version)
        if loaded is None:
            loaded = self.loads[publication.version] = asyncio.get_running_loop().create_future()
            loaded.add_done_callback(_retrieved)
            self.give(publication)
        return loaded

    async def poll(self) -> Report:
        """What happened since the last one, after at most `POLL_S`. Raises Lost where nobody answers."""
        wait_s = min(POLL_S, self.limits.heartbeat / 2)
        answer = self._actor.poll.options(concurrency_group=WATCH).remote(wait_s)
        report: Report = await self._answer(answer, wait_s + self.limits.heartbeat, "answer")
        return report

    def require_working(self, report: Report) -> None:
        """Raise Lost for an engine that failed or makes no progress; an error of ours as it is."""
        if report.error is not None:
            raise placed(report.error, self.place)
        if report.failure is not None:
            raise Lost(f"the engine failed: {report.failure}")
        now = time.monotonic()
        if report.progress != self._progress or not report.busy:
            self._progress, self._progressed_at = report.progress, now
        elif now - self._progressed_at > self.limits.request:
            raise Lost(
                f"the engine has work and made no step within {self.limits.request:g} s",
                "where single steps take so long, raise rollout.request_timeout_s",
                hung=True,
            )

    def end(self, *, hung: bool = False) -> None:
        """Kill the actor; hung: by its process id too, for a stopped process does not hear Ray. Loads that are under
        way are answered with None."""
        self.up = False
        loads, self.loads = self.loads, {}
        for load in loads.values():
            if not load.done():
                load.set_result(None)
        ray.kill(self._actor)
        home, self._home = self._home, None
        if home is None or not hung:
            return
        if home.node == ray.get_runtime_context().get_node_id():
            _kill(home.pid)
        else:
            node = NodeAffinitySchedulingStrategy(home.node, soft=False)
            ray.remote(_kill).options(num_cpus=0, max_retries=0, scheduling_strategy=node).remote(home.pid)

    def closing(self) -> Any:
        """Ask the engine to shut down; Ray's reference to the answer."""
        return self._actor.close.options(concurrency_group=WATCH).remote()

    async def _answer(self, reference: Any, timeout_s: float, what: str) -> Any:
        """The actor's answer; Lost where it does not come in time or cannot come any more."""
        future = asyncio.wrap_future(reference.future())
        future.add_done_callback(_retrieved)
        while True:
            began = time.monotonic()
            done, _ = await asyncio.wait([future], timeout=timeout_s)
            if done or time.monotonic() - began < 1.5 * timeout_s + 1:
                break  # else this process itself stood still, and the answer may be on its way
        try:
            if not done:
                raise Lost(f"the engine did not {what} within {timeout_s:g} s", hung=True)
            return future.result()
        except asyncio.CancelledError as error:  # not this task: the answer was given up by Ray
            raise Lost(f"Ray gave up the answer to {what}") from error
        except RayTaskError as error:
            if isinstance(error.cause, AlignError):
                raise placed(error.cause, self.place) from error
            raise Lost(
                f"the engine failed to {what}: {type(error.cause).__name__}: {first_line(error.cause)}"
            ) from error
        except RayActorError as error:
            raise Lost(
                f"the engine's process died: {first_line(error)}",
                "often memory: see the worker's log in Ray's session folder",
                died=True,
            ) from error
        except RayError as error:
            raise Lost(f"Ray failed to {what}: {first_line(error)}") from error


def placed(error: AlignError, place: str) -> AlignError:
    """The error, with the worker named where it names no place."""
    return type(error)(error.what, where=error.where or place, remedy=error.remedy)


def lost_for_good(lost: Lost, place: str, why: str = "") -> EngineError:
    kind = EngineLostError if lost.died else EngineError
    return kind(f"{lost.what}{why}", where=place, remedy=lost.remedy)


def _retrieved(future: asyncio.Future[Any]) -> None:
    """Mark an exception as seen: nobody may be waiting any more."""
    if not future.cancelled():
        future.exception()


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
