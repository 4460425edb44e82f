"""A plugin's own process: `python -m rewards.process --fd N --parent PID`, started by `rewards.worker`.

It reads requests from the inherited socket, calls the plugin, and answers. It ends with its parent: by the kernel's
parent-death signal on Linux, by watching its parent's id elsewhere, and at the socket's end everywhere.
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import os
import resource
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rewards import wire
from rewards.api import Context, PluginError, Sample
from rewards.find import load
from rewards.plugin import Plugin, PluginSpec
from rewards.verdict import WrongLength, judge

_PR_SET_PDEATHSIG = 1


def die_with_parent(parent: int) -> None:
    """SIGKILL for this process when its parent ends, even while a plugin holds the GIL (Linux); a watch elsewhere."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
        if os.getppid() != parent:  # it ended before the signal was armed
            os._exit(1)
    else:
        threading.Thread(target=_watch_parent, args=(parent,), daemon=True).start()


def _watch_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


def limit_memory(megabytes: int) -> None:
    """Bound private data memory: an allocation past it fails here instead of waking the machine's OOM killer.

    Not the address space, which libraries reserve by the hundred gigabytes without using it.
    """
    limit = megabytes * 2**20
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def default_memory_mb() -> int:
    """Half of what this machine or container has: well under the 95 % at which Ray kills the actor instead."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.is_file():
        text = limit.read_text().strip()
        total = min(total, int(text)) if text.isdigit() else total
    return max(256, total // 2**21)


class Server:
    """Answers the requests of one pool for one plugin."""

    def __init__(self, plugin: Plugin, run_seed: int):
        self.plugin = plugin
        self.run_seed = run_seed

    def prepare(self, request: dict[str, Any]) -> tuple[list[Sample], Context]:
        samples = wire.unpack_samples(request["samples"])
        deadline = time.monotonic() + request["timeout_s"]
        ctx = Context(
            plugin=self.plugin.name,
            run_seed=self.run_seed,
            args=self.plugin.args,
            deadline=deadline,
            samples=len(samples),
        )
        return samples, ctx

    def serve(self, sock: socket.socket) -> None:
        """A sync plugin: one call at a time; the parent ends the process at the deadline."""
        while (request := wire.receive(sock)) is not None:
            started = time.monotonic()
            try:
                if "golds" in request:
                    answer = self.golds(request["golds"])
                else:
                    samples, ctx = self.prepare(request)
                    answer = self.answer(self.plugin.run(samples, ctx), samples, ctx)
            except (Exception, SystemExit, KeyboardInterrupt) as error:  # noqa: BLE001  whatever user code raises is its answer
                answer = failed(error)
            sock.sendall(encode_answer(request, answer, started))

    async def serve_async(self, sock: socket.socket) -> None:
        """An async plugin: the parent bounds the calls in flight; each is cancelled at its own deadline."""
        reader, writer = await asyncio.open_connection(sock=sock)
        tasks: set[asyncio.Task[None]] = set()
        while True:
            try:
                header = await reader.readexactly(wire.HEADER.size)
                body = await reader.readexactly(wire.HEADER.unpack(header)[0])
            except asyncio.IncompleteReadError:
                break
            task = asyncio.create_task(self.one_async(wire.decode(body), writer))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
        for task in tasks:
            task.cancel()

    async def one_async(self, request: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        started = time.monotonic()
        try:
            answer = self.golds(request["golds"]) if "golds" in request else await self.scored_async(request)
        except Exception as error:  # noqa: BLE001  whatever user code raises is its answer
            answer = failed(error)
        writer.write(encode_answer(request, answer, started))
        await writer.drain()

    async def scored_async(self, request: dict[str, Any]) -> dict[str, Any]:
        samples, ctx = self.prepare(request)
        try:
            results = await asyncio.wait_for(self.run_async(samples, ctx), request["timeout_s"])
        except TimeoutError:
            if ctx.remaining() > 0:  # the plugin's own
                raise
            return {"error": ["timeout", f"not done after {request['timeout_s']:g} s"]}
        return self.answer(results, samples, ctx)

    async def run_async(self, samples: list[Sample], ctx: Context) -> Any:
        try:
            return await self.plugin.run(samples, ctx)
        except (SystemExit, KeyboardInterrupt) as error:  # out of a task these would end the loop
            raise RuntimeError(f"raised {type(error).__name__}: {error}") from error

    def golds(self, rows: Sequence[Any]) -> dict[str, Any]:
        found: list[tuple[str | None, str | None]] = []
        for row in rows:
            try:
                found.append((self.plugin.gold(row), None))
            except Exception as error:  # noqa: BLE001  whatever user code raises is its answer
                found.append((None, failed(error)["error"][1]))
        return {"golds": found}

    def answer(self, results: Any, samples: Sequence[Sample], ctx: Context) -> dict[str, Any]:
        try:
            verdict = judge(results, len(samples), self.plugin.objectives)
        except WrongLength as error:
            return {"error": ["wrong_length", str(error)]}
        return {
            "values": verdict.values,
            "errors": verdict.errors,
            "infos": list(verdict.infos.items()),
            "metrics": ctx.metrics,
            "columns": ctx.columns,
        }


def encode_answer(request: dict[str, Any], answer: dict[str, Any], started: float) -> bytes:
    head = {"id": request["id"], "seconds": time.monotonic() - started}
    try:
        frame = wire.encode({**head, **answer})
        if len(frame) <= wire.MAX_ANSWER:
            return frame
        why = f"{len(frame):,} bytes, more than {wire.MAX_ANSWER:,}"
    except (TypeError, ValueError, RecursionError) as error:  # info or columns that JSON cannot hold
        why = str(error)
    return wire.encode({**head, "error": ["wrong_type", f"info or columns cannot be kept: {why}"]})


def failed(error: BaseException) -> dict[str, Any]:
    """An exception as an answer: its type, message and the place in user code; the whole traceback goes to the log."""
    traceback.print_exception(error)
    frames = [f for f in traceback.extract_tb(error.__traceback__) if Path(f.filename).parent != Path(__file__).parent]
    place = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    return {"error": ["raised", f"{type(error).__name__}: {str(error)[:2000]}{place}"]}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--fd", type=int, required=True)
    parser.add_argument("--parent", type=int, required=True)
    options = parser.parse_args(argv)
    die_with_parent(options.parent)
    os.set_inheritable(options.fd, False)  # what the plugin starts does not hold our socket open
    sock = socket.socket(fileno=options.fd)
    start = wire.receive(sock)
    if start is None:
        return 0
    try:
        plugin = load(PluginSpec(**start["spec"]), start["folder"])
        plugin.prepare()
    except PluginError as error:
        traceback.print_exception(error)
        sock.sendall(wire.encode({"broken": {"what": error.what, "where": error.where, "remedy": error.remedy}}))
        return 0
    limit_memory(plugin.options.memory_mb or default_memory_mb() // plugin.options.processes)
    sock.sendall(wire.encode({"ready": plugin.describe()}))
    server = Server(plugin, start["seed"])
    if plugin.is_async:
        asyncio.run(server.serve_async(sock))
    else:
        server.serve(sock)
    sys.stdout.flush()
    os._exit(0)  # threads that the plugin left behind must not keep the process


if __name__ == "__main__":
    sys.exit(main())
