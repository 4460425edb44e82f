"""Tasks that run beside a block of code, and that neither outlive it nor fail unheard."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from types import TracebackType
from typing import Any, Self

from align.errors import LostError


class Background:
    """`async with Background() as background`: what `background.start` starts is cancelled at the block's end.

    A task that fails ends the block at once, wherever it waits, and its own error leaves the block: an
    `asyncio.TaskGroup` whose tasks serve the block, where that one's block waits for its tasks. So does one that ends
    as cancelled though nobody cancelled it: what it waited for was given up elsewhere, and the block may wait for it.
    """

    def __init__(self) -> None:
        self._group = asyncio.TaskGroup()
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self, task: Coroutine[Any, Any, None]) -> None:
        started = self._group.create_task(_to_its_end(task))
        self._tasks.add(started)
        started.add_done_callback(self._tasks.discard)

    async def __aenter__(self) -> Self:
        await self._group.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for task in list(self._tasks):
            task.cancel()
        first = None
        try:
            await self._group.__aexit__(kind, error, traceback)
        except BaseExceptionGroup as failed:
            first = failed.exceptions[0]  # the others were ended for it
        if first is not None and first is not error:
            raise first


async def _to_its_end(task: Coroutine[Any, Any, None]) -> None:
    try:
        await task
    except asyncio.CancelledError as error:
        own = asyncio.current_task()
        if own is None or own.cancelling():
            raise
        raise LostError(
            "a task of the stage was given up by what it waited for",
            remedy="--resume continues from the last checkpoint; logs/ has what the actors printed",
        ) from error
