"""An engine that is killed while its episodes wait for a tool: they are played again elsewhere from their seeds, each
once, and no process of theirs is left."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import psutil
import pytest

from align.data.tokenizer import ChatTokenizer
from align.protocols.fleet import Group, PromptItem, Sampling
from align.protocols.trainer import Publication
from rollout.base import EngineSpec
from rollout.fleet import RayFleet
from tests.integration.test_vllm_engine import as_json
from tests.tiny_models import VOCABULARY
from tests.unit.episodes import stage

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]

WORLD = """
import time
from rewards import environment

@environment
class World:
    def reset(self, row, seed):
        self.turn, self.seconds = 0, row["seconds"]
        return f"begin with {seed % 100}"

    def respond(self, reply):
        self.turn += 1
        time.sleep(self.seconds)
        return f"go on {self.turn}" if self.turn < 3 else None

    def reward(self):
        return float(self.turn)
"""
SAMPLING = Sampling(temperature=0.8, max_tokens=16, stop_token_ids=tuple(range(3, VOCABULARY, 2)))


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> EngineSpec:
    folder = tmp_path_factory.mktemp("killed")
    tokenizer = stage.write_model(folder, WORLD)
    made = asyncio.run(stage.spec_of(folder, tokenizer, use="world.py:World"))
    return replace(made, name="transformers", folder=str(folder / "model"), max_model_len=512, max_tokens=16,
                   end_ids=tokenizer.eos_ids)  # fmt: skip


@pytest.fixture
def fleet(ray_cluster: Any, spec: EngineSpec) -> Iterator[tuple[asyncio.Runner, RayFleet]]:
    with asyncio.Runner() as runner:
        started = RayFleet(spec, 2, cpus=0.5)
        try:
            runner.run(started.publish(Publication(1, "base", spec.folder, "")))
            yield runner, started
        finally:
            runner.run(started.close())


def prompts(spec: EngineSpec, seconds: float) -> list[PromptItem]:
    tokenizer: ChatTokenizer = spec.environment.tokenizer
    return [stage.prompt(tokenizer, spec, n, f"question {n}", seconds=seconds) for n in range(6)]


async def streamed(fleet: RayFleet, asked: list[PromptItem], disturb: Any = None) -> list[Group]:
    found: list[Group] = []
    async for group in fleet.stream(asked, 2, SAMPLING):
        assert isinstance(group, Group), group
        found.append(group)
        if disturb is not None and len(found) == 1:
            disturb()
    return sorted(found, key=lambda group: group.prompt.group_id)


def test_episodes_of_a_killed_engine_are_played_again_once_each(
    fleet: tuple[asyncio.Runner, RayFleet], spec: EngineSpec
) -> None:
    runner, engines = fleet
    calm = runner.run(streamed(engines, prompts(spec, 0.05)))
    home = engines._members[0]._home
    assert home is not None
    victim, theirs = home.pid, list[psutil.Process]()

    def kill() -> None:
        theirs.extend(psutil.Process(victim).children(recursive=True))
        os.kill(victim, signal.SIGKILL)

    found = runner.run(streamed(engines, prompts(spec, 0.3), kill))
    assert [group.prompt.group_id for group in found] == list(range(6)), "each group once"
    assert theirs, "environments were alive"
    counts = engines.metrics()
    assert counts["rollout/restarts"] == 1 and counts["rollout/reissued"] >= 1
    for group, before in zip(found, calm, strict=True):
        assert np.array_equal(group.prompt.token_ids, before.prompt.token_ids), "the same seeds, the same beginning"
        assert all(c.episode is not None and not c.lost for c in group.completions)
    assert [json[0][0] for json in as_json(found)] == [json[0][0] for json in as_json(calm)]
    _, alive = psutil.wait_procs(theirs, timeout=20)
    assert not [p for p in alive if p.is_running() and p.status() != psutil.STATUS_ZOMBIE], "nothing is left of them"
    deadline = time.monotonic() + 60
    while not engines._members[0].up and time.monotonic() < deadline:
        runner.run(asyncio.sleep(0.2))
    again = runner.run(streamed(engines, prompts(spec, 0.05)))
    assert [g.prompt.group_id for g in again] == list(range(6))
