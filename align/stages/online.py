"""Online stages: one loop, and staleness is an integer in it.

    admit prompts -> generate -> score -> advantage -> trees -> step -> publish -> (loop)

A turn fills the free slots of the buffer with prompts, waits for its groups, sorted by id, trains on them, and ends
with a publish; its version is the number of turns done. Sampling and scoring go on in the background while the trainer
steps. With `staleness: 0` there are slots for one turn's groups, and each is held until the publish: prompts are
sampled by the version that trains on them, exactly on-policy. With S there are S more turns' groups on their way.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np

from align.objectives import combine
from align.protocols.fleet import Fleet, Group, PromptItem
from align.protocols.scorer import Scorer, ScoreTable
from align.protocols.trainer import Metrics, Publication, Trainer
from align.protocols.trees import Tree
from align.recipe.objectives import Objectives
from align.stages.background import Background
from align.stages.buffer import check_age
from align.stages.groups import (
    PromptCursor,
    carries_signal,
    group_ids,
    group_metrics,
    penalise_truncated,
    to_trees,
    untrained,
)
from align.stages.monitor import Monitor
from align.stages.publication import PublicationFolder
from align.stages.rollout_log import RolloutLog
from align.stages.row_weights import by_prompt
from align.stages.scoring import join_tables
from align.stages.supply import Scored, Supply, SupplyPlan
from align.stages.updates import UpdatePlan, Updates


@dataclass(frozen=True, kw_only=True)
class OnlinePlan(SupplyPlan):
    """The numbers of an online stage: how groups are come by, how many turns there are, and how scores become
    advantages."""

    total: int
    objectives: Objectives
    truncated: Literal["mask", "keep", "penalise"] = "mask"
    truncated_penalty: float = 0.0
    updates: UpdatePlan = field(default_factory=UpdatePlan)


@dataclass(frozen=True)
class _Batch:
    """A turn's trees, and of each completion its advantage f32[S] and whether it is trained bool[S]; metrics of it."""

    trees: list[Tree]
    advantages: np.ndarray
    trained: np.ndarray
    metrics: Metrics


class OnlineStage:
    """One online stage's turns over a Trainer, a Fleet and a Scorer, inside `async with`: what runs in the background
    is ended with the block, and an error there ends the block at once, as itself.

    start(state) publishes the policy the stage begins with; turn(k) is one turn of the loop; extra() is the JSON
    state a checkpoint must hold; evaluate() samples greedily from the fleet. tell: receives lines for the user.
    """

    def __init__(
        self,
        plan: OnlinePlan,
        *,
        trainer: Trainer,
        fleet: Fleet,
        scorer: Scorer,
        cursor: PromptCursor,
        publications: PublicationFolder,
        log: RolloutLog,
        decode: Callable[[np.ndarray], str],
        tell: Callable[[str], None],
        monitor: Monitor | None = None,
    ):
        self.plan, self.trainer, self.fleet = plan, trainer, fleet
        self.publications, self.log, self.decode, self.monitor = publications, log, decode, monitor
        self.updates = Updates(trainer, plan.updates)
        self.objective_state: dict[str, Any] = {}
        self._background = Background()
        self.supply = Supply(
            plan,
            fleet=fleet,
            scorer=scorer,
            cursor=cursor,
            background=self._background,
            has_signal=self._has_signal,
            tell=tell,
        )

    async def __aenter__(self) -> Self:
        await self._background.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.monitor is not None:
            await self.monitor.close()
        await self._background.__aexit__(kind, error, traceback)

    async def start(self, step: int, extra: Mapping[str, Any]) -> None:
        """Take up the state of a checkpoint (step 0 and {}: a fresh stage) and bring the engines to the policy."""
        if extra:
            self.supply.restore(extra["admission"])
            self.objective_state = dict(extra["objectives"])
        self.log.cut_back(step)
        await self._publish(step)

    def extra(self) -> dict[str, Any]:
        self.log.close_file()  # what a checkpoint covers must be readable
        return {"admission": self.supply.to_json(), "objectives": self.objective_state}

    async def turn(self, step: int) -> Metrics:
        clock = _Clock()
        # not before the turn: an evaluation or a checkpoint between two turns would share the engines with it
        self.supply.admit(self._still_wanted(step))
        taken = await self._take(step)
        waited = clock.split(taken)
        batch = self._batch(taken, step)
        watched = {} if self.monitor is None else await self.monitor.difference()
        clock.lap("time/prepare")
        trained = await self.updates.train(batch.trees, step=step, total=self.plan.total)
        clock.lap("time/train")
        published = await self._publish(step + 1)
        clock.lap("time/publish")
        replaced, supplied = self.supply.take_turn()
        self._log(step + 1, [*taken, *replaced], batch)
        clock.lap("time/log")
        generated = batch.metrics["tokens/generated"] + supplied.get("tokens/discarded", 0.0)
        return {
            **self.fleet.metrics(),
            **batch.metrics,
            "tokens/generated": generated,
            **supplied,
            **trained,
            **published,
            **watched,
            **waited,
            **clock.laps,
        }

    async def _take(self, step: int) -> list[Scored]:
        """The groups of a turn, by id. Raises StalenessError where one is older than the recipe allows."""
        slots = await self.supply.take(step)
        for slot in slots:
            assert slot.result is not None, "a slot that is taken was scored"
            check_age(step, _oldest(slot.result.group, slot.version), self.plan.staleness, slot.group_id)
        return [slot.result for slot in slots if slot.result is not None]

    def _batch(self, taken: Sequence[Scored], step: int) -> _Batch:
        """From scored groups to what the trainer is given."""
        groups = [scored.group for scored in taken]
        table = join_tables([scored.table for scored in taken], self.supply.scoring.take_metrics())
        advantages, objective_metrics = self.advantages(groups, table, step)
        masked = untrained(groups, table, self.plan.truncated)
        trees = to_trees(groups, advantages * by_prompt(groups), masked)
        counts = group_metrics(groups, advantages, masked, version=step)
        metrics = {**counts, **table.metrics, **objective_metrics}
        return _Batch(trees, advantages, np.isfinite(advantages) & ~masked, metrics)

    def _still_wanted(self, step: int) -> int:
        """Groups that turns from `step` to the last take, and that nobody has asked for yet."""
        return (self.plan.total - step) * self.plan.groups - len(self.supply.buffer.waiting)

    def advantages(self, groups: Sequence[Group], table: ScoreTable, step: int) -> tuple[np.ndarray, Metrics]:
        """Advantages f32[S]; NaN for a dropped group and where no objective is known."""
        objectives = self.plan.objectives
        if self.plan.truncated == "penalise":
            table, objectives = penalise_truncated(groups, table, objectives, self.plan.truncated_penalty)
        ids = group_ids(groups)
        assert table.scores.shape == (len(ids), len(table.objectives))
        advantages, self.objective_state, metrics = combine(
            table.scores, ids, table.objectives, table.kinds, objectives, self.objective_state, step
        )
        return advantages, metrics

    def _has_signal(self, group: Group, table: ScoreTable) -> bool:
        plan, state, step = self.plan, self.objective_state, self.supply.version
        return carries_signal(group, table, plan.objectives, plan.truncated, plan.truncated_penalty, state, step)

    def _log(self, step: int, scored: Sequence[Scored], batch: _Batch) -> None:
        """Write the turn's groups, and after them those that were replaced, which have no advantage."""
        table = join_tables([one.table for one in scored], {})
        more = len(table.scores) - len(batch.advantages)
        advantages = np.concatenate([batch.advantages, np.full(more, np.nan, dtype=np.float32)])
        trained = np.concatenate([batch.trained, np.zeros(more, dtype=bool)])
        groups = [one.group for one in scored]
        self.log.add(step, groups, [self.decode(g.prompt.token_ids) for g in groups], table, advantages, trained)

    async def evaluate(self, prompts: Sequence[PromptItem], scorer: Scorer) -> Metrics:
        """Greedy completions of `prompts` from the engines' current version, scored; names "eval/..."."""
        sampling = replace(self.plan.sampling, temperature=0.0)
        groups = await self.fleet.generate(prompts, 1, sampling)
        table = await scorer.score(groups)
        return {f"eval/{name}": value for name, value in greedy_metrics(groups, table).items()}

    async def _publish(self, version: int) -> Metrics:
        folder = self.publications.folder(self.plan.stage_id, version)
        publication: Publication = await self.trainer.publish(folder, version)
        metrics = await self.fleet.publish(publication)
        self.supply.published(version)
        self.publications.supersede(folder)
        if self.monitor is not None and version < self.plan.total:
            await self.monitor.published(version)
        return metrics


_TROUBLES = ("/error_rate", "/failed_calls", "/stripped")  # of a reward


def greedy_metrics(groups: Sequence[Group], table: ScoreTable) -> Metrics:
    """Means over greedy completions: each objective by name, accuracy, mean_length in tokens, shares.

    accuracy is the objective of that name, else the first one; a missing score is left out of its mean, and a mean of
    nothing is left out of the result. Of rewards that failed, how often.
    """
    completions = [c for group in groups for c in group.completions]
    drawn = [c for c in completions if not c.lost] or completions
    columns = {name: table.scores[:, k] for k, name in enumerate(table.objectives)}
    means = {name: float(np.nanmean(c, dtype=np.float64)) for name, c in columns.items() if np.isfinite(c).any()}
    judged = "accuracy" if "accuracy" in columns else table.objectives[0]
    return {
        **means,
        **({"accuracy": means[judged]} if judged in means else {}),
        "mean_length": float(np.mean([c.length for c in drawn])),
        "truncated": float(np.mean([c.truncated for c in drawn])),
        "missing": float(np.mean(~np.isfinite(table.scores))),
        "completions": float(len(completions)),
        **{name: value for name, value in table.metrics.items() if value and name.endswith(_TROUBLES)},
    }


def _oldest(group: Group, admitted: int) -> int:
    """The oldest version among a group's tokens; of the time of its admission where it has none."""
    return min((int(c.sampled_versions.min()) for c in group.completions if c.length), default=admitted)


class _Clock:
    """Seconds of the event loop between laps, by metric name."""

    def __init__(self) -> None:
        self.laps: Metrics = {}
        self._time = asyncio.get_running_loop().time
        self._last = self._time()

    def lap(self, name: str) -> None:
        now = self._time()
        self.laps[name] = now - self._last
        self._last = now

    def split(self, taken: Sequence[Scored]) -> Metrics:
        """What the turn waited for, as two laps: until the last of its groups was sampled, and from then until it was
        scored. Returns the mean seconds that one group took, whoever waited: to be sampled, to be scored, until used.
        """
        begun = self._last
        self._last = min(max(begun, max(scored.generated for scored in taken)), self._time())
        self.laps["time/generate"] = self._last - begun
        self.lap("time/score")
        return {
            "time/group_generate": float(np.mean([scored.generated - scored.begun for scored in taken])),
            "time/group_score": float(np.mean([scored.scored - scored.generated for scored in taken])),
            "time/group_wait": float(np.mean([self._last - scored.scored for scored in taken])),
        }
