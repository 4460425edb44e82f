"""Two vLLM engines in Ray actors: one is killed, frozen, killed while it loads a version; then 200 versions follow."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from align.model.adapters import attach
from align.protocols.fleet import Group, Sampling
from align.protocols.trainer import Publication
from align.stages.publication import PublicationFolder
from rollout.fleet import RayFleet
from rollout.member import Limits
from tests.integration.test_vllm_engine import ADAPTER, TEMPERATURE, largest_gap, prompts, published, randomize, spec
from tests.tiny_models import write_tiny_qwen3

pytestmark = [pytest.mark.vllm, pytest.mark.usefixtures("ray_cluster")]

SAMPLING = Sampling(temperature=TEMPERATURE, max_tokens=48)
HEARTBEAT_S = 8.0
BACK_S = 150.0


class Run:
    """Two engines, the policy that they serve, and the versions published to them so far."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModelForCausalLM

        base = write_tiny_qwen3(folder / "tiny")
        self.policy = attach(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), ADAPTER, None, seed=3)
        self.publications = PublicationFolder(folder)
        self.version = 0
        engine = spec(base, lora_rank=ADAPTER.rank, versions=2)
        self.fleet = RayFleet(engine, 2, cpus=0.5, limits=Limits(heartbeat=HEARTBEAT_S))

    def write(self) -> Publication:
        """The next version of the policy, on its way to the engines."""
        self.version += 1
        randomize(self.policy, self.version)
        return published(self.policy, self.publications.folder("grpo", self.version), self.version)

    async def publish(self) -> None:
        publication = self.write()
        await self.fleet.publish(publication)
        self.publications.supersede(Path(publication.path))

    def pid(self, engine: int) -> int:
        home = self.fleet._members[engine]._home
        assert home is not None
        return home.pid

    async def back(self, engine: int, before: int) -> None:
        """Wait until the engine is another process than `before` and serves."""
        member, deadline = self.fleet._members[engine], time.monotonic() + BACK_S
        while not member.up or self.pid(engine) == before or not self.fleet._ledger._serving[engine]:
            assert time.monotonic() < deadline, "the engine did not come back"
            await asyncio.sleep(0.2)

    def check(self, groups: list[Group], seed: int) -> None:
        """Each group once, all of the newest version, with the log-probabilities that the policy gives."""
        assert sorted(g.prompt.group_id for g in groups) == [p.group_id for p in prompts(20, seed)]
        assert {int(v) for g in groups for c in g.completions for v in c.versions} == {self.version}
        assert largest_gap(self.policy, groups) < 1e-4

    async def stream(self, seed: int, *, disturb: Any = None, after: int = 3) -> list[Group]:
        groups: list[Group] = []
        async for group in self.fleet.stream(prompts(20, seed), 4, SAMPLING):
            assert isinstance(group, Group)
            groups.append(group)
            if len(groups) == after and disturb is not None:
                disturb()
        return groups

    async def close(self) -> None:
        await self.fleet.close()
        self.publications.close()


@pytest.fixture(scope="module")
def loop() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="module")
def run(ray_cluster: Any, loop: asyncio.Runner, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    started = Run(tmp_path_factory.mktemp("run"))
    try:
        loop.run(started.publish())
        yield started
    finally:
        loop.run(started.close())


def test_killing_one_of_two_engines_in_the_middle_loses_no_group_and_repeats_none(run: Run, loop: Any) -> None:
    async def all_of_it() -> None:
        victim = run.pid(0)
        run.check(await run.stream(1, disturb=lambda: os.kill(victim, signal.SIGKILL)), 1)
        await run.publish()  # while it is away: it must come back with this version
        await run.back(0, victim)
        run.check(await run.stream(2), 2)
        counts = run.fleet.metrics()
        assert counts["rollout/restarts"] == 1 and counts["rollout/reissued"] >= 1

    loop.run(all_of_it())


def test_a_frozen_engine_is_found_by_its_heartbeat_and_replaced(run: Run, loop: Any) -> None:
    async def all_of_it() -> None:
        victim = run.pid(1)
        run.check(await run.stream(3, disturb=lambda: os.kill(victim, signal.SIGSTOP)), 3)
        await run.back(1, victim)
        assert not psutil.pid_exists(victim) or psutil.Process(victim).status() == psutil.STATUS_ZOMBIE
        await run.publish()
        run.check(await run.stream(4), 4)
        assert run.fleet.metrics()["rollout/restarts"] == 1

    loop.run(all_of_it())


def test_killing_an_engine_during_a_publish_mixes_no_weights(run: Run, loop: Any) -> None:
    """The version before is deleted as soon as the publish returns, as in a run."""

    async def all_of_it() -> None:
        victim, publication = run.pid(0), run.write()
        os.kill(victim, signal.SIGSTOP)  # it cannot load the version before it dies
        publishing = asyncio.create_task(run.fleet.publish(publication))
        await asyncio.sleep(0.5)
        assert not publishing.done(), "a version is published when every live engine holds it"
        os.kill(victim, signal.SIGKILL)
        await publishing
        run.publications.supersede(Path(publication.path))
        run.check(await run.stream(5), 5)
        await run.back(0, victim)
        run.check(await run.stream(6), 6)

    loop.run(all_of_it())


def test_two_hundred_versions_leave_memory_and_disk_as_they_were(run: Run, loop: Any) -> None:
    async def usage() -> dict[str, int]:
        await run.stream(7)
        root = run.publications.root
        processes = [psutil.Process(run.pid(engine)) for engine in (0, 1)]
        return {
            "versions": sum(path.is_dir() for path in root.iterdir()),
            "bytes": sum(path.stat().st_size for path in root.rglob("*") if path.is_file()),
            "open files": sum(process.num_fds() for process in processes),
            "memory": sum(process.memory_info().rss for process in processes),
        }

    async def all_of_it() -> None:
        for _ in range(20):
            await run.publish()
        before = await usage()
        for _ in range(200):
            await run.publish()
        after = await usage()
        assert before["versions"] == after["versions"] == 1
        assert after["bytes"] < before["bytes"] + 1024
        assert abs(after["open files"] - before["open files"]) <= 8
        assert after["memory"] - before["memory"] < 64 << 20

    loop.run(all_of_it())
