"""Processes that are ours: told apart from a stranger with a reused number by the time they started, and from one on
another machine, in another container or before a restart of this machine by where they run."""

from __future__ import annotations

import contextlib
import math
import os
import socket
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

BOOT, NAMESPACE = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
_CLOCK_S = 2.0  # start times are derived from the boot time, which clock adjustments move a little


def here() -> str:
    """Which set of process numbers this process lives in: this boot of this kernel, and its container.

    Numbers from another set mean nothing here, however the file that names them came to this machine.
    """
    boot = BOOT.read_text(encoding="utf-8").strip() if BOOT.is_file() else socket.gethostname()
    return f"{boot}/{os.readlink(NAMESPACE) if NAMESPACE.exists() else ''}"


@dataclass(frozen=True)
class ProcessId:
    """pid and start time (seconds since the epoch); `what` says what it does; `where`: see `here`, empty where an older
    version wrote it down."""

    pid: int
    started: float
    what: str = ""
    where: str = ""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: Any) -> ProcessId:
        """Raises ValueError where it is no process."""
        try:
            pid, started = int(value["pid"]), float(value["started"])
            what, where = str(value.get("what", "")), str(value.get("where", ""))
        except (KeyError, TypeError, AttributeError, OverflowError, ValueError) as error:
            raise ValueError(f"this is no process: {str(value)[:80]}") from error
        if pid <= 0 or not math.isfinite(started):  # 0 and below name groups of processes
            raise ValueError(f"this is no process: {str(value)[:80]}")
        return cls(pid, started, what, where)


def this_process(what: str = "driver") -> ProcessId:
    return ProcessId(os.getpid(), psutil.Process().create_time(), what, here())


def describe(pid: int, what: str) -> ProcessId | None:
    """The identity of a running process, None where it is gone."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return ProcessId(pid, psutil.Process(pid).create_time(), what, here())
    return None


def is_here(process: ProcessId) -> bool:
    """Whether its number can be looked up: it is of this machine, boot and container, or nothing says otherwise."""
    return process.where in ("", here())


def is_alive(process: ProcessId) -> bool:
    """True while this very process runs here; a zombie and a stranger with the same number do not count, and neither
    does one of another machine (`is_here`)."""
    return _find(process) is not None


def _find(process: ProcessId) -> psutil.Process | None:
    if not is_here(process):
        return None
    try:
        found = psutil.Process(process.pid)
        same = abs(found.create_time() - process.started) <= _CLOCK_S
        return found if same and found.status() != psutil.STATUS_ZOMBIE else None
    except (psutil.NoSuchProcess, psutil.AccessDenied, OverflowError, ValueError):  # a number that no process can have
        return None


def descendants(what: str) -> list[ProcessId]:
    """Every living process below this one."""
    found = []
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if child.status() != psutil.STATUS_ZOMBIE:
                found.append(ProcessId(child.pid, child.create_time(), f"{what}: {child.name()}", here()))
    return found


def users(folder: Path) -> list[ProcessId]:
    """Processes of this user that have a file open below `folder`."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):  # ended meanwhile, or another user's
            if process.pid != os.getpid() and any(Path(f.path).is_relative_to(folder) for f in process.open_files()):
                found.append(ProcessId(process.pid, process.create_time(), process.name(), here()))
    return found


def end(processes: Iterable[ProcessId], *, grace_s: float = 5.0) -> list[ProcessId]:
    """Terminate, then kill, those that still live; returns the ones that had to be ended."""
    living = [(process, found) for process in processes if (found := _find(process)) is not None]
    for _, found in living:
        with contextlib.suppress(psutil.Error):  # ended meanwhile, or another user's
            found.terminate()
    _, stubborn = psutil.wait_procs([found for _, found in living], timeout=grace_s)
    for found in stubborn:
        with contextlib.suppress(psutil.Error):
            found.kill()
    psutil.wait_procs(stubborn, timeout=grace_s)
    return [process for process, _ in living]
