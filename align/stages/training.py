"""Setting up and running the stages that train: sft, preference and online."""

from __future__ import annotations

from contextlib import AsyncExitStack
from typing import Any, cast

from align.data.order import BatchPlan
from align.losses import configure
from align.protocols import Fleet, PromptItem, Sampling, Scorer, Trainer
from align.recipe.schema import OnlineStage as OnlineSettings
from align.recipe.schema import Rollout
from align.stages.backend import FleetJob, ScorerJob, Start, TrainerJob, longest_prompt
from align.stages.context import Context, opened
from align.stages.defaults import resolved_optim, stage_turns
from align.stages.groups import PromptCursor
from align.stages.handover import start_of
from align.stages.loop import Loop, StageResult, every_steps, latest_checkpoint
from align.stages.offline import offline_evaluation, offline_turn
from align.stages.online import OnlinePlan, OnlineStage
from align.stages.rollout_log import RolloutLog
from align.stages.runfolder import METRICS, cut_metrics


def record_kind(losses: Any) -> str:
    """The kind of tree the losses take: "conversation", "pair" or "unpaired"."""
    _, _, needs = configure(losses[0].name, losses[0].options)
    return needs.record


def reference_of(stage: Any) -> Any:
    """Where reference log-probabilities come from: as the recipe says, `start` where a loss needs one, else None."""
    needed = any(configure(term.name, term.options)[2].reference for term in stage.loss)
    return (stage.reference or "start") if needed else None


def trainer_job(context: Context, stage: Any, start: Start, total: int, rollout: Rollout | None = None) -> TrainerJob:
    return TrainerJob(
        stage_id=stage.id,
        model=context.recipe.model,
        start=start,
        losses=stage.loss,
        optim=resolved_optim(stage, start.config),
        total=total,
        max_tokens=stage.packing.max_tokens,
        seed=context.seed(stage.id),
        reference=reference_of(stage),
        rollout=rollout,
    )


def make_loop(context: Context, stage: Any, start: Start, trainer: Trainer, total: int) -> Loop:
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
    cut_metrics(loop.folder / METRICS, latest.step if latest else -1)
    await loop.restore(latest)


async def run_offline(context: Context, stage: Any) -> StageResult:
    """An sft or preference stage from its start, or from its newest checkpoint."""
    start = start_of(context.recipe, stage, context.origin, context.run.finished())
    tokenizer = context.tokenizer(start.base)
    kind = record_kind(stage.loss)
    trees = await context.trees(stage, stage.data, kind, tokenizer)
    held = await context.trees(stage, stage.eval.data, kind, tokenizer, "eval") if stage.eval else []
    order = BatchPlan.of(stage, len(trees), context.seed(stage.id))
    async with AsyncExitStack() as stack:
        job = trainer_job(context, stage, start, order.total)
        [trainer] = await opened(stack, context.backend.trainer(job))
        context.run.record_processes(context.backend.processes())
        loop = make_loop(context, stage, start, trainer, order.total)
        if held:
            loop.evaluate = offline_evaluation(trainer, held)
        await resumed(context, loop)
        return await loop.run(offline_turn(trainer, trees, order))


async def run_online(context: Context, stage: OnlineSettings) -> StageResult:
    """A GRPO stage from its start, or from its newest checkpoint."""
    start = start_of(context.recipe, stage, context.origin, context.run.finished())
    tokenizer = context.tokenizer(start.base)
    prompts = await context.prompts(stage, stage.data, tokenizer)
    held = await context.prompts(stage, stage.eval.data, tokenizer, "eval") if stage.eval else []
    plan = online_plan(stage, len(prompts))
    async with AsyncExitStack() as stack:
        rewards = stage.eval.rewards if stage.eval else ()
        made = await opened(
            stack,
            context.backend.trainer(trainer_job(context, stage, start, plan.total, stage.rollout)),
            context.backend.fleet(fleet_job(context, stage, start, [*prompts, *held])),
            context.backend.scorer(ScorerJob(stage.id, stage.rewards, context.recipe_folder, context.recipe.seed)),
            *(
                [context.backend.scorer(ScorerJob(stage.id, rewards, context.recipe_folder, context.recipe.seed))]
                if rewards
                else []
            ),
        )
        context.run.record_processes(context.backend.processes())
        trainer, fleet, scorer = cast(tuple[Trainer, Fleet, Scorer], tuple(made[:3]))
        loop = make_loop(context, stage, start, trainer, plan.total)
        online = OnlineStage(
            plan,
            trainer=trainer,
            fleet=fleet,
            scorer=scorer,
            cursor=PromptCursor(prompts, context.recipe.seed, stage.id, context.seed(stage.id)),
            publications=context.publications,
            log=RolloutLog(loop.folder / "rollouts"),
            decode=lambda ids: tokenizer.decode(ids, skip_special_tokens=False),
        )
        if held:
            held_scorer = cast(Scorer, made[3]) if rewards else scorer
            loop.evaluate = lambda: online.evaluate(held, held_scorer)
        loop.extra = online.extra
        await resumed(context, loop)
        await online.start(loop.state.step, loop.state.extra)
        return await loop.run(online.turn)


def online_plan(stage: OnlineSettings, rows: int) -> OnlinePlan:
    rollout = stage.rollout
    return OnlinePlan(
        stage_id=stage.id,
        groups=stage.batch.groups,
        group_size=stage.batch.group_size,
        total=stage_turns(stage, rows / stage.batch.groups),
        sampling=sampling_of(rollout),
        objectives=stage.objectives,
        truncated=rollout.truncated,
        staleness=stage.staleness,
    )


def sampling_of(rollout: Rollout) -> Sampling:
    return Sampling(
        temperature=rollout.temperature,
        max_tokens=rollout.max_tokens,
        stop=rollout.stop,
        stop_token_ids=rollout.stop_token_ids,
    )


def fleet_job(context: Context, stage: OnlineSettings, start: Start, prompts: list[PromptItem]) -> FleetJob:
    whole = start.config.kind == "full" or stage.rollout.weights == "merged"
    return FleetJob(
        stage_id=stage.id,
        model=context.recipe.model,
        base=start.base,
        rollout=stage.rollout,
        group_size=stage.batch.group_size,
        adapter_rank=0 if whole else start.config.rank,
        longest_prompt=longest_prompt(prompts),
        seed=context.recipe.seed,
    )
