"""Rewards below Ray actors, behind the Scorer protocol.

Of several reward actors each runs every plugin and scores its part of a call's groups, groups whole. Concurrency and
rate of a plugin are divided among them. An actor stops where its part alone spends the step's error budget; what all
have spent is added up here as their tables arrive, so that in sum no more fails than may. One that dies (its node is
lost) leaves its groups to the others and is started again, on another node where its own is gone; where it was the only
one, its groups wait for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import ray

import rewards
from align import errors
from align.actors.cluster import answer, die_with_parent
from align.actors.plugins import align_errors
from align.actors.scoring import LocalScorer, join_parts
from align.protocols.fleet import Group
from align.protocols.scorer import ErrorBudget, Failure, ScoreTable
from align.recipe.parts import Reward
from align.shared_files import require_shared, source_here
from align.stages.roles import REWARD_CPUS
from rewards.budget import Budgets

log = logging.getLogger(__name__)
WHO = "the reward actor"


class RewardActor:
    """Lives in a Ray worker: a LocalScorer beyond the driver."""

    def __init__(self, rewards: tuple[Reward, ...], folder: Path, token: Path | None = None, **options: Any):
        """token: see `require_shared`; beside it lie the sources of plugins. options: LocalScorer's."""
        die_with_parent()
        self.token = token
        if token is not None:
            rewards = tuple(r.model_copy(update={"use": source_here(r.use, token.parent)}) for r in rewards)
            folder = Path(source_here(str(folder), token.parent))
        self.scorer = LocalScorer(rewards, folder, **options)

    async def start(self) -> list[dict[str, Any]]:
        if self.token is not None:
            require_shared(self.token)
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
        token: a file of the run folder that an actor's node must see.
        replacement_s: until an actor that was lost must have started again. restarts: of one actor, in a row without a
            finished call between them, before it is given up.
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
        token: Path | None = None,
        replacement_s: float = 240.0,
        restarts: int = 3,
    ):
        self._makers: list[Callable[[], Any]] = []
        for number, placement in enumerate(placements):
            options: dict[str, Any] = {"num_cpus": REWARD_CPUS, **placement, "max_restarts": 0}
            logs = log_folder / str(number) if log_folder and number else log_folder
            actor = ray.remote(RewardActor).options(**options)
            given = {"seed": seed, "log_folder": logs, "cache": cache, "share": len(placements)}
            self._makers.append(partial(actor.remote, rewards, folder, token, **given))
        self.actors = [make() for make in self._makers]
        self.replacement_s, self.restarts = replacement_s, restarts
        self._busy = [0] * len(self.actors)  # samples that each is scoring
        self._losses = [0] * len(self.actors)  # of each, in a row
        self._away: dict[int, asyncio.Task[None]] = {}  # lost, and being started again; given up where it has failed
        self._restarted = 0  # since the last table
        self._budgets = Budgets()
        self._own_budgets = itertools.count(1)
        self._rates: dict[str, float] = {}
        self._by_group: set[str] = set()  # plugins whose groups fail as a whole

    async def start(self) -> list[dict[str, Any]]:
        """Start the plugins' processes; their descriptions. PluginError where one cannot be loaded."""
        starting = [answer(actor.start.remote(), WHO) for actor in self.actors]
        described: list[dict[str, Any]] = (await asyncio.gather(*starting))[0]
        self._note(described)
        return described

    def _note(self, described: Sequence[Mapping[str, Any]]) -> None:
        self._rates = {d["name"]: d["options"]["max_error_rate"] for d in described}
        self._by_group = {d["name"] for d in described if d["scope"] != "sample"}

    async def processes(self) -> list[int]:
        """The actors' process ids."""
        return [await answer(actor.process.remote(), WHO) for actor in self.actors]

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
        table = join_parts(groups, [part for _, part in used], tables)
        restarted, self._restarted = self._restarted, 0
        return replace(table, metrics={**table.metrics, "reward/restarts": float(restarted)})

    def _divide(self, groups: Sequence[Group]) -> list[list[int]]:
        """Indices of groups for each actor: one by one to the actor that then has least to do."""
        parts: list[list[int]] = [[] for _ in self.actors]
        load = [math.inf if actor in self._away else busy for actor, busy in enumerate(self._busy)]
        for index, group in enumerate(groups):
            actor = min(range(len(load)), key=load.__getitem__)
            parts[actor].append(index)
            load[actor] += len(group.completions)
        return parts

    async def _score_part(self, actor: int, groups: Sequence[Group], budget: ErrorBudget | None) -> ScoreTable:
        table = None
        while table is None:
            if actor in self._away:
                actor = await self._present()
            table = await self._on(actor, groups, budget)
        if len(self.actors) > 1 and budget is not None and table.failures:
            if not self._rates:  # it has long started: this asks for its plugins' options
                self._note(await answer(self.actors[actor].start.remote(), WHO))
            with align_errors():
                self._spend(budget, table.failures, max(len(group.completions) for group in groups))
        return table

    async def _on(self, number: int, groups: Sequence[Group], budget: ErrorBudget | None) -> ScoreTable | None:
        """Scores from one actor; None where it was lost."""
        samples, actor = sum(len(group.completions) for group in groups), self.actors[number]
        self._busy[number] += samples
        try:
            table: ScoreTable = await answer(actor.score.remote(groups, budget), WHO)
        except errors.LostError as lost:
            if actor is self.actors[number] and number not in self._away:  # else another call has seen to it
                self._away[number] = asyncio.create_task(self._restart(number, lost))
                self._away[number].add_done_callback(_retrieved)
            return None
        finally:
            self._busy[number] -= samples
        self._losses[number] = 0
        return table

    # ------------------------------------------------------------------------------------------ actors that are lost

    async def _restart(self, number: int, lost: errors.LostError) -> None:
        """Start an actor again in its place; Ray has another node for it, or waits for one.

        Raises LostError where it was lost too often, AlignError where it has no place or a plugin does not load there.
        """
        while True:
            self._losses[number] += 1
            if self._losses[number] > self.restarts:
                again = f"; it was restarted {self.restarts} times without finishing a call" if self.restarts else ""
                raise errors.LostError(f"{lost.what}{again}", where=lost.where, remedy=lost.remedy) from lost
            log.warning("a reward actor was lost, its groups go to another or wait for it: %s", lost.what)
            ray.kill(self.actors[number])
            self.actors[number] = self._makers[number]()
            self._restarted += 1
            try:
                async with asyncio.timeout(self.replacement_s):
                    await answer(self.actors[number].start.remote(), WHO)
            except TimeoutError:
                raise errors.AlignError(
                    f"{WHO} was lost, and has not started again within {self.replacement_s:g} s",
                    remedy="--resume continues once the cluster has its nodes again; placement.replacement_s waits "
                    "longer",
                ) from lost
            except errors.LostError as another:
                lost = another
            else:
                del self._away[number]
                return

    async def _present(self) -> int:
        """The actor with least to do of those that are there; where all are away, the first that is back.

        Raises what keeps the first from coming back, where none will."""
        while len(self._away) == len(self.actors):
            returning = [task for task in self._away.values() if not task.done()]
            if not returning:
                next(iter(self._away.values())).result()
            await asyncio.wait(returning, return_when=asyncio.FIRST_COMPLETED)
        return min((n for n in range(len(self.actors)) if n not in self._away), key=self._busy.__getitem__)

    def _spend(self, budget: ErrorBudget, failures: Sequence[Failure], group_size: int) -> None:
        """Add failures of one actor to those of all. Raises RewardError where they are too many."""
        spent = dict(zip(self._rates, self._budgets.of(budget.id, budget.samples, list(self._rates)), strict=True))
        for name in self._by_group:
            spent[name].unit = max(spent[name].unit, group_size)
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
        for task in self._away.values():
            task.cancel()
        for number, actor in enumerate(self.actors):
            if number not in self._away:
                with contextlib.suppress(errors.AlignError):  # it may have died already
                    await answer(actor.close.remote(), WHO)
            ray.kill(actor)


def _retrieved(task: asyncio.Task[None]) -> None:
    """Mark an exception as seen: as long as another actor is there, nobody asks for it."""
    if not task.cancelled():
        task.exception()
