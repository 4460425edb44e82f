"""One simulated stage: the loop of a real run over simulated parts, and what it came to."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from align.protocols.fleet import PromptItem, Sampling
from align.protocols.trainer import Metrics
from align.recipe.objectives import Objectives
from align.simulate.fleet import SimulatedFleet
from align.simulate.parts import NoFolders, NoLog, SimulatedScorer, SimulatedTrainer
from align.simulate.workload import Workload
from align.stages.groups import PromptCursor
from align.stages.online import OnlinePlan, OnlineStage
from align.stages.virtual_clock import run_virtually

_STAGE = "simulated"
_SUMMED = ("groups/dropped", "groups/refilled", "rollout/reissued", "rollout/restarts", "time/engine_lost")


@dataclass(frozen=True)
class Outcome:
    """Of the turns after the first few, in virtual seconds.

    step_s: mean of a turn; tokens_per_second: sampled, over all engines. engines_busy: share of the time in which an
    engine had work; engines_of_peak: tokens sampled, of those that engines with all slots filled would have;
    trainer_busy: share of the time in which it trained. ages: share of the groups trained, by the age of their oldest
    token in versions.
    waited: means of what a turn waited for, by metric name. totals: groups dropped, replaced and reissued, restarts and
    seconds without an engine, by metric name. steps: turns it is of.
    """

    staleness: int
    engines: int
    steps: int
    step_s: float
    tokens_per_second: float
    engines_busy: float
    engines_of_peak: float
    trainer_busy: float
    ages: dict[int, float]
    waited: Metrics
    totals: Metrics

    @property
    def steps_per_minute(self) -> float:
        return 60 / self.step_s

    @property
    def mean_age(self) -> float:
        return sum(age * share for age, share in self.ages.items())


def simulate(work: Workload, staleness: int, *, turns: int = 40) -> Outcome:
    """Run `turns` turns of the stage, after as many as it takes to fill the slots. The same workload gives the same
    outcome. Raises StalenessError as a real run would, which the loop rules out."""
    return run_virtually(_run(work, staleness, turns))


@dataclass
class _Marks:
    """What the parts had done when the counted turns began."""

    time: float = 0.0
    busy_s: float = 0.0
    tokens: float = 0.0
    laps: list[Metrics] = field(default_factory=list)


async def _run(work: Workload, staleness: int, turns: int) -> Outcome:
    clock = asyncio.get_running_loop().time
    fleet, trainer = SimulatedFleet(work), SimulatedTrainer(work)
    warm = staleness + 2
    # a stage's last turns hand no more prompts out: they come after those that are counted
    stage = _stage(work, staleness, warm + turns + staleness + 1, fleet, trainer)
    marks = _Marks()
    async with stage:
        await stage.start(0, {})
        for step in range(warm + turns):
            if step == warm:
                marks = _Marks(clock(), fleet.busy_s, fleet.tokens)
                trainer.ages, trainer.busy_s = Counter(), 0.0
            marks.laps.append(await stage.turn(step))
    seconds = clock() - marks.time
    outcome = Outcome(
        staleness=staleness,
        engines=work.engines,
        steps=turns,
        step_s=seconds / turns,
        tokens_per_second=(fleet.tokens - marks.tokens) / seconds,
        engines_busy=(fleet.busy_s - marks.busy_s) / (seconds * work.engines),
        engines_of_peak=(fleet.tokens - marks.tokens) / (seconds * work.engines * work.engine.peak),
        trainer_busy=trainer.busy_s / seconds,
        ages={age: count / (turns * work.groups) for age, count in sorted(trainer.ages.items())},
        waited={name: float(np.mean([lap[name] for lap in marks.laps])) for name in marks.laps[0] if _is_time(name)},
        totals={name: sum(lap.get(name, 0.0) for lap in marks.laps) for name in _SUMMED},
    )
    await fleet.close()
    return outcome


def _is_time(name: str) -> bool:
    return name.startswith("time/") and name != "time/engine_lost"


def _stage(work: Workload, staleness: int, total: int, fleet: SimulatedFleet, trainer: SimulatedTrainer) -> OnlineStage:
    token = np.zeros(1, dtype=np.int64)
    prompts = [PromptItem(number, token, 0) for number in range(4 * work.groups)]
    # of these parts the loop uses no more than they have
    other: Any = trainer
    folders: Any = NoFolders()
    log: Any = NoLog()
    scorer: Any = SimulatedScorer(work)
    return OnlineStage(
        OnlinePlan(
            stage_id=_STAGE,
            groups=work.groups,
            group_size=work.group_size,
            total=total,
            sampling=Sampling(),
            objectives=Objectives(),
            staleness=staleness,
            overdue=work.overdue,
            refill=work.refill,
        ),
        trainer=other,
        fleet=fleet,
        scorer=scorer,
        cursor=PromptCursor(prompts, work.seed, _STAGE, work.seed),
        publications=folders,
        log=log,
        decode=lambda ids: "",
        tell=lambda line: None,
    )
