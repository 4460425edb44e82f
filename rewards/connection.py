"""One running plugin process and the calls in flight to it. Whatever comes of the process, or of what listens to it,
every call is answered: with scores, or with what became of them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from rewards import wire
from rewards.answers import checked_start

log = logging.getLogger(__name__)

START_SECONDS = 120.0
REAP_SECONDS = 10.0  # for a killed process to be gone; the kernel may hold one that waits for a disk

Check = Callable[[Mapping[str, Any]], None]


@dataclass(frozen=True, slots=True)
class Reply:
    """What a call came to. error: (cause, message) where the whole call failed. lost: the process ended under it;
    alone: and no other call was in flight, so that this one is to blame. seconds: from sending to the answer."""

    body: dict[str, Any] = field(default_factory=dict)
    error: tuple[str, str] | None = None
    lost: bool = False
    alone: bool = True
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class _Pending:
    reply: asyncio.Future[Reply]
    check: Check


class Connection:
    """`greet`, then `listen`, then any number of calls at once."""

    def __init__(self, process: subprocess.Popen[bytes], reader: asyncio.StreamReader, writer: asyncio.StreamWriter):
        self.process = process
        self.alive = True
        self._reader = reader
        self._writer = writer
        self._pending: dict[int, _Pending] = {}
        self._next = 0
        self._ended: tuple[str, str] | None = None
        self._listener: asyncio.Task[None] | None = None

    async def greet(self, start: dict[str, Any]) -> Mapping[str, Any] | None:
        """Send the start message; the answer, None where the process ended. TimeoutError after START_SECONDS,
        ProtocolError where what comes is no answer to it."""
        self._writer.write(wire.encode(start))
        answer = await asyncio.wait_for(wire.read(self._reader), START_SECONDS)
        return None if answer is None else checked_start(answer)

    def listen(self) -> None:
        self._listener = asyncio.create_task(self._listen())

    async def call(self, request: dict[str, Any], check: Check, patience: float, timeout: float) -> Reply:
        """One call; its process is killed when it takes more than `patience` seconds, when it is cancelled, and when
        what comes back is no answer: `check` raises ProtocolError."""
        number, self._next = self._next, self._next + 1
        try:
            frame = wire.encode({"id": number, "timeout_s": timeout, **request})
        except (TypeError, ValueError, RecursionError) as error:
            return Reply(error=("wrong_type", f"the sample cannot be sent: {error}"))
        reply: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self._pending[number] = _Pending(reply, check)
        try:
            if not self.alive:
                return self._lost()
            self._writer.write(frame)
            return await asyncio.wait_for(asyncio.shield(reply), patience)
        except TimeoutError:
            self.kill("timeout", f"not done after {timeout:g} s; its process was killed")
            # the listener settles it, knowing whether others were in flight
            done, _ = await asyncio.wait([reply], timeout=2 * REAP_SECONDS)
            return reply.result() if done else self._lost()
        except asyncio.CancelledError:
            self.kill("cancelled", "another call was given up")
            raise
        finally:
            self._pending.pop(number, None)

    def _lost(self) -> Reply:
        return Reply(error=self._ended, lost=True, alone=False)

    # ------------------------------------------------------------------------------------------------ listening

    async def _listen(self) -> None:
        """Settle calls as their answers come; the rest of them when nothing more will come, whatever the reason."""
        try:
            await self._hear()
            with contextlib.suppress(subprocess.TimeoutExpired):
                await asyncio.to_thread(self.process.wait, REAP_SECONDS)
        finally:
            self.kill("crashed", "its process was given up")
            waiting = [pending.reply for pending in self._pending.values() if not pending.reply.done()]
            for reply in waiting:
                reply.set_result(Reply(error=self._ended, lost=True, alone=len(waiting) == 1))

    async def _hear(self) -> None:
        try:
            while (answer := await wire.read(self._reader)) is not None:
                self._settle(answer)
        except wire.ProtocolError as error:
            self.kill("protocol", f"its process sent {error}; it was killed")
        except Exception as error:
            log.exception("listening to a reward's process failed")
            self.kill("protocol", f"listening to its process failed: {type(error).__name__}: {error}")
        else:
            if self._ended is None:
                how = await self._cause_of_death()
                self.kill("crashed", f"its process {how}")

    def _settle(self, answer: dict[str, Any]) -> None:
        number = answer.get("id")
        pending = self._pending.get(number) if isinstance(number, int) else None
        if pending is None or pending.reply.done():
            raise wire.ProtocolError(f"an answer to call {number!r}, which does not wait for one")
        pending.check(answer)
        error = answer.get("error")
        pending.reply.set_result(Reply(body=answer, error=(error[0], error[1]) if error else None))

    async def _cause_of_death(self) -> str:
        self.alive = False
        try:
            code = await asyncio.to_thread(self.process.wait, 2.0)
        except subprocess.TimeoutExpired:
            return "closed its socket"
        return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"exited with status {code}"

    def kill(self, cause: str, message: str) -> None:
        """End the process and whatever it started; calls in flight come back lost. The first cause is kept."""
        self.alive = False
        self._ended = self._ended or (cause, message)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        with contextlib.suppress(RuntimeError):  # its loop may be closed already; the socket goes with it
            self._writer.close()
