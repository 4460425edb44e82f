"""Setting up and running the stages that train: on rows as they are, and on groups that engines sample."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from align.data.order import BatchPlan
from align.data.records import Kind
from align.data.tokenizer import ChatTokenizer
from align.data.world import Offered
from align.losses import Losses
from align.protocols.scorer import Scorer
from align.protocols.trainer import Trainer
from align.protocols.trees import Tree
from align.recipe.capabilities import SamplingStage, TrainStage
from align.recipe.inputs import DataSource
from align.recipe.parts import LossTerm
from align.stages.backend import Start
from align.stages.context import Context, opened
from align.stages.episode_scorer import EpisodeScorer, Known
from align.stages.groups import PromptCursor
from align.stages.jobs import (
    described_worlds,
    fleet_job,
    needs_of,
    reward_sets,
    sampling_of,
    scorer_job,
    shown_images,
    trainer_job,
)
from align.stages.loop import Loop, StageResult, every_steps, latest_checkpoint
from align.stages.margins import require_margins, with_margins
from align.stages.metrics_file import METRICS, cut_metrics
from align.stages.monitor import Monitor, tolerance
from align.stages.offline import (
    Batches,
    PreparedBatches,
    offline_evaluation,
    offline_turn,
    refuse_padding_at_end,
)
from align.stages.online import OnlinePlan, OnlineStage
from align.stages.reference_cache import cached_reference
from align.stages.reward_notes import NotedScorer
from align.stages.rollout_log import RolloutLog
from align.stages.row_weights import refuse_weights
from align.stages.stage_start import start_of
from align.stages.streamed import open_streams
from align.stages.updates import UpdatePlan


def record_kind(losses: Sequence[LossTerm]) -> Kind:
    """The kind of record that the losses learn from: the first one's (`align check` proves that the others fit)."""
    record = Losses.of(losses).records[0]
    assert record != "group", "losses on groups are for stages that sample them"
    return record


def make_loop(context: Context, stage: TrainStage, start: Start, trainer: Trainer, total: int) -> Loop:
    settings = stage.eval
    return Loop(
        stage_id=stage.id,
        kind=stage.kind,
        total=total,
        folder=context.run.stage_folder(stage.id),
        trainer=trainer,
        report=context.report,
        stop=context.stop,
        save=stage.save,
        artefact=start.artefact,
        eval_every=every_steps(settings.every, total) if settings else None,
        eval_at_start=bool(settings and settings.at_start),
    )


async def resumed(context: Context, loop: Loop) -> None:
    """Bring the loop to its newest checkpoint and the metrics file back to that step."""
    latest = latest_checkpoint(loop.folder, context.report)
    # without a checkpoint the stage starts over, its evaluation before the first step included
    step, mark = (latest.step, latest.metrics) if latest else (-1, None)
    cut_metrics(loop.folder / METRICS, step, mark, context.report.message)
    await loop.restore(latest)


async def run_offline(context: Context, stage: TrainStage) -> StageResult:
    """A stage that trains on rows as they are, from its start, or from its newest checkpoint."""
    start = start_of(context.recipe, stage, context.origin, context.run.finished())
    tokenizer = context.tokenizer(start)
    kind = record_kind(stage.loss)
    check = partial(require_usable, stage, tokenizer)
    async with AsyncExitStack() as stack:
        if stage.streams:
            batches: Batches = await open_streams(context, stage, kind, tokenizer, stack, check)
        else:
            trees = await _rows(context, stage, stage.data, kind, tokenizer)
            check(trees)
            batches = PreparedBatches(trees, BatchPlan.of(stage, len(trees), context.seed(stage.id)))
        held = await _rows(context, stage, stage.eval.data, kind, tokenizer, "eval") if stage.eval else []
        check(held)
        job = trainer_job(context, stage, start, batches.total)
        context.raise_if_stopped(stage.id)
        await stack.enter_async_context(context.backend.places(needs_of(stage)))
        [trainer] = await opened(stack, context.backend.trainer(job))
        context.record()
        await context.note_forward(stage.id, trainer)
        if job.reference == "cached" and isinstance(batches, PreparedBatches):
            trees, held = await cached_reference(context, stage, start, trainer, list(batches.trees), held)
            batches = replace(batches, trees=trees)
        loop = make_loop(context, stage, start, trainer, batches.total)
        if held:
            loop.evaluate = offline_evaluation(trainer, held)
        loop.extra = batches.extra
        await resumed(context, loop)
        batches.restore(loop.state.extra)
        return finished(context, start, await loop.run(offline_turn(trainer, batches)))


def require_usable(stage: TrainStage, tokenizer: ChatTokenizer, trees: Sequence[Tree]) -> None:
    """Raise DataError for a tree that the stage's loss or head could not use as its row says."""
    if Losses.of(stage.loss).needs_margin:
        require_margins(trees)
    refuse_weights(trees, stage.loss)
    if stage.score_head is not None:
        refuse_padding_at_end(trees, tokenizer.pad_id)


async def _rows(
    context: Context,
    stage: TrainStage,
    sources: Sequence[DataSource],
    kind: Kind,
    tokenizer: ChatTokenizer,
    name: str = "data",
) -> list[Tree]:
    """Rows as trees; pairs that rewards judge, with the margins that these give them."""
    if not stage.judges_pairs:
        return await context.trees(stage, sources, kind, tokenizer, name)
    trees, groups = await context.pairs(stage, sources, tokenizer, name)
    return await with_margins(context, stage, trees, groups, "margins" if name == "data" else f"{name}-margins")


async def run_online(context: Context, stage: SamplingStage) -> StageResult:
    """A GRPO stage from its start, or from its newest checkpoint."""
    start = start_of(context.recipe, stage, context.origin, context.run.finished())
    tokenizer = context.tokenizer(start)
    worlds = await described_worlds(context, stage)
    offered = Offered.of(stage.worlds, worlds)
    prompts = await context.prompts(stage, stage.data, tokenizer, offered=offered)
    held = await context.prompts(stage, stage.eval.data, tokenizer, "eval", offered) if stage.eval else []
    plan = online_plan(stage, len(prompts), context.seed(stage.id))
    job = trainer_job(context, stage, start, plan.total * plan.updates.per_turn)
    scorers = [scorer_job(context, stage, rewards, number) for number, rewards in enumerate(reward_sets(stage))]
    context.raise_if_stopped(stage.id)
    async with AsyncExitStack() as stack:
        stack.enter_context(shown_images(context, stage))
        await stack.enter_async_context(context.backend.places(needs_of(stage)))
        trainer, fleet, *judges = await opened(
            stack,
            context.backend.trainer(job),
            context.backend.fleet(fleet_job(context, stage, start, prompts, tokenizer, worlds, held)),
            *(context.backend.scorer(scorer) for scorer in scorers),
        )
        judges = [
            NotedScorer(judge, stage.id, tokenizer.special, context.report.message)
            for judge in scorers_of(stage, worlds, judges)
        ]
        for judge in judges:
            stack.callback(judge.finish)
        context.record()
        await context.note_forward(stage.id, trainer)
        loop = make_loop(context, stage, start, trainer, plan.total)
        dtype = (await trainer.numerics())["dtype"].removeprefix("torch.")
        online = OnlineStage(
            plan,
            trainer=trainer,
            fleet=fleet,
            scorer=judges[0],
            cursor=PromptCursor(prompts, context.recipe.seed, stage.id, context.seed(stage.id)),
            publications=context.publications,
            log=RolloutLog(loop.folder / "rollouts"),
            decode=lambda ids: tokenizer.decode(ids.tolist(), skip_special_tokens=False),
            tell=context.report.message,
            monitor=Monitor(
                trainer,
                fleet,
                min(prompts, key=lambda prompt: len(prompt.token_ids)),
                plan.sampling,
                tolerance=tolerance(stage.rollout.dtype, context.recipe.model.dtype, dtype),
                ahead=plan.staleness > 0,
                tell=context.report.message,
            ),
        )
        if held:
            loop.evaluate = lambda: online.evaluate(held, judges[-1])
        loop.extra = online.extra
        await resumed(context, loop)
        async with online:
            await online.start(loop.state.step, loop.state.extra)
            return finished(context, start, await loop.run(online.turn))


def scorers_of(
    stage: SamplingStage, worlds: Sequence[Mapping[str, Any]], judges: Sequence[Scorer]
) -> tuple[Scorer, ...]:
    """The scorer of what is trained on, then that of the evaluation where it is another. judges: of `reward_sets`;
    worlds: what the stage's environments say of themselves."""
    if not stage.worlds:
        return tuple(judges)
    known = [Known.of(*both) for both in zip(stage.worlds, worlds, strict=True)]
    own = judges[0] if stage.rewards else None
    held = [judges[-1]] if stage.eval and stage.eval.rewards else []
    return tuple(EpisodeScorer(known, judge, stage.id) for judge in (own, *held))


def finished(context: Context, start: Start, result: StageResult) -> StageResult:
    """A whole model carries the tokenizer, template and ends of turns that it was trained with, whoever wrote it."""
    if "model" in result.artefacts:
        context.carried(start).files.write(Path(result.artefacts["model"]), start.base)
    return result


def online_plan(stage: SamplingStage, rows: int, seed: int) -> OnlinePlan:
    rollout = stage.rollout
    return OnlinePlan(
        stage_id=stage.id,
        groups=stage.batch.groups,
        group_size=stage.batch.group_size,
        total=stage.turns(rows),
        sampling=sampling_of(rollout),
        objectives=stage.objectives,
        truncated=rollout.truncated,
        truncated_penalty=rollout.truncated_penalty or 0.0,
        staleness=stage.staleness,
        updates=UpdatePlan.of(stage, seed),
        overdue=stage.overdue,
        refill=stage.dynamic_sampling.max_factor - 1 if stage.dynamic_sampling else 0.0,
        max_failed=stage.max_failed_prompts,
    )
