"""The keeper of one episode: forks it, passes on what it prints, waits for it, and ends all that it started.

It runs no code of the user's. It ends the episode where its client (the parent) closes the control socket, and where
the zygote ends. Its own end, by whatever the episode does to it, is the episode's; orphans go to the zygote then.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import socket
import tempfile
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rewards.environments import family
from rewards.process import die_with_parent, limit_memory

LOG_BYTES = 1 << 20
"""Of what one episode prints; the rest is dropped, and the log says so."""
_TAIL = 400
_ORPHANS_MS = 5000
FAILED = 70
"""Exit status of an episode that cannot go on: its connection was closed under it."""


class _Output:
    """What an episode prints, at most LOG_BYTES of it, and the last of it in any case."""

    def __init__(self) -> None:
        self.tail = b""
        self._written = 0

    def take(self, descriptor: int) -> bool:
        """Reads what is there; False at the end."""
        data = os.read(descriptor, 1 << 16)
        self.tail = (self.tail + data)[-_TAIL:]
        kept = data[: max(0, LOG_BYTES - self._written)]
        if kept:
            os.write(1, kept)
        if self._written <= LOG_BYTES < self._written + len(data):
            os.write(1, f"\n(an episode printed more than {LOG_BYTES:,} bytes; the rest is dropped)\n".encode())
        self._written += len(data)
        return bool(data)


def keep(
    request: Mapping[str, Any],
    control: socket.socket,
    talk: int,
    zygote: int,
    host: int,
    memory_mb: int,
    serve: Callable[[int], None],
) -> None:
    """The keeper's life; does not return.

    request: {"folder": the episode's own}. talk: the episode's connection. zygote, host: pidfds.
    serve: the episode's life, on its connection.
    """
    try:
        os.setsid()
        family.adopt_orphans()
        folder = Path(request["folder"])
        folder.mkdir()
        reading, writing = os.pipe()
        own = os.getpid()
        child = os.fork()
        if child == 0:
            control.close()
            for descriptor in (reading, zygote, host):
                os.close(descriptor)
            _become(own, folder, writing, memory_mb, lambda: serve(talk))
        os.close(talk)
        os.close(writing)
        said = _watch(child, control, reading, zygote)
        shutil.rmtree(folder, ignore_errors=True)
        if select.select([host], [], [], 0)[0]:  # it has ended, and nobody else tidies up
            shutil.rmtree(folder.parent, ignore_errors=True)
        control.send(json.dumps(said).encode())
    except OSError as error:
        _refuse(control, error)
    finally:
        os._exit(0)


def _refuse(control: socket.socket, error: OSError) -> None:
    try:
        control.send(json.dumps({"refused": str(error)}).encode())
    except OSError:  # the client is gone
        return


def _watch(child: int, control: socket.socket, reading: int, zygote: int) -> dict[str, Any]:
    """How the episode ended, when nothing of it is left. status: its exit status, negative for a signal; None: we
    ended it. tail: the last that it printed."""
    handle = os.pidfd_open(child)
    output = _Output()
    poll = select.poll()
    for descriptor in (handle, control.fileno(), zygote, reading):
        poll.register(descriptor, select.POLLIN)
    status: int | None = None
    while True:
        ready = {descriptor for descriptor, _ in poll.poll(_ORPHANS_MS)}
        if not ready:
            family.bury_orphans(child)
        if reading in ready and not output.take(reading):
            poll.unregister(reading)
        if handle in ready:
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            break
        if ready & {control.fileno(), zygote}:
            break
    family.end_all()
    while select.select([reading], [], [], 0)[0] and output.take(reading):
        continue
    return {"status": status, "tail": output.tail.decode(errors="replace").strip()}


def _become(keeper: int, folder: Path, output: int, memory_mb: int, serve: Callable[[], None]) -> None:
    """The episode's process; does not return."""
    try:
        die_with_parent(keeper)
        os.setsid()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.close(output)
        os.environ["TMPDIR"] = tempfile.tempdir = str(folder)
        limit_memory(memory_mb + _data_mb())
        serve()
    except BrokenPipeError:  # the parent has closed
        os._exit(0)
    except BaseException:  # noqa: BLE001  also of our own: said in the log, and by the status
        with contextlib.suppress(BaseException):  # its stderr may be closed
            traceback.print_exc()
        os._exit(FAILED)
    os._exit(0)


def _data_mb() -> int:
    """Data memory that importing took, on top of which the episode's limit counts."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmData")) // 1024
