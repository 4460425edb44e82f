"""Processes and their descendants: who adopts orphans, who is left, and how all of them are ended. Linux."""

from __future__ import annotations

import ctypes
import os
import signal
import time
from pathlib import Path

_PR_SET_CHILD_SUBREAPER = 36


def adopt_orphans() -> None:
    """From now on what a descendant leaves behind becomes this process's child, whatever session it moved to."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER) failed")


def children(process: int) -> set[int]:
    """Ids of a process's children, those that have ended and were not waited for included."""
    try:
        tasks = Path(f"/proc/{process}/task")
        return {int(pid) for task in tasks.iterdir() for pid in (task / "children").read_text().split()}
    except FileNotFoundError:  # a kernel that keeps no such list, or the process is gone
        return {pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if _parent(pid) == process}


def _parent(pid: int) -> int | None:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, IndexError):
        return None


def end_all() -> None:
    """Kill this process's children, and theirs as they become ours, until there is none. For one that adopts orphans
    and has no child that it wants to keep."""
    own = os.getpid()
    while True:
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        for pid in children(own):
            kill(pid)
        time.sleep(0.0005)


def bury_orphans(but: int) -> None:
    """Wait for adopted children that have ended; `but` is waited for elsewhere."""
    for pid in children(os.getpid()) - {but}:
        os.waitpid(pid, os.WNOHANG)


def kill(pid: int) -> None:
    """SIGKILL for one process; nothing where it is gone."""
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return
