"""Scores of episodes: what an environment said of each, beside what rewards say; episodes that were lost have none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from align.episodes.describe import scores_of_killed
from align.errors import RewardError
from align.protocols.fleet import Completion, Episode, Group
from align.protocols.scorer import ErrorBudget, Failure, Scorer, ScoreTable

_SHOWN = 3  # errors in a message


@dataclass(frozen=True)
class Known:
    """An environment as scores are concerned. name: for messages and metrics. objectives: names in order, and their
    kinds; none where its class has no `reward`. max_error_rate: share of a step's episodes that may be lost or stay
    without a score. on_kill: scores, by objective, of an episode whose process was killed."""

    name: str
    objectives: tuple[str, ...]
    kinds: tuple[str, ...]
    max_error_rate: float
    on_kill: Mapping[str, float] = field(default_factory=dict)

    @staticmethod
    def of(rules: Any, description: Mapping[str, Any]) -> Known:
        """rules: `align.recipe.environment.Environment`; description: of `align.episodes.describe`."""
        offered = description["objectives"]
        kinds = tuple(one["kind"] for one in offered.values())
        return Known(
            description["name"], tuple(offered), kinds, rules.max_error_rate, scores_of_killed(rules, description)
        )


class EpisodeScorer:
    """A Scorer over groups of episodes. inner: of the stage's rewards; None where the environment alone scores.

    Raises RewardError (from `score`) where more episodes of a step stay without scores than may, and what inner raises.
    """

    def __init__(self, known: Known, inner: Scorer | None, stage_id: str):
        self.known, self._inner, self._stage = known, inner, stage_id
        self._spent: dict[int, list[EpisodeLoss]] = {}

    async def score(self, groups: Sequence[Group], budget: ErrorBudget | None = None) -> ScoreTable:
        episodes = [(g.prompt.group_id, n, c) for g in groups for n, c in enumerate(g.completions)]
        losses = [EpisodeLoss.of(*one) for one in episodes if episode_of(one[2]).failure is not None]
        self._spend(budget, len(episodes), losses)
        own = self._own([completion for _, _, completion in episodes], losses)
        if self._inner is None:
            return own
        played = [replace(g, completions=tuple(c for c in g.completions if is_played(c))) for g in groups]
        table = await self._inner.score([g for g in played if g.completions], budget)
        return beside(own, table, groups, played)

    def _spend(self, budget: ErrorBudget | None, episodes: int, losses: Sequence[EpisodeLoss]) -> None:
        if budget is not None:  # of steps long past nobody asks again
            self._spent = {key: value for key, value in self._spent.items() if key > budget.id - 64}
        spent = self._spent.setdefault(budget.id, []) if budget else []
        spent += losses
        samples, rate = (budget.samples if budget else episodes), self.known.max_error_rate
        allowed = max(1, int(rate * samples + 1e-9)) if rate else 0
        if len(spent) > allowed:
            shown = "\n".join(f"     {loss.words}" for loss in spent[:_SHOWN])
            raise RewardError(
                f"{len(spent)} of {samples} episodes of the environment {self.known.name} were lost or have no score, "
                f"more than max_error_rate = {rate:g} allows ({allowed}):\n{shown}",
                where=f"stage {self._stage!r}",
                remedy="mend the environment (`align env try` plays it), or raise environment.max_error_rate",
            )

    def _own(self, completions: Sequence[Completion], losses: Sequence[EpisodeLoss]) -> ScoreTable:
        known = self.known
        scores = np.array([[self._value(c, name) for name in known.objectives] for c in completions], np.float32)
        played = [episode_of(c) for c in completions if is_played(c)]
        metrics = {"episode/lost": float(len(completions) - len(played)), "episode/unscored": float(len(losses))}
        counts: dict[str, float] = {}
        for name in dict.fromkeys(name for episode in played for name in episode.counts):
            metrics[f"episode/{name}"] = float(np.mean([episode.counts[name] for episode in played]))
            counts[f"episode/{name}"] = float(len(played))
        series: dict[str, list[float]] = {}
        for episode in played:
            for tool, seconds in episode.seconds.items():
                series.setdefault(f"episode/{tool}/latency", []).extend(seconds)
        notes = {f"{known.name}/lost": f"environment {known.name}: {losses[0].words}"} if losses else {}
        infos = tuple({known.name: dict(i)} if (i := episode_of(c).infos) else {} for c in completions)
        return ScoreTable(
            known.objectives,
            scores.reshape(len(completions), len(known.objectives)),
            known.kinds,
            failures=tuple(loss.failure(known.name) for loss in losses),
            metrics=metrics,
            infos=infos,
            counts=counts,
            series=series,
            notes=notes,
        )

    def _value(self, completion: Completion, name: str) -> float:
        episode = episode_of(completion)
        value = (self.known.on_kill if episode.killed else episode.scores).get(name)
        return float("nan") if value is None else float(value)

    async def close(self) -> None:
        if self._inner is not None:
            await self._inner.close()


@dataclass(frozen=True)
class EpisodeLoss:
    """An episode without the scores that it owed."""

    group_id: int
    sample: int
    cause: str
    message: str

    @staticmethod
    def of(group_id: int, sample: int, completion: Completion) -> EpisodeLoss:
        failure = episode_of(completion).failure
        assert failure is not None
        return EpisodeLoss(group_id, sample, failure.cause, failure.message)

    @property
    def words(self) -> str:
        return f"group {self.group_id}, episode {self.sample}: {self.cause}: {self.message}"

    def failure(self, name: str) -> Failure:
        return Failure(self.group_id, self.sample, name, self.cause, self.message)


def episode_of(completion: Completion) -> Episode:
    assert completion.episode is not None, "engines of a stage with an environment give episodes"
    return completion.episode


def is_played(completion: Completion) -> bool:
    """Whether there is anything of the episode to judge."""
    return not completion.lost


def beside(own: ScoreTable, table: ScoreTable, groups: Sequence[Group], played: Sequence[Group]) -> ScoreTable:
    """Both tables as one: scores of rewards stand at the episodes that were played, and are missing at the others."""
    at = [is_played(completion) for group in groups for completion in group.completions]
    scores = np.full((len(at), len(table.objectives)), np.nan, np.float32)
    scores[np.array(at, bool)] = table.scores
    infos = iter(table.infos or [{}] * len(table.scores))
    places = [n for n, group in enumerate(played) if group.completions]
    numbers = {group.prompt.group_id: [n for n, c in enumerate(group.completions) if is_played(c)] for group in groups}
    failures = [replace(f, sample=numbers[f.group_id][f.sample]) for f in table.failures]
    return replace(
        own,
        objectives=(*own.objectives, *table.objectives),
        scores=np.concatenate([own.scores, scores], axis=1),
        kinds=(*own.kinds, *table.kinds),
        failures=(*own.failures, *failures),
        dropped=tuple(places[n] for n in table.dropped),
        metrics={**own.metrics, **table.metrics},
        infos=tuple({**info, **(next(infos) if there else {})} for info, there in zip(own.infos, at, strict=True)),
        counts={**own.counts, **table.counts},
        series={**own.series, **table.series},
        notes={**own.notes, **table.notes},
    )
