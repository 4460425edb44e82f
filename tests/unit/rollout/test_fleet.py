"""Splitting, joining, deadlines and failures of a fleet, on real Ray actors with an engine that has no model."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from align.errors import AlignError, DataError, EngineError, PlacementError, RecipeError, SetupError
from align.protocols import Group, PromptItem, Publication, Sampling
from rollout.base import EngineSpec, make_engine
from rollout.fleet import LocalFleet, RayFleet, join, split

STUB = "tests.unit.rollout.stub_engine:StubEngine"
SAMPLING = Sampling(max_tokens=5)
VERSION = Publication(3, "adapter", "somewhere", "the digest")


pytestmark = pytest.mark.usefixtures("ray_cluster")


def spec(**engine: Any) -> EngineSpec:
    return EngineSpec(name=STUB, folder="", threads=3, engine=engine)


def prompts(count: int, **rows: str) -> list[PromptItem]:
    """`p2="hang"` makes prompt 2 hang its engine."""
    return [
        PromptItem(i, np.arange(4), seed=1000 + i, row={"do": rows.get(f"p{i}", "")}, origin=f"prompts.jsonl:{i + 1}")
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def pair(ray_cluster: Any) -> Iterator[RayFleet]:
    """Two engines that no test harms."""
    fleet = RayFleet(spec(), 2, cpus=0.1)
    asyncio.run(fleet.publish(VERSION))
    yield fleet
    asyncio.run(fleet.close())


@asynccontextmanager
async def fleet_of(workers: int, **options: Any) -> AsyncIterator[RayFleet]:
    engine = options.pop("engine", {})
    fleet = RayFleet(spec(**engine), workers, cpus=0.1, close_timeout_s=0.5, **options)
    try:
        yield fleet
    finally:
        await fleet.close()


def about(group: Group) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(group.completions[0].text)
    return found


def refusal(fleet: RayFleet, items: list[PromptItem]) -> AlignError:
    with pytest.raises(AlignError) as caught:
        asyncio.run(fleet.generate(items, 2, SAMPLING))
    return caught.value


def failure(workers: int, count: int, rows: dict[str, str], **options: Any) -> AlignError:
    async def run() -> None:
        async with fleet_of(workers, **options) as fleet:
            await fleet.publish(VERSION)
            await fleet.generate(prompts(count, **rows), 2, SAMPLING)

    with pytest.raises(AlignError) as caught:
        asyncio.run(run())
    return caught.value


def test_joining_undoes_splitting_for_any_number_of_prompts_and_workers() -> None:
    for count in range(9):
        items = prompts(count)
        for workers in range(1, 5):
            parts = split(items, workers)
            assert max(map(len, parts)) - min(map(len, parts)) <= 1
            groups = join([[Group(item, ()) for item in part] for part in parts])
            assert [group.prompt for group in groups] == items


def test_groups_come_back_in_order_each_drawn_by_one_engine_chosen_by_its_index(pair: RayFleet) -> None:
    items = prompts(5)
    groups = asyncio.run(pair.generate(items, 3, SAMPLING))
    assert [g.prompt.group_id for g in groups] == [0, 1, 2, 3, 4]
    pids = [about(g)["pid"] for g in groups]
    assert pids[0::2] == [pids[0]] * 3
    assert pids[1::2] == [pids[1]] * 2
    assert pids[0] != pids[1]
    assert all(len({json.loads(c.text)["pid"] for c in g.completions}) == 1 for g in groups)
    engine = make_engine(spec())
    engine.publish(VERSION)
    for mine, theirs in zip(groups, engine.generate(items, 3, SAMPLING), strict=True):
        for a, b in zip(mine.completions, theirs.completions, strict=True):
            assert a.token_ids.tolist() == b.token_ids.tolist()
            assert a.versions.tolist() == [3] * 5


def test_seconds_and_tokens_of_the_last_call_are_reported(pair: RayFleet) -> None:
    asyncio.run(pair.generate(prompts(5), 3, SAMPLING))
    last = pair.metrics()
    assert last["tokens/generated"] == 5 * 3 * 5
    assert last["tokens/generated_per_second"] == pytest.approx(75 / last["time/generate"])
    assert asyncio.run(pair.publish(VERSION))["time/publish"] > 0


def test_an_actor_starts_with_its_threads_and_with_passive_waiting(pair: RayFleet) -> None:
    (group,) = asyncio.run(pair.generate(prompts(1), 1, SAMPLING))
    environment = about(group)["environment"]
    assert (environment["OMP_NUM_THREADS"], environment["OMP_WAIT_POLICY"]) == ("3", "PASSIVE")


def test_a_hung_engine_is_named_when_its_deadline_has_passed() -> None:
    started = time.monotonic()
    error = failure(2, 4, {"p1": "hang"}, request_timeout_s=1.5)
    assert isinstance(error, EngineError)
    assert (error.where, error.what) == ("rollout worker 1", "the engine did not generate within 1.5 s")
    assert time.monotonic() - started < 40


def test_an_error_inside_an_engine_names_the_worker_and_shows_no_traceback(pair: RayFleet) -> None:
    error = refusal(pair, prompts(4, p3="raise"))
    assert isinstance(error, EngineError)
    assert str(error).startswith("rollout worker 1: the engine failed to generate: ValueError: the kernel is on fire")
    assert "\n" not in error.what


def test_an_error_of_ours_keeps_its_class_place_and_remedy(pair: RayFleet) -> None:
    error = refusal(pair, prompts(2, p1="refuse"))
    assert isinstance(error, DataError)
    assert (error.where, error.remedy, error.exit_code) == ("prompts.jsonl:2", "shorten it", 2)


def test_an_engine_that_dies_is_named() -> None:
    error = failure(2, 4, {"p0": "die"})
    assert isinstance(error, EngineError)
    assert error.where == "rollout worker 0"
    assert "died" in error.what


def test_an_engine_that_cannot_start_says_why() -> None:
    error = failure(1, 1, {}, engine={"start": "fails"})
    assert isinstance(error, SetupError)
    assert (error.what, error.where, error.remedy) == ("no such engine here", "rollout worker 0", "install it")
    error = failure(1, 1, {}, engine={"start_s": 60}, start_timeout_s=3)
    assert (error.where, error.what) == ("rollout worker 0", "the engine did not start within 3 s")


def test_an_engine_with_other_weights_than_published_is_refused() -> None:
    spoiled = Publication(4, "adapter", "spoiled", "the digest")

    async def run() -> None:
        async with fleet_of(1) as fleet:
            await fleet.publish(spoiled)

    with pytest.raises(EngineError, match="version 4") as caught:
        asyncio.run(run())
    assert caught.value.where == "rollout worker 0"
    with pytest.raises(EngineError, match="version 4"):
        asyncio.run(LocalFleet(make_engine(spec())).publish(spoiled))


def test_closing_ends_every_actor_and_a_closed_fleet_refuses_work() -> None:
    async def run() -> None:
        async with fleet_of(2) as fleet:
            await fleet.publish(VERSION)
            pids = [about(g)["pid"] for g in await fleet.generate(prompts(2), 1, SAMPLING)]
            await fleet.close()
            for _ in range(100):
                if not any(Path(f"/proc/{pid}").exists() for pid in pids):
                    break
                await asyncio.sleep(0.1)
            else:
                pytest.fail(f"actors {pids} outlived their fleet")
            with pytest.raises(EngineError, match="closed"):
                await fleet.generate(prompts(1), 1, SAMPLING)

    asyncio.run(run())


def test_a_fleet_is_refused_before_any_actor_exists_when_its_description_is_wrong() -> None:
    with pytest.raises(RecipeError, match="max_num_seq"):
        RayFleet(EngineSpec(name="vllm", folder="", engine={"max_num_seq": 1}), 1)
    with pytest.raises(PlacementError, match="bundles"):
        RayFleet(spec(), 2, bundles=[0])


def test_a_local_fleet_has_the_same_interface() -> None:
    async def run() -> None:
        fleet = LocalFleet(make_engine(spec()))
        await fleet.publish(VERSION)
        groups = await fleet.generate(prompts(3), 2, SAMPLING)
        assert [len(g.completions) for g in groups] == [2, 2, 2]
        assert fleet.metrics()["tokens/generated"] == 30
        await fleet.close()

    asyncio.run(run())


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="parent-death signals are Linux's")
def test_a_process_dies_with_its_parent(tmp_path: Path) -> None:
    child = (
        "import pathlib, sys, os, time\n"
        "from rollout.worker import die_with_parent\n"
        "die_with_parent()\n"
        "pathlib.Path(sys.argv[1]).write_text(str(os.getpid()))\n"
        "time.sleep(60)\n"
    )
    parent = "import subprocess, sys\nsubprocess.run([sys.executable, '-c', sys.argv[1], sys.argv[2]])\n"
    file = tmp_path / "pid"
    process = subprocess.Popen([sys.executable, "-c", parent, child, str(file)])
    try:
        pid = int(waited(lambda: file.read_text() if file.exists() else ""))
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    waited(lambda: not runs(pid))


def waited(condition: Any, limit_s: float = 30.0) -> Any:
    deadline = time.monotonic() + limit_s
    while not (found := condition()):
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.05)
    return found


def runs(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z" and os.getpid() != pid
