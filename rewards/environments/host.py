"""The parent's handle on an environment: a warm process that has imported it, and a process for each episode."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from os.path import expanduser
from pathlib import Path
from typing import IO, Any

from rewards import wire
from rewards.api import PluginError
from rewards.environments.channel import Channel
from rewards.environments.live import Live
from rewards.environments.spec import EnvironmentSpec
from rewards.worker import LOG_BYTES, REAP_SECONDS, SPAWNER

log = logging.getLogger(__name__)

MAX_ANSWER_BYTES = 4 << 20
GRACE_SECONDS = 2.0
_DESCRIPTION_BYTES = 64 << 20
_ROOMS = Path(__file__).resolve().parents[1]
# `rewards` is this package in whichever interpreter runs it, and nothing else of ours comes with it.
_BOOTSTRAP = f"""
import sys
sys.path[:] = [folder for folder in sys.path if folder]
if sys.version_info < (3, 11):
    sys.exit("an environment's interpreter is Python 3.11 or later, not " + sys.version.split()[0])
import importlib.util
spec = importlib.util.spec_from_file_location("rewards", {str(_ROOMS / "__init__.py")!r})
sys.modules["rewards"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules["rewards"])
from rewards.environments.zygote import main
sys.exit(main(*map(int, sys.argv[1:])))
"""


class Host:
    """One environment. Used by one event loop.

    Args:
        spec, folder, seed: the environment, the recipe's folder, the run's seed.
        log_path: file that receives what it prints; None: an unnamed temporary file.
        memory_mb: data memory that an episode may take beyond what importing took; None: half of the machine's.
        start_s: seconds for importing. max_answer_bytes: of one answer, beside its images. grace_s: seconds after a
            deadline in which code that was interrupted may come back, before its process is killed.
    """

    def __init__(
        self, spec: EnvironmentSpec, folder: Path, seed: int, *, log_path: Path | None = None,
        memory_mb: int | None = None, start_s: float = 120.0, max_answer_bytes: int = MAX_ANSWER_BYTES,
        grace_s: float = GRACE_SECONDS,
    ):  # fmt: skip
        self.spec = spec
        self.starts = 0
        self.description: dict[str, Any] = {}
        self._folder = Path(folder).resolve()
        self._start_s = start_s
        self._grace_s = grace_s
        self._most = max_answer_bytes
        self._log: IO[bytes] = tempfile.TemporaryFile("ab+") if log_path is None else log_path.open("ab+")  # noqa: SIM115
        self._temporary = tempfile.TemporaryDirectory(prefix="environment-", ignore_cleanup_errors=True)
        self._seed = seed
        self._start_message = {
            "spec": spec.to_json(), "folder": str(self._folder), "seed": seed, "memory_mb": memory_mb,
            "max_answer_bytes": max_answer_bytes,
        }  # fmt: skip
        self._process: subprocess.Popen[bytes] | None = None
        self._requests: socket.socket | None = None
        self._starting = asyncio.Lock()
        self._lives: set[Live] = set()
        self._episodes = 0

    async def start(self) -> dict[str, Any]:
        """The description (see `Loaded.describe`), from a warm process that is started if there is none.

        Raises:
            PluginError: it cannot be loaded, with the end of its log; or its files have changed since the first start.
        """
        async with self._starting:
            if self._process is None or self._process.poll() is not None:
                self._forget()
                description = await self._start()
                self._check_same(description)
                self.description = self.description or description
        return self.description

    async def open(self) -> Live:
        """A new episode's process, in milliseconds. PluginError where the machine has no room for one."""
        for again in (True, False):
            await self.start()
            self._trim_log()
            process = self._process
            try:
                return await self._open()
            except (ConnectionError, TimeoutError):  # the warm process ended, or is held by a thread of its import
                if self._process is process:
                    self._kill()
                    self._forget()
                if not again:
                    raise self._broken("its warm process ended twice while it was asked for an episode") from None
        raise AssertionError

    def close(self) -> None:
        """Ends every episode and the warm process; blocks until they are gone. Without an event loop."""
        for live in list(self._lives):
            live.abandon()
        self._forget()
        self._log.close()
        self._temporary.cleanup()

    def log_tail(self, size: int = 2000) -> str:
        """The last of what the environment printed."""
        end = os.fstat(self._log.fileno()).st_size
        return os.pread(self._log.fileno(), size, max(0, end - size)).decode(errors="replace").strip()

    # ------------------------------------------------------------------------------------------------ an episode

    async def _open(self) -> Live:
        self._episodes += 1
        request = json.dumps({"folder": f"{self._temporary.name}/{self._episodes}"}).encode()
        control, their_control = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        talk, their_talk = socket.socketpair()
        with their_control, their_talk:
            live = Live(talk, control, self._most, self._grace_s, self._lives.discard)
            self._lives.add(live)
            try:
                await self._hand_over(request, [their_control.fileno(), their_talk.fileno()])
            except OSError:
                live.abandon()
                raise ConnectionError from None
        try:
            refused = await live.greet(self._start_s)
        except BaseException:
            live.abandon()
            raise
        if refused is not None:
            raise self._broken(f"an episode's process cannot be started: {refused}")
        return live

    async def _hand_over(self, request: bytes, descriptors: list[int]) -> None:
        assert self._requests is not None
        async with asyncio.timeout(self._start_s):
            while True:
                try:
                    socket.send_fds(self._requests, [request], descriptors)
                    return
                except BlockingIOError:  # as many wait as the socket holds
                    await asyncio.sleep(0.005)

    # ------------------------------------------------------------------------------------------------ the warm process

    async def _start(self) -> dict[str, Any]:
        link, their_link = socket.socketpair()
        self._requests, their_requests = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._requests.setblocking(False)
        channel = Channel(link, _DESCRIPTION_BYTES)
        answer: Mapping[str, Any] | None = None
        try:
            with their_link, their_requests:
                descriptors = (their_link.fileno(), their_requests.fileno())
                spawn = asyncio.get_running_loop().run_in_executor(SPAWNER, self._spawn, descriptors)
                self._process = await asyncio.shield(spawn)
            self.starts += 1
            await channel.send(wire.encode(self._start_message))
            answer = await asyncio.wait_for(channel.receive(), self._start_s)
        except TimeoutError:
            wait = "import nothing that waits for another: what takes long belongs into `reset`"
            raise self._broken(f"importing it took more than {self._start_s:g} s", wait) from None
        except wire.ProtocolError as error:
            raise self._broken(f"its process sent {error} while importing it") from None
        except OSError as error:
            remedy = None if self.spec.python is None else "`python` is the path of an interpreter, as bin/python"
            what = f"{self.spec.python} cannot be run" if self.spec.python else "its process cannot be started"
            raise self._broken(f"{what}: {error.strerror or error}", remedy) from error
        finally:
            channel.close()
            if answer is None or "ready" not in answer:
                self._kill()
        if answer is None:
            ends = "importing its file must not end the process, by os._exit or by a crash"
            raise self._broken("its process ended while importing it", ends)
        return self._read_start(answer)

    def _read_start(self, answer: Mapping[str, Any]) -> dict[str, Any]:
        broken, ready = answer.get("broken"), answer.get("ready")
        if isinstance(broken, dict) and broken.keys() == {"what", "where", "remedy"}:
            raise PluginError(**broken)
        if (
            not isinstance(ready, dict)
            or not {"name", "tools", "objectives", "has", "sha256", "modules"} <= ready.keys()
        ):
            self._kill()
            raise self._broken("its process sent a description that is none while importing it")
        return ready

    def _spawn(self, descriptors: tuple[int, int]) -> subprocess.Popen[bytes]:
        python = self.spec.python
        environ = {**os.environ, "PYTHONUNBUFFERED": "1", "TMPDIR": self._temporary.name}
        environ["PYTHONHASHSEED"] = str(self._seed % 2**32)  # the order of sets is the run's too
        if python is not None:  # what was said to our interpreter is not said to another
            environ = {k: v for k, v in environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}
            python = str(self._folder / expanduser(python))
        return subprocess.Popen(
            [python or sys.executable, "-c", _BOOTSTRAP, *map(str, descriptors), str(os.getpid())],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            pass_fds=descriptors,
            cwd=self._folder,
            env=environ,
            start_new_session=True,
        )

    def _check_same(self, description: Mapping[str, Any]) -> None:
        if self.description and any(description[k] != self.description[k] for k in ("sha256", "modules")):
            self._kill()
            raise PluginError(
                "its file, or one that it imports, was changed while the run goes on",
                where=self.spec.where,
                remedy="start the run anew, or put the file back as it was",
            )

    def _forget(self) -> None:
        """The warm process ends when its last keeper has; one that does not is killed."""
        if self._requests is not None:
            self._requests.close()
            self._requests = None
        if self._process is not None:
            for live in list(self._lives):
                live.abandon()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=REAP_SECONDS)
            self._kill()
            self._process = None

    def _kill(self) -> None:
        """The warm process and what importing started; keepers see it, and end."""
        if self._process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=REAP_SECONDS)

    def _broken(self, what: str, remedy: str | None = None) -> PluginError:
        tail = self.log_tail()
        said = [words for words in (remedy, f"its last output:\n{tail}" if tail else "") if words]
        return PluginError(what, where=self.spec.where, remedy="\n     ".join(said) or None)

    def _trim_log(self) -> None:
        if os.fstat(self._log.fileno()).st_size > LOG_BYTES:  # opened for appending: writers go on at the new end
            log.warning("%s printed more than %d MiB; its log starts again", self.spec.where, LOG_BYTES >> 20)
            os.ftruncate(self._log.fileno(), 0)
