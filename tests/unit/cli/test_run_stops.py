"""How a run ends that loses Ray's head: while it trains, and while it was asked to stop."""

from __future__ import annotations

import asyncio
import os

from align.cli.run import _gone
from align.errors import LostError


def test_a_head_that_goes_while_a_run_stops_is_not_blamed_on_memory() -> None:
    lost = LostError("Ray's head is gone: its process 7 (raylet) ended", remedy="out of memory is the usual cause")
    stop = asyncio.Event()
    assert _gone(lost, stop) is lost
    stop.set()
    said = str(_gone(lost, stop))
    assert "while the run was stopping: no new checkpoint was saved" in said and "memory" not in said
    assert f"send SIGTERM to the driver alone (here process {os.getpid()})" in said and "--resume" in said
