"""A fleet whose keeping ends, in any way: who waits for its groups, its start or its versions hears of it.

Members here are no actors: what Ray does when its own processes die under it cannot be had twice alike.
"""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest
from ray.exceptions import RaySystemError

from align.errors import AlignError, EngineError
from align.protocols.fleet import PromptItem, Sampling
from align.protocols.trainer import Publication
from rollout import fleet as module
from rollout.base import EngineSpec
from rollout.fleet import RayFleet
from rollout.member import Limits, Member
from rollout.stepping import Report

VERSION = Publication(3, "adapter", "somewhere", "the digest")


class Kept(Member):
    """An engine that starts, loads, and then reports nothing, until `fate` decides."""

    fate: Any = None

    def launch(self) -> None:
        self._reports: asyncio.Queue[Report] = asyncio.Queue()

    async def started(self) -> None:
        self.up, self.starts = True, 1

    def give(self, command: Any) -> None:
        if isinstance(command, Publication):
            self._reports.put_nowait(Report(published=((command.version, "the digest"),)))

    async def poll(self) -> Report:
        if self._reports.empty():
            await asyncio.sleep(0.01)
            if Kept.fate is not None:
                await Kept.fate()
            return Report()
        return self._reports.get_nowait()

    def end(self, *, hung: bool = False) -> None:
        self.up = False
        raise RaySystemError("Ray is gone")


async def given_up() -> None:
    gone: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    gone.cancel()
    await gone


async def broken() -> None:
    raise KeyError("what nobody foresaw")


@pytest.mark.parametrize(("fate", "says"), [(given_up, "its task was given up"), (broken, "what nobody foresaw")])
@pytest.mark.parametrize("waits", ["for a group", "for a version"])
def test_whoever_waits_hears_of_it(monkeypatch: pytest.MonkeyPatch, fate: Any, says: str, waits: str) -> None:
    async def run() -> None:
        fleet = RayFleet(EngineSpec("transformers", ""), 2, limits=Limits(close=0.1))
        await fleet.publish(VERSION)
        if waits == "for a group":
            prompts = [PromptItem(n, np.arange(4), seed=n) for n in range(3)]
            work = asyncio.create_task(fleet.generate(prompts, 2, Sampling(max_tokens=3)))
            while not fleet._queues:
                await asyncio.sleep(0.01)
            Kept.fate = staticmethod(fate)
        else:
            Kept.fate = staticmethod(fate)
            while fleet._error is None:
                await asyncio.sleep(0.01)
            work = asyncio.create_task(fleet.publish(Publication(4, "adapter", "somewhere", "the digest")))
        with pytest.raises(EngineError, match=says):
            await asyncio.wait_for(work, 20)
        with pytest.raises(AlignError, match=says):
            await fleet.ready()

    monkeypatch.setattr(module, "Member", Kept)
    monkeypatch.setattr(Kept, "fate", None)
    asyncio.run(run())
