"""However a background task ends, what waits for it ends too."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from typing import Any

import pytest

from align.data.media.pool import _Child
from align.errors import LostError
from align.protocols.fleet import Group
from align.protocols.scorer import ErrorBudget, ScoreTable
from align.stages.background import Background
from align.stages.scoring import ScoringQueue
from tests.unit.stages.plain import PlainFleet, prompt

BOUND = 20.0


def within(work: Any) -> Any:
    async def run() -> Any:
        return await asyncio.wait_for(work, BOUND)

    return asyncio.run(run())


async def given_up() -> None:
    """As an answer of an actor that Ray gives up."""
    gone: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    asyncio.get_running_loop().call_soon(gone.cancel)
    await gone


def test_a_block_does_not_wait_for_a_task_that_was_given_up_from_inside() -> None:
    async def block() -> None:
        async with Background() as background:
            background.start(given_up())
            await asyncio.Event().wait()

    with pytest.raises(LostError, match="given up by what it waited for"):
        within(block())


def test_a_task_that_the_blocks_end_cancels_is_no_error() -> None:
    async def block() -> str:
        async with Background() as background:
            background.start(asyncio.Event().wait())  # type: ignore[arg-type]
            await asyncio.sleep(0)
        return "done"

    assert within(block()) == "done"


def test_a_block_that_is_itself_cancelled_ends_as_cancelled() -> None:
    async def run() -> None:
        async def block() -> None:
            async with Background() as background:
                background.start(asyncio.Event().wait())  # type: ignore[arg-type]
                await asyncio.Event().wait()

        task = asyncio.create_task(block())
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    within(run())


@pytest.mark.parametrize("how", ["given up", "raised", "half a table"])
def test_whoever_waits_for_a_score_hears_of_the_call_that_gives_none(how: str) -> None:
    class Scorer:
        async def score(self, groups: list[Group], budget: ErrorBudget | None = None) -> ScoreTable:
            if how == "raised":
                raise RuntimeError("the actor's own")
            if how == "given up":
                await given_up()
            import numpy as np

            return ScoreTable(("a",), np.zeros((1, 1), np.float32), ("reward",))

        async def close(self) -> None: ...

    async def run() -> None:
        fleet = PlainFleet()
        fleet.version = 0
        scored = asyncio.Event()
        async with Background() as background:
            queue = ScoringQueue(Scorer(), background)  # type: ignore[arg-type]
            for number in range(2):
                group = fleet._group(prompt(number), 2)
                queue.add(group, ErrorBudget(0, 4), lambda *_: scored.set())
            await scored.wait()

    with pytest.raises((LostError, RuntimeError, AssertionError)):
        within(run())


MEDIA = {
    "garbage": ("print('a model that prints', flush=True); import time; time.sleep(60)", "cannot be read"),
    "a list": ("print('[1, 2]', flush=True)", "cannot be read"),
    "deep": ("print('[' * 100000 + ']' * 100000, flush=True)", "cannot be read"),
    "half": ("print('{\"facts\"', end='', flush=True)", "ended with status 0"),
    "closed": ("import os, time; os.close(1); time.sleep(60)", "stopped answering"),
    "nothing": ("import time; time.sleep(60)", "not processed within"),
}


@pytest.mark.parametrize("way", MEDIA)
def test_a_process_that_decodes_media_and_answers_something_else_ends_its_job(way: str) -> None:
    code, reason = MEDIA[way]
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    child = _Child({}, 2.0)
    child._process = process
    try:
        answer = child.ask({"name": "picture.png"}, [])
    finally:
        child.close()
    assert reason in answer["refused"] and answer["refused"].startswith("picture.png: ")
    assert process.poll() is not None
