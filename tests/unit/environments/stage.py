"""A file of the user's, and the host that plays it: what the tests of environments share."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

from rewards.environments.host import Host
from rewards.environments.live import Live
from rewards.environments.spec import EnvironmentSpec

BOUND = 60.0  # seconds, on a busy machine: far less than for ever
T = TypeVar("T")

GUESS = '''
from rewards import environment

@environment
class GuessNumber:
    """A number to be found."""

    def __init__(self, low: int = 0):
        self.low = low

    def reset(self, row, seed):
        self.secret, self.right = row["secret"], False
        return f"It is at least {self.low}."

    def guess(self, number: int) -> str:
        """Guess the number.

        Args:
            number: your guess
        """
        self.right = number == self.secret
        return "right" if self.right else "higher" if number < self.secret else "lower"

    @property
    def done(self):
        return self.right

    def reward(self):
        return float(self.right)

    def state(self):
        return {"secret": self.secret}
'''


def write(folder: Path, text: str, name: str = "env.py") -> Path:
    (folder / name).write_text(text)
    return folder


@asynccontextmanager
async def hosted(folder: Path, use: str = "env.py:Env", **options: Any) -> AsyncIterator[Host]:
    """A started host, closed afterwards. options: of EnvironmentSpec and of Host."""
    parts = ("args", "signature", "python", "name")
    spec = EnvironmentSpec(use, **{k: options.pop(k) for k in parts if k in options})
    host = Host(spec, folder, 0, **{"grace_s": 1.0, **options})
    try:
        await host.start()
        yield host
    finally:
        host.close()


async def begun(host: Host, row: dict[str, Any] | None = None, seed: int = 0) -> Live:
    """A live episode after its reset."""
    live = await host.open()
    outcome = await live.reset(row or {}, seed, seed, 10.0)
    assert outcome.kind == "value", outcome
    return live


def within(work: Callable[[], Awaitable[T]], bound: float = BOUND) -> T:
    """What an asynchronous function gives; fails where it takes longer than `bound` seconds."""

    async def run() -> T:
        return await asyncio.wait_for(work(), bound)

    return asyncio.run(run())
