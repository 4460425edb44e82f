"""The process that sandboxed processes are forked from: one interpreter with its library loaded, forked in
milliseconds.

It never sees a solution, a test or a verdict: those travel on connections that it passes on unread. So every process
that it forks starts from the same memory, and nothing of one solution is there for the next to find.

For each request it forks a keeper. The keeper makes the namespaces, forks the process to be contained into them, waits
for it, ends it when its time is over or its client goes away, and says how it ended. Parent-death signals tie each to
the one above: the client's end is everybody's. The contained process is the first of its pid namespace; the kernel
ends all others of the namespace with it.
"""

from __future__ import annotations

import fcntl
import gc
import importlib
import json
import os
import random
import select
import signal
import socket
import sys
import time
from collections.abc import Mapping
from typing import Any

from rewards.sandbox import jail, kernel
from rewards.sandbox.roles import ROLES

# What solutions import most: loaded once, shared by all.
PRELOADED = (
    "abc", "array", "bisect", "calendar", "cmath", "collections", "copy", "csv", "dataclasses", "datetime",
    "decimal", "difflib", "enum", "fractions", "functools", "hashlib", "heapq", "inspect", "io", "itertools",
    "json", "math", "numbers", "operator", "pprint", "queue", "random", "re", "secrets", "site", "statistics",
    "string", "struct", "textwrap", "threading", "time", "types", "typing", "unicodedata", "unittest", "uuid",
    "zlib",
)  # fmt: skip
_ABOVE = 32  # descriptors below are for the contained process


def serve(requests: socket.socket, parent: int) -> None:
    """Fork a keeper for each request until the client closes: JSON {role, limits, places, outside} with the
    descriptors [keeper's own connection, then one for each of `places`, the numbers that they get]."""
    for name in PRELOADED:
        importlib.import_module(name)
    sys.modules["site"].setquit()  # exit() and quit(), which -S leaves out
    try:
        jail.prepare_root()
    except OSError as error:
        _refuse_all(requests, f"namespaces: {error}")
    kernel.die_with(parent)
    jail.note_address_space()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # keepers tell their client, not us
    gc.collect()
    gc.freeze()
    own = os.pidfd_open(os.getpid())
    while True:
        text, descriptors, _, _ = socket.recv_fds(requests, 1 << 16, 8)
        if not text:
            return
        if os.fork() == 0:
            requests.close()
            _keep(json.loads(text), descriptors, own)
        for descriptor in descriptors:
            os.close(descriptor)


def _keep(request: dict[str, Any], descriptors: list[int], parent: int) -> None:
    """The keeper's life; does not return."""
    try:
        kernel.die_with(parent)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        client = socket.socket(fileno=descriptors[0])
        limits = jail.Limits(**request["limits"])
        outside = request["outside"]
        if outside:
            open(outside["proc"]).close()  # the trial means something
        try:
            own = os.pidfd_open(os.getpid())
            jail.enter_namespaces(limits)
            kernel.die_with(parent)
            child = os.fork()
            if child == 0:
                _contained(request, limits, client, descriptors[1:], own)
        except OSError as error:
            client.send(json.dumps({"refused": f"namespaces: {error}"}).encode())
            os._exit(1)
        for descriptor in descriptors[1:]:
            os.close(descriptor)
        client.send(json.dumps(_watch(child, client, limits.wall_s)).encode())
    except OSError:  # the client is gone
        pass
    finally:
        os._exit(0)


def _watch(child: int, client: socket.socket, seconds: float) -> dict[str, Any]:
    """How the child ended. status: exit status, negative for a signal; timeout: we ended it at its time."""
    started = time.monotonic()
    handle = os.pidfd_open(child)
    poll = select.poll()
    poll.register(handle, select.POLLIN)
    poll.register(client, select.POLLIN | select.POLLHUP)
    events = poll.poll(seconds * 1000)
    if handle not in (descriptor for descriptor, _ in events):
        os.kill(child, signal.SIGKILL)
    _, status, usage = os.wait4(child, 0)
    return {
        "status": os.waitstatus_to_exitcode(status),
        "timeout": not events,
        "cpu_s": usage.ru_utime + usage.ru_stime,
        "wall_s": time.monotonic() - started,
    }


def _contained(
    request: Mapping[str, Any], limits: jail.Limits, client: socket.socket, passed: list[int], keeper: int
) -> None:
    """Enter the inner layers and become the role; does not return."""
    layer = "namespaces"
    try:
        outside = request["outside"]
        if outside:
            jail.try_namespaces(outside)
        kernel.die_with(keeper)
        os.environ.clear()
        os.environ.update(HOME=jail.FOLDER, TMPDIR=jail.FOLDER, LANG="C.UTF-8")
        random.seed(0)
        for step in jail.INNER:
            layer = step.name
            step.enter(limits)
            if outside:
                step.trial(outside)
        if outside:
            layer = "the interpreter's library"
            importlib.import_module("colorsys")  # which nobody has loaded
            client.send(b'{"contained": true}')
            os._exit(0)
        _settle_descriptors(passed, request["places"])
        client.detach()  # closed, and its number may be the solution's soon
    except BaseException as error:  # noqa: BLE001  also MemoryError; whatever it is, nothing of the client's runs
        client.send(json.dumps({"refused": f"{layer}: {type(error).__name__}: {error}"}).encode())
        os._exit(1)
    try:
        ROLES[request["role"]](*(p for p in request["places"] if p > 2))
    finally:
        os._exit(1)


def _settle_descriptors(passed: list[int], places: list[int]) -> None:
    """Exactly 0, 1, 2 and `places`, which follow on 2 without a gap, are open afterwards."""
    high = [fcntl.fcntl(d, fcntl.F_DUPFD, _ABOVE) for d in passed]
    for source, place in zip(high, places, strict=True):
        os.dup2(source, place)
    os.closerange(max([2, *places]) + 1, 1 << 12)


def _refuse_all(requests: socket.socket, why: str) -> None:
    """Say why to the first who asks, and end."""
    _, descriptors, _, _ = socket.recv_fds(requests, 1 << 16, 8)
    if descriptors:
        socket.socket(fileno=descriptors[0]).send(json.dumps({"refused": why}).encode())
    os._exit(1)


def main(descriptor: int, parent: int) -> None:
    """parent: its process id."""
    handle = os.pidfd_open(parent)
    kernel.die_with(handle)
    if os.getppid() == parent:
        serve(socket.socket(fileno=descriptor), handle)
