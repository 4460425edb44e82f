"""Processes that are ours: told apart from a stranger with a reused number by the time they started."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

_CLOCK_S = 2.0  # start times are derived from the boot time, which clock adjustments move a little


@dataclass(frozen=True)
class ProcessId:
    """pid and start time (seconds since the epoch); `what` says what it does."""

    pid: int
    started: float
    what: str = ""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: Any) -> ProcessId:
        return cls(pid=int(value["pid"]), started=float(value["started"]), what=str(value.get("what", "")))


def this_process(what: str = "driver") -> ProcessId:
    return ProcessId(os.getpid(), psutil.Process().create_time(), what)


def describe(pid: int, what: str) -> ProcessId | None:
    """The identity of a running process, None where it is gone."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return ProcessId(pid, psutil.Process(pid).create_time(), what)
    return None


def is_alive(process: ProcessId) -> bool:
    """True while this very process runs; a zombie and a stranger with the same number do not count."""
    return _find(process) is not None


def _find(process: ProcessId) -> psutil.Process | None:
    try:
        found = psutil.Process(process.pid)
        same = abs(found.create_time() - process.started) <= _CLOCK_S
        return found if same and found.status() != psutil.STATUS_ZOMBIE else None
    except psutil.NoSuchProcess:
        return None


def descendants(what: str) -> list[ProcessId]:
    """Every living process below this one."""
    found = []
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if child.status() != psutil.STATUS_ZOMBIE:
                found.append(ProcessId(child.pid, child.create_time(), f"{what}: {child.name()}"))
    return found


def users(folder: Path) -> list[ProcessId]:
    """Processes of this user that have a file open below `folder`."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):  # ended meanwhile, or another user's
            if process.pid != os.getpid() and any(Path(f.path).is_relative_to(folder) for f in process.open_files()):
                found.append(ProcessId(process.pid, process.create_time(), process.name()))
    return found


def end(processes: Iterable[ProcessId], *, grace_s: float = 5.0) -> list[ProcessId]:
    """Terminate, then kill, those that still live; returns the ones that had to be ended."""
    living = [(process, found) for process in processes if (found := _find(process)) is not None]
    for _, found in living:
        with contextlib.suppress(psutil.NoSuchProcess):
            found.terminate()
    _, stubborn = psutil.wait_procs([found for _, found in living], timeout=grace_s)
    for found in stubborn:
        with contextlib.suppress(psutil.NoSuchProcess):
            found.kill()
    psutil.wait_procs(stubborn, timeout=grace_s)
    return [process for process, _ in living]
