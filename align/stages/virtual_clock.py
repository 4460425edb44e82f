"""An asyncio event loop whose time is virtual: a sleep costs nothing, and the order of events is exact.

Whenever no callback is ready, the clock jumps to the next timer. What runs on it, unchanged, is the code of a real run:
whatever reads the time must ask the loop (`asyncio.get_running_loop().time()`), not the system. Two runs of the same
coroutine go through the same events in the same order.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class VirtualClockLoop(asyncio.SelectorEventLoop):
    """`time()` is in virtual seconds, from 0. What is given to an executor (`asyncio.to_thread`) is done at once, in
    this thread: beside a clock that jumps, a thread would take any time at all."""

    def __init__(self) -> None:
        self._virtual = 0.0
        super().__init__(_Jumping(self._advance))

    def time(self) -> float:
        return self._virtual

    def run_in_executor(self, executor: Any, func: Callable[..., T], *args: Any) -> asyncio.Future[T]:  # type: ignore[override]
        done: asyncio.Future[T] = self.create_future()
        try:
            done.set_result(func(*args))
        except Exception as error:  # noqa: BLE001  # whoever awaits it gets it
            done.set_exception(error)
        return done

    def _advance(self, seconds: float) -> None:
        self._virtual += seconds


class _Jumping(selectors.DefaultSelector):
    """A selector that does not wait for a timer: it tells the clock to jump there."""

    def __init__(self, advance: Callable[[float], None]):
        super().__init__()
        self._advance = advance

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None or timeout <= 0:  # no timer to wait for, or work to do
            return super().select(timeout)
        events: list[tuple[selectors.SelectorKey, int]] = super().select(0)
        if not events:
            self._advance(timeout)
        return events


def run_virtually(main: Coroutine[Any, Any, T]) -> T:
    """`asyncio.run` on a virtual clock."""
    with asyncio.Runner(loop_factory=VirtualClockLoop) as runner:
        return runner.run(main)
