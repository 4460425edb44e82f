"""The parent's handle on one plugin process: start, call with a deadline, kill, start again."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import IO, Any

from rewards import wire
from rewards.answers import checked_golds, checked_scores
from rewards.api import PluginError, RewardError, Sample
from rewards.connection import REAP_SECONDS, START_SECONDS, Check, Connection, Reply
from rewards.plugin import PluginSpec

log = logging.getLogger(__name__)

GRACE_SECONDS = 1.0
LOG_BYTES = 16 * 2**20
_ROOT = str(Path(__file__).resolve().parent.parent)
# `rewards` must be this package, whatever the working directory or PYTHONPATH of the parent hold.
_BOOTSTRAP = f"import sys; sys.path.insert(0, {_ROOT!r}); from rewards.process import main; sys.exit(main())"

# The kernel's parent-death signal fires when the *thread* that started a child ends: all are started from this one,
# which lasts as long as the process.
SPAWNER = ThreadPoolExecutor(1, thread_name_prefix="reward-spawner")


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
        connection = await self._connect()
        start = {"spec": self.spec.to_json(), "folder": str(self.folder), "seed": self.seed}
        answer: Mapping[str, Any] | None = None
        try:
            answer = await connection.greet(start)
        except TimeoutError:
            raise self._broken(f"importing it took more than {START_SECONDS:g} s") from None
        except wire.ProtocolError as error:
            raise self._broken(f"its process sent {error} while importing it") from None
        finally:
            if answer is None or "ready" not in answer:
                connection.kill("start", "it did not start")
                with contextlib.suppress(subprocess.TimeoutExpired):
                    await asyncio.to_thread(connection.process.wait, REAP_SECONDS)
        if answer is None:
            raise self._broken("its process ended while importing it")
        if "broken" in answer:
            raise PluginError(**answer["broken"])
        if not self.description:
            self.description = answer["ready"]
        connection.listen()
        return connection

    async def _connect(self) -> Connection:
        """A new process and the socket to it. PluginError where the machine has no room for one."""
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                process = await asyncio.get_running_loop().run_in_executor(SPAWNER, self._spawn, theirs.fileno())
        except OSError as error:
            ours.close()
            raise PluginError(
                f"its process cannot be started: {error}",
                where=self.spec.use,
                remedy="see `ulimit -a`, and free memory",
            ) from error
        self.starts += 1
        return Connection(process, *await asyncio.open_connection(sock=ours))

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
        check = partial(checked_scores, samples=len(samples), objectives=len(self.description["objectives"]))
        reply = await self._ask({"samples": wire.pack_samples(samples)}, check)
        return replace(reply, seconds=time.monotonic() - started)

    async def golds(self, rows: Sequence[Any]) -> list[str | Exception | None]:
        """Per row what the plugin's `gold` gives, or the error that it raised."""
        reply = await self._ask({"golds": list(rows)}, partial(checked_golds, rows=len(rows)))
        if reply.error is not None:
            return [RewardError(f"gold: {reply.error[1]}")] * len(rows)
        return [RewardError(f"gold {error}") if error else gold for gold, error in reply.body["golds"]]

    async def _ask(self, request: dict[str, Any], check: Check) -> Reply:
        connection = await self.start()  # the process may have been killed before
        self._trim_log()
        timeout: float = self.description["options"]["timeout_s"]
        patience = timeout + (GRACE_SECONDS if self.description["is_async"] else 0.0)
        reply = await connection.call(request, check, patience, timeout)
        died = reply.lost and reply.error is not None and reply.error[0] in ("crashed", "protocol")
        if died and reply.error is not None and (tail := self.log_tail(400)):
            return replace(reply, error=(reply.error[0], f"{reply.error[1]}; last output: {tail}"))
        return reply

    def close(self) -> None:
        """End the process, without an event loop; blocks until it is gone."""
        if self._connection is not None:
            self._connection.kill("closed", "the pool was closed")
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._connection.process.wait(timeout=REAP_SECONDS)
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
