"""A run whose cluster dies under it: told in words, with what Ray's C++ prints kept in a log.

Without its head Ray's libraries end the driver after a minute, from a thread of their own, with a line of C++. The head
is watched from here, and the run ends before that.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
from ray._private import worker

from align.errors import LostError

_LOOK_S = 2.0
_GONE_AFTER_S = 20.0  # of a head elsewhere that does not answer: Ray itself gives up after 60 s
_GRACE_S = 20.0  # for a run that has lost its head to end in order
_PARTS = ("gcs_server", "raylet")
LOG = "driver.log"


class HeadWatch:
    """Looks at the head until it is closed. on_gone: called once, from the thread that looks.

    A run that has not ended _GRACE_S later hangs in Ray's libraries: it is told why, and ended as by a kill.
    """

    def __init__(self, address: str | None):
        """address: host:port of a cluster that was joined; None for the one that this process started."""
        self.address = address
        self.gone: LostError | None = None
        self.on_gone: Callable[[LostError], object] | None = None
        self._parts = [] if address else [p for p in psutil.Process().children() if p.name() in _PARTS]
        self._silent_since: float | None = None
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="ray-head-watch", daemon=True)
        self._thread.start()

    def look(self) -> LostError | None:
        """Why the head is gone; None while it is there, or may be."""
        if self.gone is None:
            why = self._answers() if self.address else self._dead()
            if why is not None:
                self.gone = LostError(
                    f"Ray's head is gone: {why}",
                    remedy="--resume continues from the last checkpoint; out of memory is the usual cause, and "
                    f"logs/{LOG} has what Ray's libraries said",
                )
        return self.gone

    def close(self) -> None:
        self._closed.set()

    def _dead(self) -> str | None:
        for part in self._parts:
            with suppress(psutil.NoSuchProcess):
                if part.is_running() and part.status() != psutil.STATUS_ZOMBIE:
                    continue
            return f"its process {part.pid} ({_name(part)}) ended"
        return None

    def _answers(self) -> str | None:
        assert self.address is not None
        host, _, port = self.address.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=_LOOK_S).close()
        except OSError as error:
            now = time.monotonic()
            self._silent_since = self._silent_since or now
            if now - self._silent_since >= _GONE_AFTER_S:
                return f"nothing answers at {self.address} ({error.strerror or error})"
        else:
            self._silent_since = None
        return None

    def _watch(self) -> None:
        while not self._closed.wait(_LOOK_S):
            if self.look() is None:
                continue
            assert self.gone is not None
            if self.on_gone is not None:
                self.on_gone(self.gone)
            if not self._closed.wait(_GRACE_S):
                print(f"error: {self.gone}", file=sys.stderr, flush=True)
                os._exit(self.gone.exit_code)  # the reaper ends and sweeps what is left, as after a kill
            return


def _name(process: psutil.Process) -> str:
    return next((part for part in _PARTS if part in str(process)), "of Ray")


def _to_log(data: Mapping[str, Any], ignore_prefix: bool) -> None:
    """In place of Ray's printer: what its own processes tell the driver (a raylet's last lines) is for the log too."""
    os.write(2, "".join(f"({data.get('pid')}) {line}\n" for line in data["lines"]).encode(errors="backslashreplace"))


@contextmanager
def native_output(folder: Path) -> Iterator[None]:
    """What libraries write to the process' standard error goes to `folder/driver.log`; Python's own goes where it went.

    Where the log cannot be opened, everything goes where it went.
    """
    path = folder / LOG
    try:
        folder.mkdir(parents=True, exist_ok=True)
        log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | getattr(os, "O_NOFOLLOW", 0), 0o600)
    except OSError:
        yield
        return
    before, terminal = sys.stderr, os.dup(2)
    before.flush()
    sys.stderr = os.fdopen(os.dup(terminal), "w", buffering=1, encoding="utf-8", errors="backslashreplace")
    os.dup2(log, 2)
    os.close(log)
    said, worker.print_to_stdstream = worker.print_to_stdstream, _to_log
    try:
        yield
    finally:
        worker.print_to_stdstream = said
        sys.stderr.close()
        sys.stderr = before
        os.dup2(terminal, 2)
        os.close(terminal)
        with suppress(OSError):
            if not path.stat().st_size:
                path.unlink()
                folder.rmdir()  # where nothing else is in it
