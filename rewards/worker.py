"""The parent's handle on one plugin process: start, call with a deadline, kill, start again."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

from rewards import wire
from rewards.api import PluginError, RewardError, Sample
from rewards.plugin import PluginSpec

log = logging.getLogger(__name__)

START_SECONDS = 120.0
GRACE_SECONDS = 1.0
LOG_BYTES = 16 * 2**20
_ROOT = str(Path(__file__).resolve().parent.parent)
# `rewards` must be this package, whatever the working directory or PYTHONPATH of the parent hold.
_BOOTSTRAP = f"import sys; sys.path.insert(0, {_ROOT!r}); from rewards.process import main; sys.exit(main())"

# The kernel's parent-death signal fires when the *thread* that started a child ends: all are started from this one,
# which lasts as long as the process.
_SPAWNER = ThreadPoolExecutor(1, thread_name_prefix="reward-spawner")


@dataclass(frozen=True, slots=True)
class Reply:
    """What a call came to. error: (cause, message) where the whole call failed. lost: the process ended under it;
    alone: and no other call was in flight, so that this one is to blame. seconds: from sending to the answer."""

    body: dict[str, Any] = field(default_factory=dict)
    error: tuple[str, str] | None = None
    lost: bool = False
    alone: bool = True
    seconds: float = 0.0


class Connection:
    """One running plugin process and the calls in flight to it."""

    def __init__(self, process: subprocess.Popen[bytes], reader: asyncio.StreamReader, writer: asyncio.StreamWriter):
        self.process = process
        self.alive = True
        self._reader = reader
        self._writer = writer
        self._pending: dict[int, asyncio.Future[Reply]] = {}
        self._next = 0
        self._ended: tuple[str, str] | None = None
        self._listener: asyncio.Task[None] | None = None

    async def greet(self, start: dict[str, Any]) -> dict[str, Any] | None:
        """Send the start message; the answer, None where the process ended. TimeoutError after START_SECONDS."""
        self._writer.write(wire.encode(start))
        return await asyncio.wait_for(_read(self._reader), START_SECONDS)

    def listen(self) -> None:
        self._listener = asyncio.create_task(self._listen())

    async def call(self, request: dict[str, Any], patience: float, timeout: float) -> Reply:
        """One call; its process is killed when it takes more than `patience` seconds, or when it is cancelled."""
        number, self._next = self._next, self._next + 1
        try:
            frame = wire.encode({"id": number, "timeout_s": timeout, **request})
        except (TypeError, ValueError) as error:
            return Reply(error=("wrong_type", f"the sample cannot be sent: {error}"))
        reply: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self._pending[number] = reply
        try:
            if not self.alive:
                return Reply(error=self._ended, lost=True, alone=False)
            self._writer.write(frame)
            return await asyncio.wait_for(asyncio.shield(reply), patience)
        except TimeoutError:
            self.kill("timeout", f"not done after {timeout:g} s; its process was killed")
            return await reply  # the listener settles it, knowing whether others were in flight
        except asyncio.CancelledError:
            self.kill("cancelled", "another call was given up")
            raise
        finally:
            self._pending.pop(number, None)

    async def _listen(self) -> None:
        while (answer := await _read(self._reader)) is not None:
            future = self._pending.get(answer["id"])
            if future is not None and not future.done():
                error = answer.get("error")
                future.set_result(Reply(body=answer, error=(error[0], error[1]) if error else None))
        if self._ended is None:
            how = await self._cause_of_death()
            self.kill("crashed", f"its process {how}")
        await asyncio.to_thread(self.process.wait)
        waiting = [f for f in self._pending.values() if not f.done()]
        for future in waiting:
            future.set_result(Reply(error=self._ended, lost=True, alone=len(waiting) == 1))

    async def _cause_of_death(self) -> str:
        self.alive = False
        try:
            code = await asyncio.to_thread(self.process.wait, 2.0)
        except subprocess.TimeoutExpired:
            return "closed its socket"
        return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"exited with status {code}"

    def kill(self, cause: str, message: str) -> None:
        """End the process and whatever it started; calls in flight come back lost."""
        self.alive = False
        self._ended = self._ended or (cause, message)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        with contextlib.suppress(RuntimeError):  # its loop may be closed already; the socket goes with it
            self._writer.close()


class Worker:
    """One plugin, one process at a time, whose temporary files go with it. Not shared between event loops.

    Args:
        spec, folder, seed: the plugin, the recipe's folder, the run's seed.
        log_path: file that receives the plugin's stdout and stderr; None: an unnamed temporary file.
    """

    def __init__(self, spec: PluginSpec, folder: Path, seed: int, log_path: Path | None):
        self.spec = spec
        self.folder = folder
        self.seed = seed
        self.starts = 0
        self.description: dict[str, Any] = {}
        self._log: IO[bytes] = tempfile.TemporaryFile("ab+") if log_path is None else log_path.open("ab+")  # noqa: SIM115
        # its process is killed, and cannot tidy up after itself
        self._temporary = tempfile.TemporaryDirectory(prefix="reward-", ignore_cleanup_errors=True)
        self._connection: Connection | None = None
        self._starting = asyncio.Lock()

    async def start(self) -> Connection:
        """The running process, started if there is none. PluginError if the plugin cannot be loaded."""
        async with self._starting:
            if self._connection is None or not self._connection.alive:
                self._connection = await self._start()
            return self._connection

    async def _start(self) -> Connection:
        ours, theirs = socket.socketpair()
        with theirs:
            process = await asyncio.get_running_loop().run_in_executor(_SPAWNER, self._spawn, theirs.fileno())
        self.starts += 1
        connection = Connection(process, *await asyncio.open_connection(sock=ours))
        start = {"spec": self.spec.to_json(), "folder": str(self.folder), "seed": self.seed}
        answer: dict[str, Any] | None = None
        try:
            answer = await connection.greet(start)
        except TimeoutError:
            raise self._broken(f"importing it took more than {START_SECONDS:g} s") from None
        finally:
            if answer is None or "ready" not in answer:
                connection.kill("start", "it did not start")
                process.wait()
        if answer is None:
            raise self._broken("its process ended while importing it")
        if "broken" in answer:
            raise PluginError(**answer["broken"])
        if not self.description:
            self.description = answer["ready"]
        connection.listen()
        return connection

    def _broken(self, what: str) -> PluginError:
        tail = self.log_tail()
        return PluginError(what, where=self.spec.use, remedy=f"its last output:\n{tail}" if tail else None)

    def _spawn(self, fd: int) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-P", "-c", _BOOTSTRAP, "--fd", str(fd), "--parent", str(os.getpid())],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            pass_fds=(fd,),
            cwd=self.folder,
            env={**os.environ, "PYTHONUNBUFFERED": "1", "TMPDIR": self._temporary.name},
            start_new_session=True,
        )

    async def call(self, samples: Sequence[Sample]) -> Reply:
        """One call under the plugin's deadline."""
        started = time.monotonic()
        reply = await self._ask({"samples": wire.pack_samples(samples)})
        return replace(reply, seconds=time.monotonic() - started)

    async def golds(self, rows: Sequence[Any]) -> list[str | Exception | None]:
        """Per row what the plugin's `gold` gives, or the error that it raised."""
        reply = await self._ask({"golds": list(rows)})
        if reply.error is not None:
            return [RewardError(f"gold: {reply.error[1]}")] * len(rows)
        return [RewardError(f"gold {error}") if error else gold for gold, error in reply.body["golds"]]

    async def _ask(self, request: dict[str, Any]) -> Reply:
        connection = await self.start()  # the process may have been killed before
        self._trim_log()
        timeout: float = self.description["options"]["timeout_s"]
        patience = timeout + (GRACE_SECONDS if self.description["is_async"] else 0.0)
        reply = await connection.call(request, patience, timeout)
        if reply.lost and reply.error is not None and reply.error[0] == "crashed" and (tail := self.log_tail(400)):
            return replace(reply, error=("crashed", f"{reply.error[1]}; last output: {tail}"))
        return reply

    def close(self) -> None:
        """End the process, without an event loop; blocks until it is gone."""
        if self._connection is not None:
            self._connection.kill("closed", "the pool was closed")
            self._connection.process.wait(timeout=30)
            self._connection = None
        self._log.close()
        self._temporary.cleanup()

    def log_tail(self, size: int = 2000) -> str:
        """The last of what the plugin printed."""
        end = os.fstat(self._log.fileno()).st_size
        return os.pread(self._log.fileno(), size, max(0, end - size)).decode(errors="replace").strip()

    def _trim_log(self) -> None:
        if os.fstat(self._log.fileno()).st_size > LOG_BYTES:  # opened for appending: the child goes on at the new end
            log.warning("%s printed more than %d MiB; its log starts again", self.spec.use, LOG_BYTES >> 20)
            os.ftruncate(self._log.fileno(), 0)


async def _read(reader: asyncio.StreamReader) -> dict[str, Any] | None:
    """The next message, None at the stream's end."""
    try:
        header = await reader.readexactly(wire.HEADER.size)
        return wire.decode(await reader.readexactly(wire.HEADER.unpack(header)[0]))
    except (asyncio.IncompleteReadError, ConnectionResetError):
        return None
