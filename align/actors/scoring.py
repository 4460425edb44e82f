"""Rewards behind the Scorer protocol, in this process: a thin shell around `rewards.pool.RewardPool`, which runs every
plugin in killable processes of its own; those die with the process that holds the pool."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

import rewards
from align.actors.plugins import align_errors, plugin_spec
from align.mediastore import described
from align.protocols.fleet import Completion, Group
from align.protocols.scorer import ErrorBudget, Failure, ScoreTable
from align.recipe.parts import Reward
from align.stages.scoring import MetricTotals
from rewards.api import FailedCall
from rewards.pool import PoolResult, RewardPool


def samples_of(groups: Sequence[Group]) -> list[rewards.Sample]:
    """The completions of the groups in order, as plugins see them."""
    return [
        rewards.Sample(
            completion=completion.text,
            messages=group.prompt.messages,
            row=group.prompt.row,
            token_ids=completion.sampled_ids.tolist(),
            truncated=completion.truncated,
            group_id=group.prompt.group_id,
            sample_id=number,
            media=(*shared, *map(described, completion.media)) if completion.media else shared,
            policy_version=newest_version(completion),
            raw=completion.raw,
            turns=completion.episode.turns if completion.episode else (),
            state=completion.episode.state if completion.episode else None,
        )
        for group in groups
        for shared in [tuple(map(described, group.prompt.media))]
        for number, completion in enumerate(group.completions)
    ]


def newest_version(completion: Completion) -> int:
    """The version that sampled the last token; -1 of an answer that a row brought, and of an episode that was lost."""
    versions = completion.sampled_versions
    return int(versions[-1]) if versions.size else -1


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
        notes=failed_call_notes(result.failed_calls),
    )


def failed_call_notes(calls: Sequence[FailedCall]) -> dict[str, str]:
    """Per plugin one line about the first call that gave no scores."""
    first = {call.plugin: call for call in reversed(calls)}
    return {
        f"{name}/failed_calls": f"reward {name}: a call of {call.samples} samples failed ({call.cause}: "
        f"{call.message}); asked again: {call.again}. failed-calls.jsonl in the stage's rewards/ has all of them, "
        f"reward/{name}/failed_calls their number"
        for name, call in first.items()
    }


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
        notes={name: note for table in reversed(tables) for name, note in table.notes.items()},
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
