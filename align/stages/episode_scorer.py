"""Scores of episodes: what environments said of each, beside what rewards say; episodes that were lost have none. Of
several environments each has objectives of its own, which do not apply to the episodes of others."""

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
    """An environment as scores are concerned. name: for messages and metrics, and of several that by which rows choose
    it. objectives: names in order, and their kinds; none where its class has no `reward`. max_error_rate: share of a
    step's episodes that it may lose, or leave without a score. on_kill: scores, by objective, of an episode whose
    process was killed."""

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
    """A Scorer over groups of episodes. known: the stage's environments. inner: of the stage's rewards; None where the
    environments alone score.

    Raises RewardError (from `score`) where more episodes of a step stay without scores than may, and what inner raises.
    """

    def __init__(self, known: Sequence[Known], inner: Scorer | None, stage_id: str):
        self._known, self._inner, self._stage = {one.name: one for one in known}, inner, stage_id
        self._kinds = {name: kind for one in known for name, kind in zip(one.objectives, one.kinds, strict=True)}
        self._spent: dict[int, list[EpisodeLoss]] = {}

    async def score(self, groups: Sequence[Group], budget: ErrorBudget | None = None) -> ScoreTable:
        episodes = [(g.prompt.group_id, n, c) for g in groups for n, c in enumerate(g.completions)]
        losses = [
            EpisodeLoss.of(*one, self._of(one[2]).name) for one in episodes if episode_of(one[2]).failure is not None
        ]
        self._spend(budget, len(episodes), losses)
        own = self._own([completion for _, _, completion in episodes], losses)
        if self._inner is None:
            return own
        played = [replace(g, completions=tuple(c for c in g.completions if is_played(c))) for g in groups]
        table = await self._inner.score([g for g in played if g.completions], budget)
        return beside(own, table, groups, played)

    def _of(self, completion: Completion) -> Known:
        """The environment of an episode."""
        if len(self._known) == 1:
            return next(iter(self._known.values()))
        return self._known[episode_of(completion).environment]

    def _spend(self, budget: ErrorBudget | None, episodes: int, losses: Sequence[EpisodeLoss]) -> None:
        if budget is not None:  # of steps long past nobody asks again
            self._spent = {key: value for key, value in self._spent.items() if key > budget.id - 64}
        spent = self._spent.setdefault(budget.id, []) if budget else []
        spent += losses
        samples = budget.samples if budget else episodes
        for known in self._known.values():
            own, rate = [loss for loss in spent if loss.environment == known.name], known.max_error_rate
            allowed = max(1, int(rate * samples + 1e-9)) if rate else 0
            if len(own) <= allowed:
                continue
            shown = "\n".join(f"     {loss.words}" for loss in own[:_SHOWN])
            raise RewardError(
                f"{len(own)} of {samples} episodes of the environment {known.name} were lost or have no score, "
                f"more than max_error_rate = {rate:g} allows ({allowed}):\n{shown}",
                where=f"stage {self._stage!r}",
                remedy="mend the environment (`align env try` plays it), or raise environment.max_error_rate",
            )

    def _own(self, completions: Sequence[Completion], losses: Sequence[EpisodeLoss]) -> ScoreTable:
        scores = np.array([[self._value(c, name) for name in self._kinds] for c in completions], np.float32)
        metrics, counts = self._counted(completions, losses)
        series: dict[str, list[float]] = {}
        for episode in (episode_of(c) for c in completions if is_played(c)):
            for tool, seconds in episode.seconds.items():
                series.setdefault(f"episode/{tool}/latency", []).extend(seconds)
        notes = {f"{one.environment}/lost": f"environment {one.environment}: {one.words}" for one in losses[::-1]}
        infos = [(self._of(c).name, episode_of(c).infos) for c in completions]
        return ScoreTable(
            tuple(self._kinds),
            scores.reshape(len(completions), len(self._kinds)),
            tuple(self._kinds.values()),
            failures=tuple(loss.failure() for loss in losses),
            metrics=metrics,
            infos=tuple({name: dict(noted)} if noted else {} for name, noted in infos),
            counts=counts,
            series=series,
            notes=notes,
        )

    def _counted(
        self, completions: Sequence[Completion], losses: Sequence[EpisodeLoss]
    ) -> tuple[dict[str, float], dict[str, float]]:
        """Metrics of all episodes, and of several environments those of each too; and of how many numbers a mean is."""
        metrics, counts = _metrics("episode", completions, losses)
        if len(self._known) > 1:
            for name in self._known:
                own = [c for c in completions if self._of(c).name == name]
                more = _metrics(f"episode/{name}", own, [loss for loss in losses if loss.environment == name])
                metrics, counts = metrics | {f"episode/{name}/episodes": float(len(own))} | more[0], counts | more[1]
        return metrics, counts

    def _value(self, completion: Completion, name: str) -> float:
        episode = episode_of(completion)
        value = (self._of(completion).on_kill if episode.killed else episode.scores).get(name)
        return float("nan") if value is None else float(value)

    async def close(self) -> None:
        if self._inner is not None:
            await self._inner.close()


def _metrics(
    prefix: str, completions: Sequence[Completion], losses: Sequence[EpisodeLoss]
) -> tuple[dict[str, float], dict[str, float]]:
    """(metrics, of how many numbers those are that are means)."""
    played = [episode_of(c) for c in completions if is_played(c)]
    metrics = {f"{prefix}/lost": float(len(completions) - len(played)), f"{prefix}/unscored": float(len(losses))}
    counts: dict[str, float] = {}
    for name in dict.fromkeys(name for episode in played for name in episode.counts):
        found = [episode.counts[name] for episode in played if name in episode.counts]
        metrics[f"{prefix}/{name}"] = float(np.mean(found))
        counts[f"{prefix}/{name}"] = float(len(found))
    return metrics, counts


@dataclass(frozen=True)
class EpisodeLoss:
    """An episode of an environment without the scores that it owed."""

    group_id: int
    sample: int
    environment: str
    cause: str
    message: str

    @staticmethod
    def of(group_id: int, sample: int, completion: Completion, environment: str) -> EpisodeLoss:
        failure = episode_of(completion).failure
        assert failure is not None
        return EpisodeLoss(group_id, sample, environment, failure.cause, failure.message)

    @property
    def words(self) -> str:
        return f"group {self.group_id}, episode {self.sample}: {self.cause}: {self.message}"

    def failure(self) -> Failure:
        return Failure(self.group_id, self.sample, self.environment, self.cause, self.message)


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
