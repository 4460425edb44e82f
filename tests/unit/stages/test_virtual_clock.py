"""Time that costs nothing, and tasks that end with their block."""

from __future__ import annotations

import asyncio
import time

import pytest

from align.errors import DataError, EngineError
from align.stages.background import Background
from align.stages.virtual_clock import run_virtually


def test_a_day_of_sleep_takes_no_time_and_events_keep_their_order() -> None:
    async def main() -> tuple[list[str], float]:
        seen: list[str] = []

        async def one(name: str, seconds: float) -> None:
            await asyncio.sleep(seconds)
            seen.append(name)

        await asyncio.gather(one("day", 86400.0), one("second", 1.0), one("hour", 3600.0))
        return seen, asyncio.get_running_loop().time()

    begun = time.monotonic()
    seen, now = run_virtually(main())
    assert seen == ["second", "hour", "day"] and now == pytest.approx(86400.0)
    assert time.monotonic() - begun < 60


def test_work_in_a_thread_takes_no_virtual_time_while_others_sleep() -> None:
    async def main() -> float:
        sleeping = asyncio.ensure_future(asyncio.sleep(5.0))
        await asyncio.to_thread(time.sleep, 0.01)
        now = asyncio.get_running_loop().time()
        with pytest.raises(ZeroDivisionError):
            await asyncio.to_thread(divmod, 1, 0)
        await sleeping
        return now

    assert run_virtually(main()) == 0.0


def test_a_time_out_is_counted_in_virtual_seconds() -> None:
    async def main() -> float:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.Event().wait(), 100.0)
        return asyncio.get_running_loop().time()

    assert run_virtually(main()) == pytest.approx(100.0)


async def fails(after: float, error: Exception) -> None:
    await asyncio.sleep(after)
    raise error


def test_a_task_that_fails_ends_the_block_at_once_with_its_own_error() -> None:
    async def main() -> float:
        cause = ValueError("a socket")
        error = EngineError("no engine")
        error.__cause__ = cause
        with pytest.raises(EngineError, match="no engine") as caught:
            async with Background() as background:
                background.start(fails(2.0, error))
                background.start(fails(3.0, DataError("too late")))
                await asyncio.sleep(1000.0)
        assert caught.value.__cause__ is cause, "--debug shows it"
        return asyncio.get_running_loop().time()

    assert run_virtually(main()) == 2.0


def test_an_error_of_the_block_passes_through_and_its_tasks_end() -> None:
    async def main() -> None:
        ended: list[str] = []

        async def task() -> None:
            try:
                await asyncio.sleep(1000.0)
            finally:
                ended.append("task")

        with pytest.raises(DataError, match="of the block"):
            async with Background() as background:
                background.start(task())
                await asyncio.sleep(1.0)
                raise DataError("of the block")
        async with Background() as background:
            background.start(task())
            await asyncio.sleep(1.0)
        assert ended == ["task", "task"]

    run_virtually(main())
