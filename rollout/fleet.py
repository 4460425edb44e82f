"""Engines as one: groups are spread over them, versions reach all of them, and one that dies is started again.

`RayFleet` implements `align.protocols.fleet.Fleet`, as `rollout.local_fleet.LocalFleet` does with one engine in this
process.

Errors are of two kinds. What a start of the engine may cure (a process that died or hangs, an exception that is not
ours) costs a restart: the engine is killed, started in its place, brought to the newest version, and the groups that it
had are drawn again, by the other engines where there are any. What it would only meet again (weights that differ from
what was published, an adapter that is not applied, logits that are not finite) ends the fleet.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from align.errors import AlignError, EngineError, PlacementError
from align.protocols.fleet import FailedPrompt, Group, PromptItem, Sampling
from align.protocols.trainer import Metrics, Publication
from rollout.base import Answer, EngineSpec, Request, check_engine_options, check_sampling
from rollout.ledger import Ledger, Routed
from rollout.local_fleet import compare_digest, in_order
from rollout.member import Limits, Lost, Member, lost_for_good, placed
from rollout.stepping import Abandon, Refusal, Report, Result, answered

MAX_LOSSES = 3
"""Restarts of one engine without a finished group between them, and of engines that had the same group, before it is
given up: 3 are bad luck, the fourth is a cause that stays."""


class RayFleet:
    """`workers` engines, each in an actor of its own. See `align.protocols.fleet.Fleet`; for one event loop.

    Actors are created here and start side by side; `ready` (or the first publish) waits for them. An engine that does
    not start the first time is an error; later ones are restarted, see `MAX_LOSSES`.

    Args:
        spec: what each engine is.
        workers: how many.
        cpus, gpus: reserved per actor; fractions are allowed.
        placement_group, bundles: where; bundle `bundles[i]` holds worker i (all of them anywhere in the group when
            bundles is None; anywhere in the cluster when placement_group is None). A restart stays in its bundle.
        limits: after how many seconds an engine counts as lost.
        token: a file of the run folder that an engine's node must see.
        ready: an `engine_actor` that the first worker starts in, the first time; it is this fleet's from then on.

    Raises:
        RecipeError: an engine option that the engine does not have (before any actor is created).
    """

    def __init__(
        self,
        spec: EngineSpec,
        workers: int,
        *,
        cpus: float = 1.0,
        gpus: float = 0.0,
        placement_group: PlacementGroup | None = None,
        bundles: Sequence[int] | None = None,
        limits: Limits | None = None,
        token: Path | None = None,
        ready: Any = None,
    ):
        if workers < 1 or (bundles is not None and len(bundles) != workers):
            raise PlacementError(
                f"{workers} rollout workers cannot be placed in the bundles {bundles}",
                where="rollout.workers",
                remedy="give at least one worker, and one bundle for each",
            )
        check_engine_options(spec.name, spec.engine)
        self._members = []
        for index in range(workers):
            options: dict[str, object] = {"num_cpus": cpus, "num_gpus": gpus}
            if placement_group is not None:
                options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(
                    placement_group=placement_group,
                    placement_group_bundle_index=-1 if bundles is None else bundles[index],
                )
            own = ready if index == 0 else None
            self._members.append(Member(index, spec, options, limits or Limits(), token, own))
        self._ledger = Ledger(workers)
        self._tickets = itertools.count()
        self._queues: dict[int, asyncio.Queue[Answer | AlignError]] = {}  # by ticket: the stream that asked for it
        self._newest: Publication | None = None
        self._error: AlignError | None = None
        self._closed = False
        self._tasks: list[asyncio.Task[None]] = []
        self._first: list[asyncio.Future[None]] = []  # by member: has it started once?
        self._counts: Metrics = _zeros()
        for member in self._members:
            member.launch()

    async def ready(self) -> None:
        """Wait until every engine has started once.

        Raises:
            EngineError: an engine did not start in time. Whatever its start raised otherwise, as it raised it.
        """
        self._require_open("start")
        if not self._tasks:
            loop = asyncio.get_running_loop()
            self._first = [loop.create_future() for _ in self._members]
            self._tasks = [loop.create_task(self._keep(member)) for member in self._members]
            for task in self._tasks:
                task.add_done_callback(self._ended)
        await asyncio.wait(self._first, return_when=asyncio.FIRST_EXCEPTION)
        self._require_open("start")

    # ------------------------------------------------------------------------------------------ what stages ask for

    async def publish(self, publication: Publication) -> Metrics:
        """See `align.protocols.fleet.Fleet`; returns `{"time/publish": seconds}`. An engine that is being restarted
        loads this version when it is up, and takes no group before.

        Raises:
            EngineError: an engine holds other weights than were published, or cannot be kept alive.
        """
        await self.ready()
        started = time.perf_counter()
        self._newest = publication
        self._ledger.forget_prefixes()
        loads = {member: member.load(publication) for member in self._members if member.up}
        if loads:
            await asyncio.wait(loads.values())
        for member, load in loads.items():
            digest = load.result()
            if digest is not None:  # else it was lost, and loads this version when it is up again
                compare_digest(digest, publication, member.place)
        self._require_open("load a version")
        return {"time/publish": time.perf_counter() - started}

    async def stream(
        self, prompts: Sequence[PromptItem], group_size: int, sampling: Sampling
    ) -> AsyncIterator[Group | FailedPrompt]:
        """See `align.protocols.fleet.Fleet`.

        Raises:
            EngineError: nothing was published yet, or engines cannot be kept alive. Unsupported: see `check_sampling`.
        """
        async for _, answer in self._drawn(prompts, group_size, sampling):
            yield answer

    async def generate(self, prompts: Sequence[PromptItem], group_size: int, sampling: Sampling) -> list[Group]:
        """All of `stream`, in the order of prompts. Raises DataError for a prompt that fails."""
        return await in_order(self._drawn(prompts, group_size, sampling))

    async def probe(self, prompt: PromptItem, sampling: Sampling) -> list[Group]:
        """See `align.protocols.fleet.Fleet`. One of an engine that is lost meanwhile is drawn by another."""
        prompts = [prompt] * len(self._ledger.serving)
        return [g async for _, g in self._drawn(prompts, 1, sampling, in_turn=True, plain=True) if isinstance(g, Group)]

    async def _drawn(
        self,
        prompts: Sequence[PromptItem],
        group_size: int,
        sampling: Sampling,
        *,
        in_turn: bool = False,
        plain: bool = False,
    ) -> AsyncIterator[Answer]:
        await self.ready()
        if self._newest is None:
            raise EngineError("the fleet was asked to generate before a version was published to it")
        check_sampling(group_size, sampling)
        requests = [Request(next(self._tickets), prompt, group_size, sampling, plain) for prompt in prompts]
        queue: asyncio.Queue[Answer | AlignError] = asyncio.Queue()
        self._queues |= {request.ticket: queue for request in requests}
        self._send(self._ledger.admit(requests, in_turn=in_turn))
        try:
            for _ in requests:
                answer = await queue.get()
                if isinstance(answer, AlignError):
                    raise answer
                yield answer
        finally:
            self._give_up([request.ticket for request in requests])

    def metrics(self) -> Metrics:
        """Since the last call: `rollout/restarts` of engines, `rollout/reissued` groups, `time/engine_lost` (seconds in
        which an engine was missing, summed over engines), `rollout/failed_prompts`."""
        counts, self._counts = self._counts, _zeros()
        return counts

    async def close(self) -> None:
        """Let every engine shut down, then end its actor; one that is hung or dead is ended without."""
        if self._closed:
            return
        self._closed = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tell_streams(self._refusal("finish a stream"))
        answers = [member.closing() for member in self._members]
        limit = self._members[0].limits.close
        closed, _ = await asyncio.to_thread(ray.wait, answers, num_returns=len(answers), timeout=limit)
        for member, answer in zip(self._members, answers, strict=True):
            member.end(hung=answer not in closed)

    # ------------------------------------------------------------------------------------------ keeping engines at work

    async def _keep(self, member: Member) -> None:
        """Keep one engine at work until the fleet closes or fails."""
        try:
            while True:
                try:
                    await member.started()
                    self._started(member)
                    while True:
                        report = await member.poll()
                        self._take(member, report)
                        member.require_working(report)
                except Lost as lost:
                    self._restart(member, lost)
        except AlignError as error:
            self._fail(error)

    def _started(self, member: Member) -> None:
        """The engine is up: it takes groups once it holds the newest version."""
        if self._newest is not None:
            member.load(self._newest)
        if not self._first[member.index].done():
            self._first[member.index].set_result(None)

    def _take(self, member: Member, report: Report) -> None:
        incarnation = self._ledger.incarnations[member.index]
        for ticket, result in report.finished:
            request = self._ledger.finish(ticket, member.index, incarnation)
            if request is not None:  # else its stream was closed
                member.losses = 0
                self._queues.pop(ticket).put_nowait((ticket, self._answer(request, result)))
        for version, held in report.published:
            load = member.loads.pop(version)
            if isinstance(held, AlignError):
                error = placed(held, member.place)
                load.set_exception(error)
                raise error
            load.set_result(held)
            if self._newest is not None and version == self._newest.version:
                self._serve(member, held, self._newest)

    def _serve(self, member: Member, digest: str, newest: Publication) -> None:
        compare_digest(digest, newest, member.place)
        if member.lost_at is not None:
            self._counts["time/engine_lost"] += time.monotonic() - member.lost_at
            member.lost_at = None
        self._send(self._ledger.serve(member.index))

    def _answer(self, request: Request, result: Result) -> Group | FailedPrompt:
        if isinstance(result, Refusal):
            self._counts["rollout/failed_prompts"] += 1
        return answered(request, result)

    def _restart(self, member: Member, lost: Lost) -> None:
        """Kill what is left of the engine, hand its groups to the others, and start it again.

        Raises EngineError where it was lost too often, or has not started once.
        """
        member.end(hung=lost.hung)
        if not member.starts:
            raise lost_for_good(lost, member.place)
        if member.lost_at is None:
            member.lost_at = time.monotonic()
        requests = self._ledger.lose(member.index)
        member.losses += 1
        if member.losses > MAX_LOSSES:
            raise lost_for_good(lost, member.place, f"; it was restarted {MAX_LOSSES} times without finishing a group")
        fatal = [request.prompt for request in requests if self._ledger.losses(request) > MAX_LOSSES]
        if fatal:
            others = f" or one of {len(fatal) - 1} others" if len(fatal) > 1 else ""
            place = fatal[0].origin or f"group {fatal[0].group_id}"
            raise lost_for_good(lost, place, f"; so did every engine that had this prompt{others}")
        self._counts["rollout/restarts"] += 1
        self._counts["rollout/reissued"] += len(requests)
        self._send(self._ledger.admit(requests))
        member.launch()

    def _send(self, routed: Routed) -> None:
        for engine, requests in routed.items():
            self._members[engine].give(requests)

    def _give_up(self, tickets: Sequence[int]) -> None:
        """A stream ended: what it still waits for is drawn no further."""
        for ticket in tickets:
            self._queues.pop(ticket, None)
        for engine, dropped in self._ledger.forget(tickets).items():
            if self._members[engine].up and not self._closed:
                self._members[engine].give(Abandon(tuple(dropped)))

    # ------------------------------------------------------------------------------------------ failing

    def _fail(self, error: AlignError) -> None:
        """The fleet works no more: whoever waits for it gets the error, and so does who asks later."""
        if self._error is not None:
            return
        self._error = error
        self._tell_streams(self._error)  # before all that may fail itself
        for first in self._first:
            if not first.done():
                first.set_exception(self._error)
                first.exception()  # seen, whether somebody waits for it or not
        for task, member in zip(self._tasks, self._members, strict=True):
            if task is not asyncio.current_task():
                task.cancel()
            with contextlib.suppress(RayError, RuntimeError):  # Ray itself may be gone: what is left ends with it
                member.end()

    def _ended(self, task: asyncio.Task[None]) -> None:
        """An error of a kind that nobody expected ends the fleet too, and so does any other end of the task but by
        `close` and `_fail`: without it an engine would be waited for for ever."""
        if self._closed or self._error is not None:
            if not task.cancelled():
                task.exception()  # seen
            return
        error = None if task.cancelled() else task.exception()
        why = "its task was given up" if error is None else f"{type(error).__name__}: {error}"
        self._fail(EngineError(f"the fleet failed: {why}"))

    def _tell_streams(self, error: AlignError) -> None:
        for queue in set(self._queues.values()):
            queue.put_nowait(error)

    def _require_open(self, what: str) -> None:
        if self._error is not None:
            raise self._error
        if self._closed:
            raise self._refusal(what)

    def _refusal(self, what: str) -> EngineError:
        return EngineError(f"the fleet was asked to {what} after it was closed")


def _zeros() -> Metrics:
    return dict.fromkeys(("rollout/restarts", "rollout/reissued", "time/engine_lost", "rollout/failed_prompts"), 0.0)
