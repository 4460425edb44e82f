"""The monitor: what engines sample after each publish, compared with what the trainer computes."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from align.errors import EngineError
from align.protocols.fleet import Group, PromptItem, Sampling
from align.protocols.trainer import Publication
from align.stages.monitor import tolerance
from tests.unit.stages.online_run import Run, SlowFleet, SlowTrainer
from tests.unit.stages.plain import PlainFleet


class Engines(PlainFleet):
    """Engines whose log-probabilities are off by so much, one after another; log: what was asked of them."""

    def __init__(self, *off: float) -> None:
        super().__init__()
        self.off, self.log = off, []

    async def publish(self, publication: Publication) -> dict[str, float]:
        self.log.append(f"publish {publication.version}")
        return await super().publish(publication)

    async def probe(self, item: PromptItem, sampling: Sampling) -> list[Group]:
        self.log.append("probe")
        [group] = await super().probe(item, sampling)
        [drawn] = group.completions
        return [Group(item, (replace(drawn, logps=drawn.logps + np.float32(off)),)) for off in self.off]

    async def generate(self, prompts, group_size, sampling):  # type: ignore[no-untyped-def]
        self.log.append("groups")
        return await super().generate(prompts, group_size, sampling)


def test_engines_that_agree_are_seen_at_every_step_and_nothing_is_told(tmp_path: Path) -> None:
    run = Run(tmp_path, total=3, fleet=Engines(0, 0), watched=True)
    run()
    assert run.lines.of("monitor/max_difference") == [(1, 0.0), (2, 0.0), (3, 0.0)]
    assert not [line for line in run.lines.messages if "monitor" in line]


def test_the_probe_is_drawn_after_each_publish_and_before_any_group_of_a_synchronous_stage(tmp_path: Path) -> None:
    fleet = Engines(0)
    Run(tmp_path, total=2, fleet=fleet, watched=True)()
    assert fleet.log == ["publish 0", "probe", "groups", "publish 1", "probe", "groups", "publish 2"]


def test_the_engine_that_is_furthest_off_counts_and_the_user_is_told_three_times(tmp_path: Path) -> None:
    run = Run(tmp_path, total=5, fleet=Engines(0, -0.25, 0.125), watched=True)
    run()
    assert [value for _, value in run.lines.of("monitor/max_difference")] == pytest.approx([0.25] * 5)
    told = [line for line in run.lines.messages if "monitor" in line]
    assert len(told) == 3 and "after version 0" in told[0] and "differs from the trainer's by 0.25" in told[0]


class Late(SlowFleet):
    """Draws the probe in so many seconds."""

    seconds_of_probe = 0.0

    async def probe(self, item: PromptItem, sampling: Sampling) -> list[Group]:
        await asyncio.sleep(self.seconds_of_probe)
        return await super().probe(item, sampling)


def test_a_trainer_that_never_waits_for_groups_waits_for_one_probe_in_ten(tmp_path: Path) -> None:
    fleet = Late()
    fleet.seconds_of_probe = 5.0
    run = Run(tmp_path, total=40, fleet=fleet, trainer=SlowTrainer(1.0), staleness=2, watched=True)
    run.virtually()
    compared = [step for step, skipped in run.lines.of("monitor/skipped") if not skipped]
    assert len(compared) >= 3 and run.left == []
    assert run.lines.of("monitor/max_difference") == [(step, 0.0) for step in compared]
    alone = Run(tmp_path / "alone", total=40, fleet=SlowFleet(), trainer=SlowTrainer(1.0), staleness=2)
    alone.virtually()
    assert run.seconds <= alone.seconds + 5.0 * 4


def test_a_probe_that_never_comes_holds_nobody_up_for_long(tmp_path: Path) -> None:
    fleet = Late()
    fleet.seconds_of_probe = 1e9
    run = Run(tmp_path, total=15, fleet=fleet, staleness=1, watched=True)
    run.virtually()
    assert run.seconds < 1e3 and run.left == []
    assert {skipped for _, skipped in run.lines.of("monitor/skipped")} == {1.0}


def test_a_probe_of_another_version_is_not_compared(tmp_path: Path) -> None:
    class Ahead(PlainFleet):
        async def probe(self, item: PromptItem, sampling: Sampling) -> list[Group]:
            [group] = await super().probe(item, sampling)
            [drawn] = group.completions
            return [Group(item, (replace(drawn, versions=drawn.versions + 1),))]

    run = Run(tmp_path, total=1, fleet=Ahead(), watched=True)
    run()
    assert run.lines.of("monitor/skipped") == [(1, 1.0)] and not run.lines.of("monitor/max_difference")


def test_engines_that_fail_at_the_probe_end_the_stage(tmp_path: Path) -> None:
    class Failing(PlainFleet):
        async def probe(self, item: PromptItem, sampling: Sampling) -> list[Group]:
            raise EngineError("cannot be kept alive")

    with pytest.raises(EngineError, match="cannot be kept alive"):
        Run(tmp_path, fleet=Failing(), watched=True)()


def test_the_tolerance_is_that_of_the_coarsest_dtype() -> None:
    assert tolerance("auto", "float32") == 0.002 == tolerance("auto", "auto", "float64")
    assert tolerance("bfloat16", "float32") == tolerance("auto", "bfloat16") == 0.3
