"""The thread in which an engine's episodes are played, and how many of them live."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

from align.episodes.episode import Play
from align.episodes.group import Played, Retries, draw_group
from align.episodes.images import open_images
from align.episodes.spec import EpisodeSpec
from align.episodes.venue import Venue, Venues
from align.protocols.fleet import Completion, FailedPrompt, PromptItem, Sampling
from rollout.base import Answer, Request

CLOSE_S = 5.0  # for the close() of an environment


@dataclass(frozen=True, slots=True)
class Wanted:
    """A turn that an episode waits for. ticket: its group's; place: (ticket, episode), by which turns are sorted."""

    ticket: int
    number: int
    prompt: PromptItem
    sampling: Sampling
    drawn: asyncio.Future[Completion | FailedPrompt]

    @property
    def place(self) -> tuple[int, int]:
        return self.ticket, self.number


class EpisodeLoop:
    """notice: called when something changed, answer: told of every group that is done; both in this object's thread.

    failure: what ended the thread's work.

    Raises what starting the environment raises.
    """

    def __init__(
        self,
        spec: EpisodeSpec,
        context: int,
        notice: Callable[[], None],
        answer: Callable[[Answer], None],
    ):
        self.lockstep = spec.worlds[0].rules.lockstep
        self.failure: BaseException | None = None
        self._notice, self._tell = notice, answer
        self._images = open_images(spec.sight)
        self._venues = Venues(spec, context, self._images)
        self._groups: dict[int, asyncio.Task[None]] = {}
        self._lock = threading.Lock()
        self._live = self._pending = 0  # live: as the loop's thread counted them last
        self._untaken: dict[int, Wanted] = {}  # by id: turns that are wanted and that nobody samples yet
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="episodes", daemon=True)
        self._thread.start()
        try:
            self._in_loop(self._venues.open())
        except BaseException:
            self.close()
            raise

    def _in_loop(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    # ------------------------------------------------------------------------------------------ by the engine's thread

    def take(self) -> list[Wanted]:
        """The turns that are wanted and that nobody has taken yet, in order of groups and episodes; under lockstep none
        unless every live episode wants one."""
        with self._lock:
            if self.lockstep and (self._pending or self._live != len(self._untaken)):
                return []
            wanted, self._untaken = self._untaken, {}
        return sorted(wanted.values(), key=lambda one: one.place)

    def begin(self, requests: Sequence[Request]) -> None:
        with self._lock:
            self._pending += 1  # not quiet until these have their places
        self._loop.call_soon_threadsafe(self._begin, tuple(requests))

    def sampled(self, wanted: Wanted, drawn: Completion | FailedPrompt) -> None:
        self._loop.call_soon_threadsafe(_settle, wanted.drawn, drawn)

    def abandon(self, tickets: Collection[int]) -> None:
        self._loop.call_soon_threadsafe(self._abandon, frozenset(tickets))

    def close(self) -> None:
        """End every episode, their processes and the thread."""
        if self._thread.is_alive():
            self._in_loop(self._end())
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()
        self._venues.close()
        if self._images is not None:
            self._images.close()

    # ------------------------------------------------------------------------------------------ in the loop

    def _begin(self, requests: Sequence[Request]) -> None:
        for request in requests:
            task = self._loop.create_task(self._group(request))
            self._groups[request.ticket] = task
            task.add_done_callback(self._done(request.ticket))
        # groups take their places in the next turns of the loop; then it may be quiet
        self._loop.call_later(0, self._loop.call_soon, self._settled)

    def _settled(self) -> None:
        with self._lock:
            self._pending -= 1
        self._notice()

    def _done(self, ticket: int) -> Callable[[asyncio.Task[None]], None]:
        def note(task: asyncio.Task[None]) -> None:
            self._groups.pop(ticket, None)
            if not task.cancelled() and (error := task.exception()) is not None:
                self.failure = self.failure or _first(error)
                self._notice()

        return note

    async def _group(self, request: Request) -> None:
        venue = self._venues.of(request.prompt)
        rules = venue.setting.rules

        async def draw(prompt: PromptItem, number: int, attempt: int) -> Played:
            return await self._episode(venue, request, number, attempt)

        try:
            answer = await draw_group(request.prompt, request.group_size, draw, Retries(rules.retries), rules.as_ or "")
            self._tell((request.ticket, answer))
        finally:
            if self._images is not None:
                await self._images.answered(request.prompt.group_id)

    async def _episode(self, venue: Venue, request: Request, number: int, attempt: int) -> Played:
        await venue.enter()
        self._count()
        try:
            live = await venue.host.open()
            try:
                sample = self._sampler(request.ticket, number)
                play = Play(venue.setting, request.prompt, number, request.sampling, sample, live, attempt=attempt)
                return await play.play()
            finally:
                await live.close(CLOSE_S)
        finally:
            venue.leave()
            self._count()
            self._notice()

    def _count(self) -> None:
        with self._lock:
            self._live = self._venues.live

    def _sampler(self, ticket: int, number: int) -> Callable[[PromptItem, Sampling], Any]:
        async def sample(prompt: PromptItem, sampling: Sampling) -> Completion | FailedPrompt:
            wanted = Wanted(ticket, number, prompt, sampling, self._loop.create_future())
            with self._lock:
                self._untaken[id(wanted)] = wanted
            self._notice()
            try:
                return await wanted.drawn
            finally:
                with self._lock:
                    self._untaken.pop(id(wanted), None)

        return sample

    def _abandon(self, tickets: Collection[int]) -> None:
        for ticket in tickets:
            if (task := self._groups.get(ticket)) is not None:
                task.cancel()

    async def _end(self) -> None:
        tasks = list(self._groups.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _settle(future: asyncio.Future[Any], value: Any) -> None:
    if not future.done():
        future.set_result(value)


def _first(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
