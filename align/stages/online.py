"""Online stages: one loop, and staleness is an integer in it.

    admit prompts -> generate -> score -> advantage -> trees -> step -> publish -> (loop)

A turn consumes whole groups, sorted by id, and ends with a publish; its version is the number of turns done. With
`staleness: 0` a turn admits its prompts only when the version before it is published, so training is exactly
on-policy. Larger values admit earlier turns' prompts ahead of the publish; `Admission` is the seam for that.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from align.errors import RewardError, Unsupported
from align.objectives import combine
from align.protocols import Fleet, Group, Metrics, PromptItem, Publication, Sampling, Scorer, ScoreTable, Trainer
from align.recipe.schema import Objectives
from align.stages.groups import PromptCursor, group_ids, group_metrics, penalise_truncated, to_trees, untrained
from align.stages.publication import PublicationFolder
from align.stages.rollout_log import RolloutLog
from align.stages.updates import UpdatePlan, Updates


@dataclass(frozen=True)
class OnlinePlan:
    """The numbers of an online stage: completions per group, turns, and how to sample."""

    stage_id: str
    group_size: int
    total: int
    sampling: Sampling
    objectives: Objectives
    truncated: Literal["mask", "keep", "penalise"] = "mask"
    truncated_penalty: float = 0.0
    staleness: int = 0
    updates: UpdatePlan = field(default_factory=UpdatePlan)

    def __post_init__(self) -> None:
        if self.staleness != 0:
            raise Unsupported(
                f"staleness: {self.staleness} needs the asynchronous buffer, which this version does not have",
                where=f"stages.{self.stage_id}.staleness",
                remedy="use staleness: 0, which trains exactly on-policy",
            )


@dataclass
class Admission:
    """How far prompts have been handed to the engines, and which groups of them are not yet trained on.

    turns: turns whose prompts were handed out; running: ids of groups handed out and not consumed (none between turns
    at staleness 0). All others of those turns are consumed, so both together say what a resumed run must reissue.
    """

    turns: int = 0
    running: list[int] = field(default_factory=list)

    def admit(self, prompts: Sequence[PromptItem]) -> None:
        self.turns += 1
        self.running += [prompt.group_id for prompt in prompts]

    def consumed(self, groups: Sequence[Group]) -> None:
        gone = {group.prompt.group_id for group in groups}
        self.running = [group_id for group_id in self.running if group_id not in gone]

    def to_json(self) -> dict[str, Any]:
        return {"turns": self.turns, "running": self.running}


class OnlineStage:
    """One online stage's turns over a Trainer, a Fleet and a Scorer.

    start(state) publishes the policy the stage begins with; turn(k) is one turn of the loop; extra() is the JSON
    state a checkpoint must hold; evaluate() samples greedily from the fleet.
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
    ):
        self.plan, self.trainer, self.fleet, self.scorer = plan, trainer, fleet, scorer
        self.cursor, self.publications, self.log, self.decode = cursor, publications, log, decode
        self.updates = Updates(trainer, plan.updates)
        self.admission = Admission()
        self.objective_state: dict[str, Any] = {}
        self.version = 0

    async def start(self, step: int, extra: Mapping[str, Any]) -> None:
        """Take up the state of a checkpoint (step 0 and {}: a fresh stage) and bring the engines to the policy."""
        if extra:
            self.admission = Admission(**extra["admission"])
            self.objective_state = dict(extra["objectives"])
        self.log.cut_back(step)
        await self._publish(step)

    def extra(self) -> dict[str, Any]:
        self.log.close_file()  # what a checkpoint covers must be readable
        return {"admission": self.admission.to_json(), "objectives": self.objective_state}

    async def turn(self, step: int) -> Metrics:
        clock = _Clock()
        prompts = self.cursor.turn(self.admission.turns)
        self.admission.admit(prompts)
        groups = await self.generate(prompts)
        clock.lap("time/generate")
        table = await self.scorer.score(groups)
        clock.lap("time/score")
        advantages, objective_metrics = self.advantages(groups, table, step)
        masked = untrained(groups, table, self.plan.truncated)
        trees = to_trees(groups, advantages, masked)
        if not trees:
            raise RewardError(
                "every completion of this step is empty: the policy ends its turn at once",
                where=f"stage {self.plan.stage_id!r}, step {step}",
                remedy="train it to answer first (an sft stage), or look at the prompts in rollouts/",
            )
        trained = await self.updates.train(trees, step=step, total=self.plan.total)
        clock.lap("time/train")
        self.admission.consumed(groups)
        published = await self._publish(step + 1)
        clock.lap("time/publish")
        keep = np.isfinite(advantages) & ~masked
        self.log.add(step + 1, groups, [self.decode(g.prompt.token_ids) for g in groups], table, advantages, keep)
        counts = group_metrics(groups, advantages, masked, version=step)
        return {**counts, **dict(table.metrics), **objective_metrics, **trained, **published, **clock.laps}

    async def generate(self, prompts: Sequence[PromptItem]) -> list[Group]:
        """The groups of these prompts, sorted by id: nothing after depends on which engine was faster."""
        groups = await self.fleet.generate(prompts, self.plan.group_size, self.plan.sampling)
        return sorted(groups, key=lambda group: group.prompt.group_id)

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
        self.publications.supersede(folder)
        self.version = version
        return metrics


def greedy_metrics(groups: Sequence[Group], table: ScoreTable) -> Metrics:
    """Means over greedy completions: each objective by name, accuracy, mean_length in tokens, shares.

    accuracy is the objective of that name, else the first one; a missing score is left out of its mean, and a mean of
    nothing is left out of the result.
    """
    completions = [c for group in groups for c in group.completions]
    columns = {name: table.scores[:, k] for k, name in enumerate(table.objectives)}
    means = {name: float(np.nanmean(c, dtype=np.float64)) for name, c in columns.items() if np.isfinite(c).any()}
    judged = "accuracy" if "accuracy" in columns else table.objectives[0]
    return {
        **means,
        **({"accuracy": means[judged]} if judged in means else {}),
        "mean_length": float(np.mean([len(c.token_ids) for c in completions])),
        "truncated": float(np.mean([c.truncated for c in completions])),
        "missing": float(np.mean(~np.isfinite(table.scores))),
        "completions": float(len(completions)),
    }


class _Clock:
    """Seconds between laps, by metric name."""

    def __init__(self) -> None:
        self.laps: Metrics = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name] = now - self._last
        self._last = now
