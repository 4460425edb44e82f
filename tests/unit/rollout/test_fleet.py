"""Routing, deadlines, deaths and restarts of a fleet, on real Ray actors with an engine that has no model."""

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

from align.errors import AlignError, DataError, EngineError, PlacementError, RecipeError, SetupError, Unsupported
from align.protocols.fleet import FailedPrompt, Group, PromptItem, Sampling
from align.protocols.trainer import Publication
from rollout.base import EngineSpec, generate, make_engine
from rollout.fleet import RayFleet
from rollout.local_fleet import LocalFleet
from rollout.member import Limits
from rollout.worker import worker_environment

STUB = "tests.unit.rollout.stub_engine:StubEngine"
SAMPLING = Sampling(max_tokens=5)
VERSION = Publication(3, "adapter", "somewhere", "the digest")
QUICK = Limits(place=60, start=60, heartbeat=60, request=60, close=0.5)

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]


def spec(**engine: Any) -> EngineSpec:
    return EngineSpec(name=STUB, folder="", threads=3, engine=engine)


def prompts(count: int, first: int = 0, **rows: dict[str, str]) -> list[PromptItem]:
    """`p2={"do": "hang"}` makes prompt 2 hang its engine."""
    return [
        PromptItem(i, np.arange(4), seed=1000 + i, row=rows.get(f"p{i}", {}), origin=f"prompts.jsonl:{i + 1}")
        for i in range(first, first + count)
    ]


class Pair:
    """Two engines that no test harms, and the event loop that they are used from."""

    def __init__(self) -> None:
        self._loop = asyncio.Runner()
        self.fleet = RayFleet(spec(), 2, cpus=0.1, limits=QUICK)
        self.run(self.fleet.publish(VERSION))

    def run(self, what: Any) -> Any:
        return self._loop.run(what)

    def generate(self, items: list[PromptItem], group_size: int = 2) -> list[Group]:
        groups: list[Group] = self.run(self.fleet.generate(items, group_size, SAMPLING))
        return groups

    def close(self) -> None:
        self.run(self.fleet.close())
        self._loop.close()


@pytest.fixture(scope="module")
def pair(ray_cluster: Any) -> Iterator[Pair]:
    pair = Pair()
    yield pair
    pair.close()


@asynccontextmanager
async def fleet_of(workers: int, limits: Limits = QUICK, **engine: Any) -> AsyncIterator[RayFleet]:
    fleet = RayFleet(spec(**engine), workers, cpus=0.1, limits=limits)
    try:
        yield fleet
    finally:
        await fleet.close()


def about(group: Group) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(group.completions[0].text)
    return found


def bits(group: Group) -> tuple[int, list[list[int]]]:
    return group.prompt.group_id, [c.token_ids.tolist() for c in group.completions]


def version_of(group: Group) -> int:
    (version,) = {int(v) for c in group.completions for v in c.versions}
    return version


def drawn(items: list[PromptItem]) -> list[tuple[int, list[list[int]]]]:
    """What an undisturbed engine makes of these prompts."""
    engine = make_engine(spec())
    engine.publish(VERSION)
    return [bits(group) for group in generate(engine, items, 2, SAMPLING)]


async def all_of(fleet: RayFleet, items: list[PromptItem]) -> list[Group]:
    """Every group of a stream, by id; each must come once."""
    groups = [group async for group in fleet.stream(items, 2, SAMPLING)]
    assert all(isinstance(group, Group) for group in groups)
    return sorted(groups, key=lambda group: group.prompt.group_id)  # type: ignore[union-attr, return-value]


def failure(items: list[PromptItem], **options: Any) -> tuple[AlignError, AlignError]:
    """What a stream raises, and what the fleet answers afterwards."""

    async def run() -> tuple[AlignError, AlignError]:
        async with fleet_of(options.pop("workers", 1), **options) as fleet:
            with pytest.raises(AlignError) as caught:
                await fleet.publish(VERSION)
                await all_of(fleet, items)
            with pytest.raises(AlignError) as again:
                await fleet.publish(VERSION)
            return caught.value, again.value

    return asyncio.run(run())


# ------------------------------------------------------------------------------------------------ drawing


def test_groups_come_in_order_each_drawn_by_one_engine_chosen_by_its_index(pair: Pair) -> None:
    items = prompts(5)
    groups = pair.generate(items)
    assert [bits(group) for group in groups] == drawn(items)
    assert {version_of(group) for group in groups} == {3}
    pids = [about(g)["pid"] for g in groups]
    assert pids[0::2] == [pids[0]] * 3
    assert pids[1::2] == [pids[1]] * 2
    assert pids[0] != pids[1]
    assert all(len({json.loads(c.text)["pid"] for c in g.completions}) == 1 for g in groups)


def test_several_streams_may_be_open_and_each_gets_what_it_asked_for(pair: Pair) -> None:
    async def run() -> list[list[Group]]:
        return await asyncio.gather(*(all_of(pair.fleet, prompts(7, first)) for first in (0, 100, 200)))

    for first, groups in zip((0, 100, 200), pair.run(run()), strict=True):
        assert [bits(group) for group in groups] == drawn(prompts(7, first))


def test_a_stream_that_is_closed_early_leaves_nothing_behind(pair: Pair) -> None:
    async def run() -> None:
        stream = pair.fleet.stream(prompts(40), 2, SAMPLING)
        await anext(stream)  # type: ignore[arg-type]
        await stream.aclose()  # type: ignore[attr-defined]

    pair.run(run())
    assert [bits(group) for group in pair.generate(prompts(3))] == drawn(prompts(3))


def test_a_prompt_that_cannot_be_sampled_is_data_in_a_stream_and_an_error_in_an_evaluation(pair: Pair) -> None:
    items = prompts(3, p1={"do": "refuse"})

    async def run() -> list[Any]:
        return [answer async for answer in pair.fleet.stream(items, 2, SAMPLING)]

    answers = {answer.prompt.group_id: answer for answer in pair.run(run())}
    assert answers[1] == FailedPrompt(items[1], "too long", "a prompt too long")
    assert isinstance(answers[0], Group) and isinstance(answers[2], Group)
    with pytest.raises(DataError, match="too long") as caught:
        pair.generate(items)
    assert (caught.value.where, caught.value.exit_code) == ("prompts.jsonl:2", 2)
    assert pair.fleet.metrics()["rollout/failed_prompts"] == 2


def test_groups_of_equal_greedy_completions_are_refused_and_no_prompts_make_no_groups(pair: Pair) -> None:
    with pytest.raises(Unsupported, match="greedy"):
        pair.run(pair.fleet.generate(prompts(1), 2, Sampling(temperature=0.0)))
    assert pair.generate([]) == []


def test_an_actor_starts_with_its_threads_and_waits_as_it_is_told(pair: Pair) -> None:
    (group,) = pair.generate(prompts(1, p0={"do": "tell"}))
    environment = about(group)["environment"]
    assert environment["OMP_NUM_THREADS"] == "3" and "OMP_WAIT_POLICY" not in environment
    assert worker_environment(2, True)["OMP_WAIT_POLICY"] == "PASSIVE"


def test_a_fleet_without_a_version_does_not_draw() -> None:
    async def run() -> None:
        async with fleet_of(1) as fleet:
            await all_of(fleet, prompts(1))

    with pytest.raises(EngineError, match="before a version"):
        asyncio.run(run())


# ------------------------------------------------------------------------------------------------ losing engines


async def pids_of(fleet: RayFleet) -> list[int]:
    return [about(group)["pid"] for group in await fleet.generate(prompts(2, 900), 1, SAMPLING)]


@pytest.mark.slow
def test_a_probe_reaches_every_engine_beside_what_they_draw() -> None:
    async def run() -> None:
        async with fleet_of(3, step_s=0.02) as fleet:
            await fleet.publish(VERSION)
            running = asyncio.create_task(all_of(fleet, prompts(10)))
            probes = await fleet.probe(prompts(1, 500)[0], SAMPLING)
            assert len({about(group)["pid"] for group in probes}) == 3
            assert {len(group.completions) for group in probes} == {1} and {version_of(g) for g in probes} == {3}
            assert [bits(group) for group in await running] == drawn(prompts(10))

    asyncio.run(run())


@pytest.mark.parametrize("how", [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=pytest.mark.slow)])
def test_an_engine_that_is_killed_or_frozen_in_the_middle_loses_no_group_and_repeats_none(how: signal.Signals) -> None:
    """Its groups are drawn by the other one, with the same ids and seeds; it comes back with the newest version."""
    items = prompts(30)

    async def run() -> None:
        async with fleet_of(2, Limits(heartbeat=2, close=0.5), per_step=1, step_s=0.05) as fleet:
            await fleet.publish(VERSION)
            victim, other = await pids_of(fleet)
            groups: list[Group] = []
            async for group in fleet.stream(items, 2, SAMPLING):
                groups.append(group)  # type: ignore[arg-type]
                if len(groups) == 6:
                    os.kill(victim, how)
            assert sorted(bits(group) for group in groups) == drawn(items)
            assert [about(group)["pid"] for group in groups].count(victim) <= 5
            assert {about(group)["pid"] for group in groups} >= {other}
            await waited(lambda: not runs(victim))
            newer = Publication(4, "adapter", "somewhere", "the digest")
            await fleet.publish(newer)
            while len(back := set(await pids_of(fleet))) < 2:
                await asyncio.sleep(0.05)
            assert victim not in back and other in back
            assert {version_of(g) for g in await all_of(fleet, items)} == {4}
            counts = fleet.metrics()
            assert counts["rollout/restarts"] == 1
            assert 8 <= counts["rollout/reissued"] <= 13
            assert 0 < counts["time/engine_lost"] < 60
            assert not any(fleet.metrics().values())

    asyncio.run(run())


@pytest.mark.slow
def test_the_only_engine_takes_its_groups_up_again_after_a_restart(tmp_path: Path) -> None:
    items = prompts(6, p3={"do": "die", "once": str(tmp_path / "died")})

    async def run() -> list[Group]:
        async with fleet_of(1, per_step=1) as fleet:
            await fleet.publish(VERSION)
            first = set(await pids_of(fleet))
            groups = await all_of(fleet, items)
            assert fleet.metrics()["rollout/restarts"] == 1
            # those drawn before the death may come from either: their way out can be cut off with the engine
            assert {about(group)["pid"] for group in groups[3:]} == set(await pids_of(fleet)) != first
            return groups

    assert [bits(group) for group in asyncio.run(run())] == drawn(prompts(6))


@pytest.mark.slow
def test_an_engine_that_lives_and_makes_no_step_is_found_by_its_deadline(tmp_path: Path) -> None:
    items = prompts(4, p1={"do": "hang", "once": str(tmp_path / "hung")})

    async def run() -> list[Group]:
        async with fleet_of(2, Limits(request=1.5, close=0.5)) as fleet:
            await fleet.publish(VERSION)
            return await all_of(fleet, items)

    assert [bits(group) for group in asyncio.run(run())] == drawn(prompts(4))


def test_an_exception_that_is_not_ours_costs_a_restart(tmp_path: Path) -> None:
    items = prompts(4, p1={"do": "raise", "once": str(tmp_path / "raised")})

    async def run() -> list[Group]:
        async with fleet_of(1) as fleet:
            await fleet.publish(VERSION)
            groups = await all_of(fleet, items)
            assert fleet.metrics()["rollout/restarts"] == 1
            return groups

    assert [bits(group) for group in asyncio.run(run())] == drawn(prompts(4))


@pytest.mark.slow
def test_an_engine_that_dies_during_a_publish_comes_back_with_that_version(tmp_path: Path) -> None:
    """One of the two dies: the publish ends when the other holds the version, and no group is older."""
    newer = Publication(4, "adapter", f"die {tmp_path / 'died'}", "the digest")

    async def run() -> None:
        async with fleet_of(2, per_step=1, step_s=0.02) as fleet:
            await fleet.publish(VERSION)
            before = set(await pids_of(fleet))
            running = asyncio.create_task(all_of(fleet, prompts(20, 100)))
            await fleet.publish(newer)
            assert {version_of(group) for group in await all_of(fleet, prompts(20))} == {4}
            assert {version_of(group) for group in await running} <= {3, 4}
            while len(after := set(await pids_of(fleet))) < 2:
                await asyncio.sleep(0.05)
            assert len(before & after) == 1
            assert {version_of(group) for group in await all_of(fleet, prompts(20))} == {4}

    asyncio.run(run())


@pytest.mark.slow
def test_a_prompt_that_kills_every_engine_ends_the_run_and_is_named() -> None:
    error, later = failure(prompts(3, p1={"do": "die"}), workers=2, per_step=1)
    assert isinstance(error, EngineError)
    assert error.where == "prompts.jsonl:2"
    assert "died" in error.what and "every engine that had this prompt" in error.what
    assert later.what == error.what


@pytest.mark.slow
def test_an_engine_that_cannot_be_kept_alive_is_given_up_with_its_last_error(tmp_path: Path) -> None:
    async def run() -> None:
        async with fleet_of(1) as fleet:
            await fleet.publish(Publication(3, "adapter", "die nowhere/to/note/it", "the digest"))
            await all_of(fleet, prompts(1))

    with pytest.raises(EngineError, match="restarted 3 times") as caught:
        asyncio.run(run())
    assert caught.value.where == "rollout worker 0"
    assert "FileNotFoundError" in caught.value.what


# ------------------------------------------------------------------------------------------------ what no restart cures


def test_an_error_of_ours_inside_an_engine_ends_the_run_with_its_remedy() -> None:
    error, _ = failure(prompts(4, p3={"do": "diverge"}), workers=2)
    assert isinstance(error, EngineError)
    assert (error.what, error.where, error.remedy) == (
        "the policy has diverged", "rollout worker 1", "lower optim.lr",
    )  # fmt: skip


@pytest.mark.slow
def test_an_engine_that_cannot_start_says_why() -> None:
    error, later = failure([], start="fails")
    assert isinstance(error, SetupError)
    assert (error.what, error.where, error.remedy) == ("no such engine here", "rollout worker 0", "install it")
    assert later.what == error.what
    error, _ = failure([], start_s=60, limits=Limits(start=3, close=0.5))
    assert (error.where, error.what) == ("rollout worker 0", "the engine did not start within 3 s")


def test_an_engine_without_memory_to_start_says_what_asks_for_less() -> None:
    error, _ = failure([], start="no memory")
    assert isinstance(error, EngineError)
    assert "for want of memory" in error.what and "can't allocate" in error.what
    assert "rollout.max_model_len" in str(error.remedy)


@pytest.mark.parametrize(("path", "match"), [("spoiled", "version 4"), ("refused", "not applied")])
def test_an_engine_with_other_weights_than_published_is_refused(path: str, match: str) -> None:
    publication = Publication(4, "adapter", path, "the digest")

    async def run() -> None:
        async with fleet_of(1) as fleet:
            await fleet.publish(publication)

    with pytest.raises(EngineError, match=match) as caught:
        asyncio.run(run())
    assert caught.value.where == "rollout worker 0"
    with pytest.raises(EngineError, match=match):
        asyncio.run(LocalFleet(make_engine(spec())).publish(publication))


def test_closing_ends_every_actor_and_a_closed_fleet_refuses_work() -> None:
    async def run() -> None:
        async with fleet_of(2, per_step=1, step_s=0.1) as fleet:
            await fleet.publish(VERSION)
            pids = await pids_of(fleet)
            running = asyncio.create_task(all_of(fleet, prompts(50)))
            await asyncio.sleep(0.2)
            await fleet.close()
            with pytest.raises(EngineError, match="closed"):
                await running
            await waited(lambda: not any(runs(pid) for pid in pids))
            with pytest.raises(EngineError, match="closed"):
                await fleet.generate(prompts(1), 1, SAMPLING)

    asyncio.run(run())


def test_a_fleet_is_refused_before_any_actor_exists_when_its_description_is_wrong() -> None:
    with pytest.raises(RecipeError, match="max_num_seq"):
        RayFleet(EngineSpec(name="vllm", folder="", engine={"max_num_seq": 1}), 1)
    with pytest.raises(PlacementError, match="bundles"):
        RayFleet(spec(), 2, bundles=[0])


def test_a_thousand_groups_cost_less_than_two_milliseconds_each(pair: Pair) -> None:
    """Of the fleet and the workers together: the engine does nothing. Generous, because the machine may be shared."""
    items = prompts(1000)
    pair.generate(items)
    best = min(_seconds(lambda: pair.generate(items)) for _ in range(3))
    assert best / len(items) < 2e-3


def _seconds(run: Any) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def test_a_local_fleet_has_the_same_interface() -> None:
    async def run() -> None:
        fleet = LocalFleet(make_engine(spec(per_step=1, drain=True)))
        await fleet.publish(VERSION)
        assert [bits(g) for g in await fleet.generate(prompts(3), 2, SAMPLING)] == drawn(prompts(3))
        streams = [asyncio.create_task(all_of(fleet, prompts(4, first))) for first in (0, 50)]  # type: ignore[arg-type]
        await asyncio.sleep(0)
        await fleet.publish(Publication(4, "adapter", "somewhere", "the digest"))
        old, new = await asyncio.gather(*streams)
        assert [bits(g) for g in old] == drawn(prompts(4)) and [bits(g) for g in new] == drawn(prompts(4, 50))
        assert {version_of(g) for g in await all_of(fleet, prompts(2))} == {4}  # type: ignore[arg-type]
        assert fleet.metrics() == {}
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
        asyncio.run(waited(lambda: file.exists() and file.read_text()))
        pid = int(file.read_text())
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    asyncio.run(waited(lambda: not runs(pid)))


async def waited(condition: Any, limit_s: float = 30.0) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, "nothing happened"
        await asyncio.sleep(0.05)


def runs(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z" and os.getpid() != pid


@pytest.mark.parametrize("how", ["given up", "an error while it fails"])
def test_whoever_waits_for_a_group_hears_of_the_end_of_the_task_that_keeps_the_engine(
    how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray may give an answer up, and may be gone itself when the fleet is to end its actors."""

    async def run() -> None:
        async with fleet_of(1) as fleet:
            await fleet.publish(VERSION)
            stream = asyncio.create_task(all_of(fleet, prompts(2, p0={"do": "hang"})))
            while not fleet._queues:
                await asyncio.sleep(0.01)
            if how == "given up":
                fleet._tasks[0].cancel()
            else:

                def gone(*_: Any, **__: Any) -> None:
                    raise RuntimeError("Ray is gone")

                with monkeypatch.context() as patched:
                    patched.setattr("rollout.member.ray.kill", gone)
                    fleet._fail(EngineError("the head died"))
            with pytest.raises(EngineError, match=r"its task was given up|the head died"):
                await asyncio.wait_for(stream, 20)

    asyncio.run(run())
