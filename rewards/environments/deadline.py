"""User code under deadlines, in the main thread of an episode's process: plain functions and coroutines.

Past its deadline `Expired` is raised inside the code: by SIGALRM in a plain function, by cancelling a coroutine, and by
SIGALRM in a coroutine that keeps the event loop. Code in C that never returns to Python, and code that catches
everything, do not notice; the parent kills the process then. A function that sets SIGALRM for itself replaces our alarm
until it returns.

One event loop lasts as long as the process: what `reset` opens, a tool may use; tasks that were left go on while the
process waits for the next request. Plain functions run outside of it, and may call `asyncio.run`.
"""

from __future__ import annotations

import asyncio
import inspect
import signal
import socket
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from types import FrameType
from typing import Any

_AGAIN_S = 0.2


class Expired(BaseException):
    """The deadline has passed. No Exception: code that tries again after any of those does not catch it."""


Settle = Callable[[int, Any, BaseException | None], None]
"""Is told (number, value, error) of each coroutine as it ends."""


class Runner:
    """Runs one thing at a time, or coroutines side by side."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._armed = False
        self._fired = False

    def call(self, function: Callable[[], Any], seconds: float) -> Any:
        """What the function gives, awaited where that can be. Expired past the deadline, or whatever it raises."""
        until = time.monotonic() + seconds
        value = self._plain(function, seconds)
        if not inspect.isawaitable(value):
            return value
        settled: list[tuple[Any, BaseException | None]] = []
        self.together([lambda: value], max(0.0, until - time.monotonic()), lambda _, v, e: settled.append((v, e)))
        [(found, error)] = settled
        if error is not None:
            raise error
        return found

    def _plain(self, function: Callable[[], Any], seconds: float) -> Any:
        signal.signal(signal.SIGALRM, self._expire)  # the last function may have taken it
        self._fired = False
        try:
            try:
                self._armed = True
                signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-6))
                value = function()
            finally:
                self._armed = False
                signal.setitimer(signal.ITIMER_REAL, 0)
        except Expired:
            raise
        except BaseException as error:
            if self._fired:  # it was caught, and something else raised
                raise Expired from error
            raise
        if self._fired:  # it was caught and ignored
            raise Expired
        return value

    def _expire(self, _: int, __: FrameType | None) -> None:
        if self._armed:
            self._fired = True
            raise Expired

    # ------------------------------------------------------------------------------------------------ coroutines

    def together(self, starts: Sequence[Callable[[], Awaitable[Any]]], seconds: float, settle: Settle) -> None:
        """Runs coroutines side by side, each under the deadline; returns when all have ended."""
        signal.signal(signal.SIGALRM, self._unblock)
        signal.setitimer(signal.ITIMER_REAL, seconds + _AGAIN_S, _AGAIN_S)
        try:
            self._drive(self._all(starts, seconds, settle))
        finally:
            self._armed = False
            signal.setitimer(signal.ITIMER_REAL, 0)

    async def _all(self, starts: Sequence[Callable[[], Awaitable[Any]]], seconds: float, settle: Settle) -> None:
        tasks = [asyncio.ensure_future(self._one(i, start, seconds, settle)) for i, start in enumerate(starts)]
        await asyncio.wait(tasks)

    async def _one(self, number: int, start: Callable[[], Awaitable[Any]], seconds: float, settle: Settle) -> None:
        value: Any = None
        error: BaseException | None = None
        try:
            self._armed = True
            async with asyncio.timeout(seconds) as scope:
                value = await start()
            if scope.expired():  # it caught its cancellation
                error = Expired()
        except BaseException as raised:  # noqa: BLE001  whatever it raises is its answer
            error = Expired() if isinstance(raised, TimeoutError) and scope.expired() else raised
        self._armed = False  # what follows is ours, and awaits nothing
        settle(number, value, error)
        self._armed = True

    def _unblock(self, _: int, __: FrameType | None) -> None:
        """A coroutine still holds the loop: raised inside it. Where the loop is free, `asyncio.timeout` works."""
        if self._armed and self._loop is not None and asyncio.current_task(self._loop) is not None:
            raise Expired

    def _drive(self, work: Coroutine[Any, Any, Any]) -> None:
        loop = self._loop
        if loop is None:
            loop = self._loop = asyncio.new_event_loop()
            asyncio.set_event_loop(loop)
        task = loop.create_task(work)
        while not task.done():
            try:
                loop.run_until_complete(task)
            except BaseException:  # noqa: BLE001  SystemExit of a task that user code left: it ends that task alone
                continue

    def wait_for(self, sock: socket.socket) -> None:
        """Until there is something to read; tasks that user code left go on meanwhile."""
        if self._loop is not None:
            self._drive(self._readable(self._loop, sock))

    @staticmethod
    async def _readable(loop: asyncio.AbstractEventLoop, sock: socket.socket) -> None:
        event = asyncio.Event()
        loop.add_reader(sock, event.set)
        try:
            await event.wait()
        finally:
            loop.remove_reader(sock)
