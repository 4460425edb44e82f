"""A process that loads ahead is the one that is used, once, and only for what it was made for."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import time
from collections.abc import Callable
from typing import Any

import psutil
import pytest

from align.actors.spare import Spare
from align.packages import quick_imports
from align.protocols.fleet import PromptItem, Sampling
from align.protocols.trainer import Publication
from rollout.base import EngineSpec
from rollout.fleet import RayFleet
from rollout.member import Limits
from rollout.worker import engine_actor

STUB = "tests.unit.rollout.stub_engine:StubEngine"


class Echo:
    def pid(self) -> int:
        return os.getpid()


@pytest.fixture
def make(ray_cluster: Any) -> Callable[[], Any]:
    return lambda: ray_cluster.remote(Echo).options(num_cpus=0).remote()


def gone(pid: int, within_s: float = 20.0) -> bool:
    deadline = time.monotonic() + within_s
    try:
        while psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.05)
    except psutil.NoSuchProcess:
        pass
    return True


def test_it_is_made_once_taken_once_and_only_by_its_kind(ray_cluster: Any, make: Callable[[], Any]) -> None:
    spare = Spare()
    spare.expect({"threads": 2}, make)
    pid = ray_cluster.get(spare.actor.pid.remote())
    spare.expect({"threads": 2}, lambda: pytest.fail("there is one already"))
    assert spare.take({"threads": 1}) is None
    taken = spare.take({"threads": 2})
    assert ray_cluster.get(taken.pid.remote()) == pid
    assert spare.take({"threads": 2}) is None and spare.actor is None
    spare.close()
    assert ray_cluster.get(taken.pid.remote()) == pid, "what was taken is its taker's to close"
    ray_cluster.kill(taken)
    assert gone(pid)


def test_what_is_expected_next_takes_the_place_of_what_nobody_took(ray_cluster: Any, make: Callable[[], Any]) -> None:
    spare = Spare()
    spare.expect("first", make)
    first = ray_cluster.get(spare.actor.pid.remote())
    spare.expect("second", make)
    second = ray_cluster.get(spare.actor.pid.remote())
    assert gone(first) and second != first
    spare.close()
    assert gone(second)


def test_what_comes_back_is_the_next_ones_and_nobody_is_made_meanwhile(
    ray_cluster: Any, make: Callable[[], Any]
) -> None:
    spare = Spare()
    spare.expect("kind", make)
    taken = spare.take("kind", back=True)
    spare.expect("kind", lambda: pytest.fail("one comes back"))
    assert spare.actor is None and spare.take("kind") is None
    spare.put(taken)
    assert spare.take("kind", back=True) is taken
    spare.put(None)  # this one ended
    spare.expect("kind", make)
    other = spare.take("kind", back=True)
    assert other is not None and other is not taken
    spare.expect("another kind", make)
    pid = ray_cluster.get(other.pid.remote())
    spare.put(other)
    assert gone(pid), "another kind is wanted now"
    ray_cluster.kill(taken)
    spare.close()


def test_an_engine_starts_in_the_process_that_was_made_for_it_and_anew_when_that_is_lost(ray_cluster: Any) -> None:
    ready = engine_actor(3, False, num_cpus=0)
    ray_cluster.get(ready.load.remote(STUB))
    home = ray_cluster.get(ready.home.remote())
    spec = EngineSpec(name=STUB, folder="", threads=3, engine={})
    limits = Limits(place=60, start=60, heartbeat=60, request=60, close=0.5)

    async def pids() -> tuple[int, int]:
        fleet = RayFleet(spec, 1, cpus=0.1, limits=limits, ready=ready)
        try:
            await fleet.publish(Publication(3, "adapter", "somewhere", "the digest"))
            found = []
            for start in (0, 10):
                items = [PromptItem(start, [1, 2, 3, 4], seed=start, row={}, origin="x")]  # type: ignore[arg-type]
                [group] = await fleet.generate(items, 1, Sampling(max_tokens=5))
                found.append(int(json.loads(group.completions[0].text)["pid"]))
                if start == 0:
                    os.kill(found[0], 9)
            return found[0], found[1]
        finally:
            await fleet.close()

    first, second = asyncio.run(pids())
    assert first == home.pid and second != first


def test_imports_run_without_the_collector_which_is_on_again_afterwards_and_spares_what_is_there() -> None:
    assert gc.isenabled()
    before = gc.get_freeze_count()
    with quick_imports():
        assert not gc.isenabled()
        with quick_imports():
            assert not gc.isenabled()
        assert not gc.isenabled(), "the inner one leaves that to the outer"
    assert gc.isenabled() and gc.get_freeze_count() > before
    with pytest.raises(ImportError), quick_imports():
        raise ImportError("no such library")
    assert gc.isenabled()
