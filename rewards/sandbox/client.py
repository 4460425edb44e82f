"""The side of the sandbox that the caller lives on: start, ask, judge what came back."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

from rewards.api import PluginError
from rewards.sandbox import kernel
from rewards.sandbox.jail import Limits
from rewards.sandbox.peer import HEADER

_ROOT = str(Path(__file__).resolve().parents[2])
_BOOTSTRAP = (
    "import sys; sys.path.insert(0, sys.argv[1]); from rewards.sandbox.zygote import main; "
    "del sys.path[0]; main(int(sys.argv[2]), int(sys.argv[3]))"
)
# Nothing of ours; sets in the same order every time; threads that do not reserve address space by the gigabyte.
_ENVIRONMENT = {"PYTHONHASHSEED": "0", "LANG": "C.UTF-8", "MALLOC_ARENA_MAX": "1"}
_START_S = 30.0
_GRACE_S = 1.0
_ALMOST = 0.5  # of its CPU seconds: the kernel ends by the clock and counts by ticks; a busy machine loses some
_REMEDY = (
    "code runs only on Linux 5.14 or later (x86-64 or arm64) where a user may make namespaces. In a container: run it "
    "with `--security-opt seccomp=unconfined --security-opt apparmor=unconfined` (no privilege is needed); on Ubuntu: "
    "`sysctl kernel.apparmor_restrict_unprivileged_userns=0`; elsewhere: `sysctl user.max_user_namespaces=10000`"
)


class SandboxError(Exception):
    """The sandbox failed, not the code in it."""


class UnusableTests(ValueError):
    """The tests cannot judge any solution."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """passed of total cases. cause: "" where all passed, else failed | broken (it does not even load) | timeout |
    crashed | output (too much of it). detail: what failed first, at most some hundred characters."""

    passed: int
    total: int
    cause: str = ""
    detail: str = ""

    @property
    def fraction(self) -> float:
        return self.passed / self.total


@dataclass(frozen=True, slots=True)
class Calls:
    """How a solution is judged by calls. setup: trusted source that the tests need; tests: sources with assertions;
    entry: a name that tests use and that is the solution's even where setup defines it; fraction: go on after a
    failure, to count."""

    tests: Sequence[str]
    setup: str = ""
    entry: str | None = None
    fraction: bool = False


class Sandbox:
    """Runs Python that nobody has read. One process to fork from; any number of calls at once, on one event loop.

    Raises:
        PluginError: from `start`, where this machine cannot contain it. Nothing has run then.
        SandboxError: from the others, where the sandbox failed and nothing is known of the code.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._requests: socket.socket | None = None

    # ------------------------------------------------------------------------------------------------ life

    async def start(self) -> None:
        """Start, and try everything that is forbidden. Does nothing where it runs already."""
        if self._process is not None and self._process.poll() is None:
            return
        self.close()
        if sys.platform != "linux" or kernel.MACHINE not in kernel.MACHINES:
            raise _refused(f"this is {sys.platform} on {kernel.MACHINE}")
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [
                    sys.executable,
                    "-P",
                    "-s",
                    "-S",
                    "-B",
                    "-c",
                    _BOOTSTRAP,
                    _ROOT,
                    str(theirs.fileno()),
                    str(os.getpid()),
                ],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                env=_ENVIRONMENT,
                cwd="/",
            )
        self._requests = ours
        try:
            await asyncio.wait_for(self._probe(), _START_S)
        except (SandboxError, TimeoutError, OSError) as error:
            self.close()
            raise _refused(str(error) or "it did not start in time") from error
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End everything that runs. May be called twice, and without an event loop."""
        if self._requests is not None:
            self._requests.close()
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._process = self._requests = None

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    async def _probe(self) -> None:
        """Each layer is entered by a process of its own, which then tries what the layer forbids."""
        with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as abstract:
            name = f"\0align-sandbox-{os.getpid()}-{server.getsockname()[1]}"
            abstract.bind(name)
            abstract.listen()
            outside = {
                "port": server.getsockname()[1],
                "abstract": name,
                "pid": os.getpid(),
                "proc": f"/proc/{os.getpid()}/status",
            }
            with self._spawn("probe", Limits(cpu_s=5, wall_s=20, memory_mb=4096, files_mb=1), {}, outside) as probe:
                first = await probe.message()
                if not first.get("contained"):
                    raise SandboxError(f"{first.get('refused') or f'the trial process ended: {first}'}")

    # ------------------------------------------------------------------------------------------------ judging

    async def run_tests(self, solution: str, tests: Calls, limits: Limits) -> Outcome:
        """The solution in one sandbox, its tests in another; see `rewards.sandbox` for why the verdict holds.

        UnusableTests where the tests are to blame."""
        link, other_link = socket.socketpair()
        channel, far = socket.socketpair()
        with link, other_link, far, contextlib.ExitStack() as running:
            candidate = running.enter_context(self._spawn("candidate", limits, {3: link}))
            patient = replace(limits, wall_s=limits.wall_s + _GRACE_S, cpu_s=limits.cpu_s + _GRACE_S)
            judge = running.enter_context(self._spawn("tests", patient, {3: far, 4: other_link}))
            for ours in (link, other_link, far):
                ours.close()
            job = {**asdict(tests), "tests": list(tests.tests), "solution": solution, "wall_s": limits.wall_s}
            answer = await _exchange(channel, _frame(job), 1 << 20)
            ended, judged = await candidate.stop(), await judge.stop()
        return _verdict(answer, ended, judged, limits)

    async def run_script(self, solution: str, text: str, limits: Limits) -> tuple[str, Outcome]:
        """The solution as a program with `text` on its standard input; what it printed, and passed = 1 of 1 where it
        ended by itself with status 0."""
        stream, standard = socket.socketpair()
        channel, far = socket.socketpair()
        with standard, far, contextlib.ExitStack() as running:
            program = running.enter_context(self._spawn("script", limits, {0: standard, 1: standard, 3: far}))
            standard.close()
            far.close()
            most = limits.output_kb << 10
            told = asyncio.create_task(_exchange(channel, solution.encode("utf-8", "replace"), 4096))
            printed = await _exchange(stream, text.encode("utf-8", "replace"), most)
            ended = await program.stop(1.0)
            detail = (await told).decode("utf-8", "replace")
        if len(printed) > most:
            return "", Outcome(0, 1, "output", f"printed more than {limits.output_kb} KiB")
        return printed.decode("utf-8", "replace"), _how_it_ended(ended, detail, limits)

    def _spawn(
        self, role: str, limits: Limits, passed: Mapping[int, socket.socket], outside: Mapping[str, Any] | None = None
    ) -> Contained:
        if self._requests is None:
            raise SandboxError("the sandbox is closed")
        ours, keeper = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with keeper:
            request = {"role": role, "limits": asdict(limits), "places": list(passed), "outside": outside}
            descriptors = [keeper.fileno(), *(s.fileno() for s in passed.values())]
            try:
                socket.send_fds(self._requests, [json.dumps(request).encode()], descriptors)
            except OSError as error:
                ours.close()
                raise SandboxError(f"its zygote is gone: {error}") from error
        return Contained(ours)


class Contained:
    """A process in the sandbox, by its keeper. Leaving the `with` ends it."""

    def __init__(self, keeper: socket.socket):
        keeper.setblocking(False)
        self._keeper = keeper

    async def message(self) -> dict[str, Any]:
        try:
            text = await asyncio.get_running_loop().sock_recv(self._keeper, 1 << 16)
        except ConnectionError:
            text = b""
        message: dict[str, Any] = json.loads(text) if text else {"refused": "its keeper ended without a word"}
        return message

    async def stop(self, grace_s: float = 0.0) -> dict[str, Any]:
        """End it and wait until it is gone; how it ended. grace_s: it may end by itself so long."""
        waiting = asyncio.create_task(self.message())
        if grace_s:
            await asyncio.wait([waiting], timeout=grace_s)
        if not waiting.done():
            with contextlib.suppress(OSError):
                self._keeper.shutdown(socket.SHUT_WR)  # a message that it did not read would hide its last one
        ended = await waiting
        if "refused" in ended:
            raise SandboxError(f"a process could not be contained, so it did not run: {ended['refused']}")
        return ended

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._keeper.close()


def _frame(job: Mapping[str, Any]) -> bytes:
    body = json.dumps(job).encode("ascii")
    return HEADER.pack(len(body)) + body


async def _exchange(stream: socket.socket, data: bytes, most: int) -> bytes:
    """Send `data` and the stream's end, and read until the other side's, or a byte more than `most`."""
    reader, writer = await asyncio.open_connection(sock=stream)
    sending = asyncio.create_task(_send(writer, data))
    parts: list[bytes] = []
    size = 0
    try:
        while size <= most and (part := await reader.read(1 << 16)):
            parts.append(part)
            size += len(part)
    except OSError:  # reset: it closed with some of our data unread
        pass
    finally:
        sending.cancel()
        await asyncio.gather(sending, return_exceptions=True)
        writer.transport.abort()
    return b"".join(parts)


async def _send(writer: asyncio.StreamWriter, data: bytes) -> None:
    with contextlib.suppress(OSError):  # it need not read
        writer.write(data)
        await writer.drain()
        writer.write_eof()


def _verdict(answer: bytes, candidate: dict[str, Any], judge: dict[str, Any], limits: Limits) -> Outcome:
    if not answer:
        if judge["timeout"] or judge["cpu_s"] >= _ALMOST * limits.cpu_s:
            return Outcome(0, 1, "timeout", "the tests did not come to an end")
        raise SandboxError(f"the tests ended without a verdict (status {judge['status']})")
    found = json.loads(answer)
    if found["bad"]:
        raise UnusableTests(found["bad"])
    cause, detail = found["cause"], found["failure"]
    if cause == "crashed":
        late = _how_it_ended(candidate, "", limits)
        cause, detail = late.cause or cause, late.detail or detail
    return Outcome(found["passed"], found["total"], cause, detail)


def _how_it_ended(ended: Mapping[str, Any], detail: str, limits: Limits) -> Outcome:
    if ended["timeout"]:
        return Outcome(0, 1, "timeout", f"not done after {limits.wall_s:g} s")
    if ended["status"] == -signal.SIGKILL and ended["cpu_s"] >= _ALMOST * limits.cpu_s:
        return Outcome(0, 1, "timeout", f"used more than {limits.cpu_s:g} s of CPU")
    if ended["status"] < 0:
        return Outcome(0, 1, "crashed", f"ended by signal {-ended['status']}")
    if ended["status"] > 0:
        return Outcome(0, 1, "failed" if detail else "crashed", detail or f"exited with status {ended['status']}")
    return Outcome(1, 1)


def _refused(why: str) -> PluginError:
    return PluginError(f"code cannot be contained here: {why}", remedy=_REMEDY)
