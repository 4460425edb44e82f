"""A small process that outlives a killed driver by a moment: it ends what the driver left and sweeps its folders.

Ray's workers die with their raylet and that with the driver, at once. Its two agents would look for the dead cluster
for another minute, and sockets and the memory file system would keep their folders until the next start.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType

from align.errors import AlignError
from align.stages.owned import sweep
from align.stages.processes import ProcessId, end, is_alive
from align.stages.state import read_state

_GRACE_S = 2.0
_DRIVER_ENDS_S = 30.0


class Reaper:
    """Around a run: it watches this process, and does nothing where the run ends in order."""

    def __init__(self, run_file: Path):
        """run_file: the run.json whose processes are to be ended."""
        # a session of its own: Ctrl-C at the terminal is for the driver; -P: no folder of the user's on sys.path
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", __name__, str(run_file)], stdin=subprocess.PIPE, start_new_session=True
        )

    def __enter__(self) -> Reaper:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(b"done\n")
        self._process.stdin.close()
        self._process.wait()


def main(run_file: Path) -> None:
    if sys.stdin.readline():
        return  # the run ended in order; no line means that the driver is gone
    listed = _listed(run_file)
    deadline = time.monotonic() + _DRIVER_ENDS_S
    while any(process.what == "driver" and is_alive(process) for process in listed):
        if time.monotonic() > deadline:
            return  # it closed the pipe and works on: nothing here is ours to end
        time.sleep(0.02)  # the kernel closes a dying process's files before it counts as dead
    end((process for process in listed if process.pid != os.getpid()), grace_s=_GRACE_S)
    sweep(run_file.parent)  # what was started since the list was written is found by the files it has open


def _listed(run_file: Path) -> list[ProcessId]:
    """Those that run.json names; none where it is gone or damaged, which the next start says."""
    try:
        return [ProcessId.from_json(entry) for entry in read_state(run_file)["processes"]]
    except (AlignError, OSError):
        return []


if __name__ == "__main__":
    main(Path(sys.argv[1]))
