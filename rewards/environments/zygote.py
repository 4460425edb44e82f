"""The warm process that episodes are forked from: it imports the user's module once, and runs none of it afterwards.

`main` is started by `rewards.environments.host`. Each request forks a keeper, which is given the request's descriptors.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import random
import select
import signal
import socket
import sys
import time
import traceback
from collections.abc import Mapping
from typing import Any

from rewards import wire
from rewards.api import PluginError
from rewards.environments import family, keeper
from rewards.environments.episode import Episode
from rewards.environments.spec import EnvironmentSpec, Loaded, load
from rewards.process import default_memory_mb, die_with_parent

_LAST_KEEPER_S = 10.0


class Zygote:
    """Forks keepers, and buries them."""

    def __init__(self, loaded: Loaded, requests: socket.socket, start: Mapping[str, Any], host: int):
        self._loaded = loaded
        self._requests = requests
        self._start = start
        self._memory_mb: int = start["memory_mb"] or default_memory_mb()
        self._keepers: set[int] = set()
        self._before = family.children(os.getpid())  # what importing started
        self._own, self._host = os.pidfd_open(os.getpid()), host
        self._woken, self._wake = socket.socketpair()

    def serve(self) -> None:
        """Until the parent closes, and the last keeper has ended."""
        self._wake.setblocking(False)
        self._woken.setblocking(False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(self._wake.fileno(), warn_on_full_buffer=False)
        gc.collect()
        gc.freeze()
        while True:
            ready, _, _ = select.select([self._requests, self._woken], [], [])
            if self._woken in ready:
                self._bury()
            if self._requests in ready:
                text, descriptors, _, _ = socket.recv_fds(self._requests, 1 << 16, 2)
                if not text:
                    break
                self._fork(json.loads(text), descriptors)
        deadline = time.monotonic() + _LAST_KEEPER_S
        while self._keepers and time.monotonic() < deadline:
            select.select([self._woken], [], [], 0.1)
            self._bury()
        family.end_all()  # also what importing started

    def _fork(self, request: Mapping[str, Any], descriptors: list[int]) -> None:
        control, talk = descriptors
        try:
            pid = os.fork()
        except OSError as error:
            with socket.socket(fileno=control) as client:
                client.send(json.dumps({"refused": f"fork: {error}"}).encode())
            os.close(talk)
            return
        if pid == 0:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            gc.disable()
            for sock in (self._requests, self._woken, self._wake):
                sock.close()
            for descriptor in descriptors:
                os.set_inheritable(descriptor, False)
            keeper.keep(
                request, socket.socket(fileno=control), talk, self._own, self._host, self._memory_mb, self._live
            )
        self._keepers.add(pid)
        for descriptor in descriptors:
            os.close(descriptor)

    def _live(self, talk: int) -> None:
        """In the episode's process."""
        gc.enable()
        Episode(self._loaded, socket.socket(fileno=talk), self._start["max_answer_bytes"]).serve()

    def _bury(self) -> None:
        """Wait for keepers that have ended; what one left that an episode killed is ended here."""
        with contextlib.suppress(BlockingIOError):
            self._woken.recv(1 << 16)
        for pid in list(self._keepers):
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                self._keepers.discard(pid)
                if status != 0:
                    self._end_orphans()

    def _end_orphans(self) -> None:
        while orphans := family.children(os.getpid()) - self._keepers - self._before:
            for pid in orphans:
                family.kill(pid)
                os.waitpid(pid, 0)


def main(link_fd: int, requests_fd: int, parent: int) -> int:
    """link_fd: a stream for the start message and its answer. requests_fd: packets, each with two descriptors.
    parent: its process id."""
    host = os.pidfd_open(parent)
    die_with_parent(parent)
    family.adopt_orphans()
    for descriptor in (link_fd, requests_fd):
        os.set_inheritable(descriptor, False)
    with socket.socket(fileno=link_fd) as link:
        if (start := wire.receive(link)) is None:
            return 0
        random.seed(start["seed"])
        try:
            loaded = load(EnvironmentSpec(**start["spec"]), start["folder"])
        except PluginError as error:
            traceback.print_exception(error)
            link.sendall(wire.encode({"broken": {"what": error.what, "where": error.where, "remedy": error.remedy}}))
            return 0
        link.sendall(wire.encode({"ready": loaded.describe()}))
    Zygote(loaded, socket.socket(fileno=requests_fd), start, host).serve()
    sys.stdout.flush()
    os._exit(0)  # threads that importing left must not keep the process
