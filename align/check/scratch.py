"""A folder for what a verb puts aside: it goes when the verb ends, also by Ctrl-C or SIGTERM, and where the verb is
killed, with the next one."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from align.stages.owned import owned_folder, sweep


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """An empty folder. Within the block it is the temporary folder of this process and of those that it starts."""
    sweep()
    before = os.environ.get("TMPDIR"), tempfile.tempdir
    with _ended_by_signals():
        folder = owned_folder(Path(tempfile.gettempdir()))
        try:
            work = folder / "work"
            work.mkdir()
            os.environ["TMPDIR"] = tempfile.tempdir = str(work)
            yield work
        finally:
            tempfile.tempdir = before[1]
            if before[0] is None:
                os.environ.pop("TMPDIR", None)
            else:
                os.environ["TMPDIR"] = before[0]
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """SIGTERM and a terminal that goes end the block as Ctrl-C does: through every clean-up."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, _interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
