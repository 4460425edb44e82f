"""Rewards behind the Scorer protocol: in this process (`LocalScorer`) or in a Ray actor (`RayScorer`).

Both are thin: `rewards.pool.RewardPool` runs every plugin in a killable process of its own, and those die with the
process that holds the pool.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import ray

import rewards
from align import errors
from align.actors.cluster import answer, die_with_parent
from align.protocols import ErrorBudget, Failure, Group, ScoreTable
from align.recipe.schema import Reward
from align.stages.roles import REWARD_CPUS
from rewards.plugin import OVERRIDES, PluginSpec
from rewards.pool import PoolResult, RewardPool


def plugin_spec(reward: Reward) -> PluginSpec:
    """A recipe's reward as the pool takes it; options that the recipe leaves out are the decorator's."""
    options = {name: getattr(reward, name) for name in OVERRIDES if getattr(reward, name) is not None}
    return PluginSpec(reward.use, reward.as_, dict(reward.args), options, reward.signature)


def samples_of(groups: Sequence[Group]) -> list[rewards.Sample]:
    """The completions of the groups in order, as plugins see them."""
    return [
        rewards.Sample(
            completion=completion.text,
            messages=group.prompt.messages,
            row=group.prompt.row,
            token_ids=completion.token_ids.tolist(),
            truncated=completion.truncated,
            group_id=group.prompt.group_id,
            sample_id=number,
            policy_version=int(completion.versions[-1]) if completion.versions.size else -1,
        )
        for group in groups
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
    )


@contextlib.contextmanager
def align_errors() -> Iterator[None]:
    """Errors of the rewards package, which knows nothing of align, as ours."""
    try:
        yield
    except rewards.RewardError as error:
        raise errors.RewardError(error.what, where=error.where, remedy=error.remedy) from error
    except rewards.PluginError as error:
        raise errors.PluginError(error.what, where=error.where, remedy=error.remedy) from error


class LocalScorer:
    """A Scorer in this process, for tests, `evaluate` on a laptop and other callers without Ray.

    Args:
        rewards: the recipe's. folder: the recipe's, where plugins are looked for. seed: the run's.
        log_folder: receives what plugins print, and failures.jsonl.

    Raises (from `start` and `score`):
        PluginError: a plugin cannot be loaded. RewardError: one fails more often than it may.
    """

    def __init__(self, rewards: Sequence[Reward], folder: Path, *, seed: int, log_folder: Path | None = None):
        self.pool = RewardPool([plugin_spec(r) for r in rewards], folder, seed, log_folder=log_folder)

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

    def __init__(self, rewards: tuple[Reward, ...], folder: str, seed: int, log_folder: str | None):
        die_with_parent()
        logs = None if log_folder is None else Path(log_folder)
        self.scorer = LocalScorer(rewards, Path(folder), seed=seed, log_folder=logs)

    async def start(self) -> list[dict[str, Any]]:
        return await self.scorer.start()

    async def score(self, groups: Sequence[Group], budget: ErrorBudget | None = None) -> ScoreTable:
        return await self.scorer.score(groups, budget)

    async def close(self) -> None:
        await self.scorer.close()

    async def process(self) -> int:
        return os.getpid()


class RayScorer:
    """A Scorer whose plugins run below a Ray actor.

    Args:
        rewards, folder, seed, log_folder: as for LocalScorer.
        placement: Ray options of the actor (num_cpus, scheduling_strategy...), `Places.at("rewards")`; None: 0.01 CPU
            anywhere.
    """

    def __init__(
        self,
        rewards: tuple[Reward, ...],
        folder: Path,
        *,
        seed: int,
        placement: Mapping[str, Any] | None = None,
        log_folder: Path | None = None,
    ):
        options: dict[str, Any] = {"num_cpus": REWARD_CPUS, **(placement or {}), "max_restarts": 0}
        logs = None if log_folder is None else str(log_folder)
        self.actor: Any = ray.remote(RewardActor).options(**options).remote(rewards, str(folder), seed, logs)

    async def start(self) -> list[dict[str, Any]]:
        """Start the plugins' processes; their descriptions. PluginError where one cannot be loaded."""
        described: list[dict[str, Any]] = await answer(self.actor.start.remote(), "the reward actor")
        return described

    async def process(self) -> int:
        """The actor's process id."""
        pid: int = await answer(self.actor.process.remote(), "the reward actor")
        return pid

    async def score(self, groups: Sequence[Group], budget: ErrorBudget | None = None) -> ScoreTable:
        table: ScoreTable = await answer(self.actor.score.remote(groups, budget), "the reward actor")
        return table

    async def close(self) -> None:
        """End the plugins, then the actor; plugins end with it even where it no longer answers."""
        with contextlib.suppress(errors.AlignError):  # it may have died already
            await answer(self.actor.close.remote(), "the reward actor")
        ray.kill(self.actor)
