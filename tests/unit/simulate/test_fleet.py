"""Simulated engines as one: routing, order, versions, and engines that are lost."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import numpy as np
import pytest

from align.protocols.fleet import Group, PromptItem, Sampling
from align.protocols.trainer import Publication
from align.simulate.engine import Agenda, Engine, Job
from align.simulate.fleet import SimulatedFleet
from align.simulate.lengths import Empirical, LogNormal
from align.simulate.workload import EngineModel, Workload
from align.stages.virtual_clock import run_virtually

SECOND_PER_TOKEN = EngineModel(slots=8, fixed_s=1.0, per_sequence_s=0.0)
WORK = Workload(
    groups=4, group_size=2, engines=2, engine=SECOND_PER_TOKEN, lengths=LogNormal(10, 0.0, limit=100, group_size=2)
)


def prompts(count: int) -> list[PromptItem]:
    return [PromptItem(number, np.zeros(1, dtype=np.int64), 0) for number in range(count)]


def version_of(group: Group) -> int:
    return int(group.completions[0].versions[0])


async def drawn(fleet: SimulatedFleet, count: int) -> list[tuple[float, int, int]]:
    """(time, group, version) of each group of a list, as they come."""
    found = []
    async for one in fleet.stream(prompts(count), fleet.work.group_size, Sampling()):
        assert isinstance(one, Group)
        found.append((asyncio.get_running_loop().time(), one.prompt.group_id, version_of(one)))
    return found


def test_groups_come_as_they_finish_and_an_evaluation_has_them_in_order() -> None:
    lengths = Empirical([np.array([n, n]) for n in (5.0, 50.0)], limit=100, group_size=2)

    async def main() -> tuple[list[tuple[float, int, int]], list[Group]]:
        fleet = SimulatedFleet(replace(WORK, lengths=lengths))
        return await drawn(fleet, 8), await fleet.generate(prompts(8), 2, Sampling())

    came, ordered = run_virtually(main())
    assert [time for time, _, _ in came] == [lengths.of(group)[0] for _, group, _ in came]
    assert sorted(group for _, group, _ in came) == list(range(8)) != [group for _, group, _ in came]
    assert [group.prompt.group_id for group in ordered] == list(range(8))


def test_a_group_that_comes_later_goes_to_the_engine_with_the_fewest() -> None:
    async def main() -> tuple[list[int], list[int]]:
        fleet = SimulatedFleet(WORK)
        one = asyncio.create_task(drawn(fleet, 3))
        await asyncio.sleep(1)
        before = [engine.jobs for engine in fleet.engines]
        more = asyncio.create_task(drawn(fleet, 1))
        await asyncio.sleep(1)
        after = [engine.jobs for engine in fleet.engines]
        await asyncio.gather(one, more)
        return before, after

    assert run_virtually(main()) == ([2, 1], [2, 2])


def test_groups_of_a_lost_engine_are_sampled_again_by_the_newest_version_each_once() -> None:
    work = replace(WORK, between_failures_s=15.0, restart_s=5.0)

    async def main() -> tuple[list[tuple[float, int, int]], dict[str, float]]:
        fleet = SimulatedFleet(work)
        stream = asyncio.create_task(drawn(fleet, 12))
        await asyncio.sleep(0.5)
        await fleet.publish(Publication(1, "base", "", ""))
        found, counts = await stream, fleet.metrics()
        await fleet.close()
        return found, counts

    found, counts = run_virtually(main())
    assert sorted(group for _, group, _ in found) == list(range(12))
    again = [group for _, group, version in found if version == 1]
    assert again and counts["rollout/reissued"] >= len(again) and counts["rollout/restarts"] >= 1


@pytest.mark.parametrize(("publishing", "version", "took"), [("adapter", 0, 2.0), ("drain", 0, 11.0)])
def test_a_publish_waits_for_running_groups_only_where_weights_are_whole(
    publishing: str, version: int, took: float
) -> None:
    async def main() -> tuple[float, list[tuple[float, int, int]]]:
        fleet = SimulatedFleet(replace(WORK, publishing=publishing, publish_s=2.0))
        stream = asyncio.create_task(drawn(fleet, 4))
        await asyncio.sleep(1)
        metrics = await fleet.publish(Publication(1, "base", "", ""))
        return metrics["time/publish"], await stream

    seconds, found = run_virtually(main())
    assert seconds == pytest.approx(took) and {v for _, _, v in found} == {version}


def test_an_engine_of_whole_batches_answers_each_when_its_longest_is_done_and_loads_between_them() -> None:
    lengths = Empirical([np.array([n, n]) for n in (5.0, 50.0)], limit=100, group_size=2)
    batches = replace(SECOND_PER_TOKEN, slots=4, whole_batches=True)

    async def main() -> list[tuple[float, int, int]]:
        fleet = SimulatedFleet(replace(WORK, engines=1, engine=batches, lengths=lengths))
        stream = asyncio.create_task(drawn(fleet, 6))
        await asyncio.sleep(1)
        await fleet.publish(Publication(1, "base", "", ""))
        return await stream

    expected, time = [], 0.0
    for first, version in ((0, 0), (2, 1), (4, 1)):
        time += max(float(lengths.of(group)[0]) for group in (first, first + 1))
        expected += [(time, group, version) for group in (first, first + 1)]
    assert sorted(run_virtually(main())) == expected


def test_sequences_that_end_between_two_groups_speed_the_others_up_from_then_on() -> None:
    # alone a token takes 2 s, of two 3 s: 10 tokens together, then 20 more of the longer one
    engine = EngineModel(slots=8, fixed_s=1.0, per_sequence_s=1.0)
    lengths = Empirical([np.array([10.0, 30.0])], limit=100, group_size=2)

    async def main() -> list[tuple[float, int, int]]:
        return await drawn(SimulatedFleet(replace(WORK, engines=1, engine=engine, lengths=lengths)), 1)

    assert run_virtually(main()) == [(pytest.approx(10 * 3 + 20 * 2), 0, 0)]


def test_an_engine_that_is_lost_gives_its_groups_back_in_order_to_begin_anew() -> None:
    async def main() -> list[tuple[int, int, int]]:
        done: list[Job] = []
        engine = Engine(replace(SECOND_PER_TOKEN, slots=3), Agenda(), done.append)
        engine.give([Job(item, [3.0 + item.group_id, 20.0], done.append) for item in prompts(4)])
        await asyncio.sleep(10)
        lost = engine.lose()
        await asyncio.sleep(100)
        assert not done and engine.jobs == 0
        return [(job.prompt.group_id, job.entered, job.left) for job in lost]

    assert run_virtually(main()) == [(n, 0, 2) for n in range(4)]
