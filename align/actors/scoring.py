"""Rewards behind the Scorer protocol: in this process (`LocalScorer`) or in Ray actors (`RayScorer`).

Both are thin: `rewards.pool.RewardPool` runs every plugin in killable processes of its own, and those die with the
process that holds the pool.

Of several reward actors each runs every plugin and scores its part of a call's groups, groups whole. Concurrency and
rate of a plugin are divided among them. An actor stops where its part alone spends the step's error budget; what all
have spent is added up here as their tables arrive, so that in sum no more fails than may. One that dies (its node is
lost) leaves its groups to the others; the last one's death ends the run.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray.exceptions import RayActorError

import rewards
from align import errors
from align.actors.cluster import answer, die_with_parent
from align.actors.plugins import align_errors, plugin_spec
from align.mediastore import described
from align.protocols import ErrorBudget, Failure, Group, ScoreTable
from align.recipe.schema import Reward
from align.stages.roles import REWARD_CPUS
from align.stages.scoring import MetricTotals
from rewards.budget import Budgets
from rewards.pool import PoolResult, RewardPool

log = logging.getLogger(__name__)


def samples_of(groups: Sequence[Group]) -> list[rewards.Sample]:
    """The completions of the groups in order, as plugins see them."""
    media = [tuple(described(medium) for medium in group.prompt.media) for group in groups]
    return [
        rewards.Sample(
            completion=completion.text,
            messages=group.prompt.messages,
            row=group.prompt.row,
            token_ids=completion.token_ids.tolist(),
            truncated=completion.truncated,
            group_id=group.prompt.group_id,
            sample_id=number,
            media=seen,
            policy_version=int(completion.versions[-1]) if completion.versions.size else -1,
        )
        for group, seen in zip(groups, media, strict=True)
        for number, completion in enumerate(group.completions)
    ]


def score_table(groups: Sequence[Group], result: PoolResult) -> ScoreTable:
    """The pool's result as the stages take it: f32[S, R] with NaN where missing, dropped groups by index."""
    scores = np.array([[np.nan if v is None else v for v in row] for row in result.scores], np.float64)
    dropped = set(result.dropped)
    return ScoreTable(
        objectives=result.objectives,
        scores=scores.reshape(len(result.scores), len(result.objectives)).astype(np.float32),
        kinds=result.kinds,
        failures=tuple(Failure(f.group_id, f.sample_id, f.plugin, f.cause, f.message) for f in result.failures),
        dropped=tuple(n for n, group in enumerate(groups) if group.prompt.group_id in dropped),
        metrics=result.metrics,
        infos=tuple(result.infos),
        counts=result.counts,
        series=result.series,
    )


def join_parts(groups: Sequence[Group], parts: Sequence[Sequence[int]], tables: Sequence[ScoreTable]) -> ScoreTable:
    """One table over all groups, in order, from tables over parts of them (indices of groups, none empty)."""
    if len(tables) == 1:
        return tables[0]
    ends = np.cumsum([len(group.completions) for group in groups])
    scores = np.empty((int(ends[-1]), len(tables[0].objectives)), np.float32)
    infos: list[Mapping[str, Any]] = [{}] * len(scores)
    totals = MetricTotals()
    for part, table in zip(parts, tables, strict=True):
        totals.add(replace(table, series={}))
        rows = [row for index in part for row in range(ends[index] - len(groups[index].completions), ends[index])]
        scores[rows] = table.scores
        for row, info in zip(rows, table.infos, strict=True):
            infos[row] = info
    series = {name for table in tables for name in table.series}
    return ScoreTable(
        tables[0].objectives,
        scores,
        tables[0].kinds,
        failures=tuple(failure for table in tables for failure in table.failures),
        dropped=tuple(sorted(part[n] for part, table in zip(parts, tables, strict=True) for n in table.dropped)),
        metrics=totals.metrics(),
        infos=tuple(infos),
        counts={name: sum(table.counts.get(name, 0.0) for table in tables) for name in totals.means},
        series={name: [n for table in tables for n in table.series.get(name, ())] for name in sorted(series)},
    )


class LocalScorer:
    """A Scorer in this process, for tests, `evaluate` on a laptop and other callers without Ray.

    Args:
        rewards: the recipe's. folder: the recipe's, where plugins are looked for. seed: the run's.
        log_folder: receives what plugins print, and failures.jsonl. cache: file of scores that runs share.
        share: of how many scorers, among which groups are divided, this is one.

    Raises (from `start` and `score`):
        PluginError: a plugin cannot be loaded. RewardError: one fails more often than it may.
    """

    def __init__(
        self,
        rewards: Sequence[Reward],
        folder: Path,
        *,
        seed: int,
        log_folder: Path | None = None,
        cache: Path | None = None,
        share: int = 1,
    ):
        specs = [plugin_spec(r) for r in rewards]
        self.pool = RewardPool(specs, folder, seed, log_folder=log_folder, cache=cache, share=share)

    async def start(self) -> list[dict[str, Any]]:
        """Start the plugins' processes; their descriptions."""
        with align_errors():
            return await self.pool.start()

    async def score(self, groups: Sequence[Group], budget: ErrorBudget | None = None) -> ScoreTable:
        with align_errors():
            shared = (budget.id, budget.samples) if budget else None
            return score_table(groups, await self.pool.score(samples_of(groups), shared))

    async def close(self) -> None:
        self.pool.close()


class RewardActor:
    """Lives in a Ray worker: a LocalScorer beyond the driver."""

    def __init__(self, rewards: tuple[Reward, ...], folder: Path, **options: Any):
        """options: LocalScorer's."""
        die_with_parent()
        self.scorer = LocalScorer(rewards, folder, **options)

    async def start(self) -> list[dict[str, Any]]:
        return await self.scorer.start()

    async def score(self, groups: Sequence[Group], budget: ErrorBudget | None = None) -> ScoreTable:
        return await self.scorer.score(groups, budget)

    async def close(self) -> None:
        await self.scorer.close()

    async def process(self) -> int:
        return os.getpid()


class RayScorer:
    """A Scorer whose plugins run below Ray actors.

    Args:
        rewards, folder, seed, log_folder, cache: as for LocalScorer; of several actors, the second and later write to
            a folder of their own in log_folder.
        placements: per actor its Ray options (num_cpus, scheduling_strategy...), `Places.at("rewards-0")`; default:
            one actor, 0.01 CPU anywhere.
    """

    def __init__(
        self,
        rewards: tuple[Reward, ...],
        folder: Path,
        *,
        seed: int,
        placements: Sequence[Mapping[str, Any]] = ({},),
        log_folder: Path | None = None,
        cache: Path | None = None,
    ):
        self.actors: list[Any] = []
        for number, placement in enumerate(placements):
            options: dict[str, Any] = {"num_cpus": REWARD_CPUS, **placement, "max_restarts": 0}
            logs = log_folder / str(number) if log_folder and number else log_folder
            actor = ray.remote(RewardActor).options(**options)
            given = {"seed": seed, "log_folder": logs, "cache": cache, "share": len(placements)}
            self.actors.append(actor.remote(rewards, folder, **given))
        self._busy = [0] * len(self.actors)  # samples that each is scoring
        self._dead: set[int] = set()
        self._budgets = Budgets()
        self._own_budgets = itertools.count(1)
        self._rates: dict[str, float] = {}

    async def start(self) -> list[dict[str, Any]]:
        """Start the plugins' processes; their descriptions. PluginError where one cannot be loaded."""
        starting = [answer(actor.start.remote(), "the reward actor") for actor in self.actors]
        described: list[dict[str, Any]] = (await asyncio.gather(*starting))[0]
        self._rates = {d["name"]: d["options"]["max_error_rate"] for d in described}
        return described

    async def processes(self) -> list[int]:
        """The actors' process ids."""
        return [await answer(actor.process.remote(), "the reward actor") for actor in self.actors]

    async def score(self, groups: Sequence[Group], budget: ErrorBudget | None = None) -> ScoreTable:
        parts = self._divide(groups)
        if len(self.actors) > 1:
            budget = budget or ErrorBudget(-next(self._own_budgets), sum(len(g.completions) for g in groups))
        used = [(actor, part) for actor, part in enumerate(parts) if part] or [(0, [])]
        calls = [
            asyncio.create_task(self._score_part(actor, [groups[n] for n in part], budget)) for actor, part in used
        ]
        try:
            tables = await asyncio.gather(*calls)
        finally:
            for call in calls:
                call.cancel()
            await asyncio.gather(*calls, return_exceptions=True)
        return join_parts(groups, [part for _, part in used], tables)

    def _divide(self, groups: Sequence[Group]) -> list[list[int]]:
        """Indices of groups for each actor: one by one to the actor that then has least to do."""
        parts: list[list[int]] = [[] for _ in self.actors]
        load = [math.inf if actor in self._dead else busy for actor, busy in enumerate(self._busy)]
        for index, group in enumerate(groups):
            actor = min(range(len(load)), key=load.__getitem__)
            parts[actor].append(index)
            load[actor] += len(group.completions)
        return parts

    async def _score_part(self, actor: int, groups: Sequence[Group], budget: ErrorBudget | None) -> ScoreTable:
        table = await self._on(actor, groups, budget)
        while table is None:
            [actor] = [n for n, part in enumerate(self._divide([groups[0]])) if part]
            table = await self._on(actor, groups, budget)
        if len(self.actors) > 1 and budget is not None and table.failures:
            if not self._rates:
                await self.start()  # it has long started: this asks for its plugins' options
            with align_errors():
                self._spend(budget, table.failures)
        return table

    async def _on(self, actor: int, groups: Sequence[Group], budget: ErrorBudget | None) -> ScoreTable | None:
        """Scores from one actor; None where it died and another is left."""
        samples = sum(len(group.completions) for group in groups)
        self._busy[actor] += samples
        try:
            table: ScoreTable = await answer(self.actors[actor].score.remote(groups, budget), "the reward actor")
        except errors.AlignError as error:
            if isinstance(error.__cause__, RayActorError):
                self._dead.add(actor)
            if actor not in self._dead or len(self._dead) == len(self.actors):
                raise
            log.warning("a reward actor died; its groups go to another: %s", error.what)
            return None
        finally:
            self._busy[actor] -= samples
        return table

    def _spend(self, budget: ErrorBudget, failures: Sequence[Failure]) -> None:
        """Add failures of one actor to those of all. Raises RewardError where they are too many."""
        spent = dict(zip(self._rates, self._budgets.of(budget.id, budget.samples, list(self._rates)), strict=True))
        seen: set[tuple[str, int, int]] = set()
        for f in failures:
            sample = (f.plugin, f.group_id, f.sample)
            shown = rewards.Failure(f.plugin, None, 0, f.group_id, f.sample, f.cause, f.message)
            spent[f.plugin].spend(shown, again=sample in seen)
            seen.add(sample)
        for name, rate in self._rates.items():
            spent[name].check(name, rate)

    async def close(self) -> None:
        """End the plugins, then the actors; plugins end with them even where they no longer answer."""
        for actor in self.actors:
            with contextlib.suppress(errors.AlignError):  # it may have died already
                await answer(actor.close.remote(), "the reward actor")
            ray.kill(actor)
