"""The evaluate stage: what each of several stages made, judged on the same prompts by the same rewards.

Each stage's weights become one plain folder (adapters are merged into a temporary one), an engine serves it, and
greedy completions are scored. Without rewards the stage's trees go through the trainer's forward instead, and its
loss metrics are the result.
"""

from __future__ import annotations

import shutil
import time
from contextlib import AsyncExitStack
from pathlib import Path

import numpy as np

from align.data.world import Offered
from align.errors import Interrupted
from align.losses import Losses
from align.protocols.trainer import Metrics, Publication
from align.recipe.capabilities import BEFORE_ANY, JudgingStage
from align.recipe.parts import Optim
from align.stages import intervals
from align.stages.backend import FleetJob, Needs, Start, TrainerJob, longest_prompt, pixel_limits
from align.stages.context import Context, opened
from align.stages.episode_scorer import EpisodeScorer, Known
from align.stages.jobs import (
    described_worlds,
    episode_spec,
    media_of,
    sampling_of,
    scorer_job,
    shown_images,
)
from align.stages.loop import StageResult
from align.stages.margins import require_margins
from align.stages.offline import eval_names
from align.stages.online import greedy_metrics
from align.stages.reward_notes import NotedScorer
from align.stages.rollout_log import RolloutLog
from align.stages.row_weights import refuse_weights
from align.stages.stage_start import judged_start
from align.stages.training import record_kind


async def run_evaluate(context: Context, stage: JudgingStage) -> StageResult:
    """Metrics per evaluated stage go to summary.stages.<of>.metrics (those of `X@best` as "best/<metric>", those of the
    model before any stage nowhere); this stage's own are named "<of>/<metric>"."""
    begun = time.perf_counter()
    context.report.stage_started(stage.id, len(stage.of), stage.kind)
    one = _by_rewards if stage.engines else _by_loss
    context.run.summarise(stage.id, {"of": list(stage.of)})
    collected: Metrics = {}
    for number, name in enumerate(stage.of, start=1):
        metrics = await one(context, stage, name)
        if name != BEFORE_ANY:
            judged, _, which = name.partition("@")
            named = {f"{which}/{key}": value for key, value in metrics.items()} if which else metrics
            context.run.summarise(judged, {"metrics": named})
        collected |= {f"{name}/{key}": value for key, value in metrics.items()}
        context.report.step(stage.id, number, {f"{name}/{key}": value for key, value in metrics.items()})
        if context.stop.is_set() and number < len(stage.of):
            raise Interrupted(
                f"stopped after {number} of {len(stage.of)} stages were evaluated",
                where=f"stage {stage.id!r}",
                remedy="the same command with --resume evaluates them again",
            )
    return StageResult(
        steps=len(stage.of),
        seconds=time.perf_counter() - begun,
        tokens=0.0,
        metrics=collected,
        artefacts={},
    )


def judging_needs(stage: JudgingStage) -> Needs:
    """What an evaluate stage runs at the same time, for each that it judges."""
    if not stage.engines:
        return Needs(trainer=True)
    return Needs(engines=stage.engines.workers, scorers=1 if stage.rewards else 0)


async def _by_rewards(context: Context, stage: JudgingStage, name: str) -> Metrics:
    weights = judged_start(context.recipe, name, context.origin, context.run.finished())
    tokenizer = context.tokenizer(weights)
    worlds = await described_worlds(context, stage)
    prompts = await context.prompts(stage, stage.data, tokenizer, offered=Offered.of(stage.worlds, worlds))
    folder = context.run.stage_folder(stage.id)
    merged = folder / f".merged-{name}"
    async with AsyncExitStack() as stack:
        stack.callback(shutil.rmtree, merged, ignore_errors=True)
        stack.enter_context(shown_images(context, stage))
        served = await _plain_folder(context, weights, merged)
        environment = episode_spec(context, stage, tokenizer, worlds, prompts)
        job = FleetJob(
            stage_id=stage.id,
            model=context.recipe.model,
            base=served,
            rollout=stage.rollout,
            group_size=1,
            adapter_rank=0,
            longest_prompt=longest_prompt(prompts),
            seed=context.recipe.seed,
            end_ids=tokenizer.eos_ids,
            media=media_of(prompts, environment),
            pixels=pixel_limits(context.recipe.media),
            environment=environment,
        )
        judges = [context.backend.scorer(scorer_job(context, stage, stage.rewards))] if stage.rewards else []
        await stack.enter_async_context(context.backend.places(judging_needs(stage)))
        fleet, *judge = await opened(stack, context.backend.fleet(job), *judges)
        if name != stage.of[-1]:
            context.backend.expect(judging_needs(stage), stage.rollout.name)  # of the next
        if stage.worlds:
            known = [Known.of(*both) for both in zip(stage.worlds, worlds, strict=True)]
            judge = [EpisodeScorer(known, judge[0] if judge else None, stage.id)]
        scorer = NotedScorer(judge[0], f"{stage.id} of {name}", tokenizer.special, context.report.message)
        context.record()
        await fleet.publish(Publication(version=0, kind="base", path=str(served), digest=""))
        groups = await fleet.generate(prompts, 1, sampling_of(stage.rollout))
        table = await scorer.score(groups)
        scorer.finish()
    log = RolloutLog(folder / "rollouts" / name)
    log.cut_back(-1)
    texts = [tokenizer.decode(g.prompt.token_ids.tolist(), skip_special_tokens=False) for g in groups]
    unknown = np.full(len(groups), np.nan, dtype=np.float32)
    log.add(0, groups, texts, table, unknown, np.zeros(len(groups), dtype=bool))
    log.close_file()
    return greedy_metrics(groups, table) | intervals.of_scores(table)


async def _plain_folder(context: Context, weights: Start, merged: Path) -> Path:
    """A folder with whole weights: the stage's own, or base and adapter merged into `merged`."""
    if weights.adapter is None:
        return weights.base
    shutil.rmtree(merged, ignore_errors=True)
    await context.backend.merge(
        weights.base,
        weights.adapter,
        merged,
        dtype="auto",
        seed=context.recipe.seed,
        chat=context.carried(weights).files,
    )
    return merged


async def _by_loss(context: Context, stage: JudgingStage, name: str) -> Metrics:
    """The metrics of `stage.loss` over the data, on the forward that training uses."""
    weights = judged_start(context.recipe, name, context.origin, context.run.finished())
    trees = await context.trees(stage, stage.data, record_kind(stage.loss), context.tokenizer(weights))
    if Losses.of(stage.loss).needs_margin:
        require_margins(trees)
    refuse_weights(trees, stage.loss)
    job = TrainerJob(
        stage_id=stage.id,
        model=context.recipe.model,
        start=weights,
        losses=stage.loss,
        optim=Optim(),
        total=1,
        packing=stage.packing,
        seed=context.seed(stage.id),
        trainable=False,
    )
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(context.backend.places(judging_needs(stage)))
        [trainer] = await opened(stack, context.backend.trainer(job))
        if name != stage.of[-1]:
            context.backend.expect(judging_needs(stage))  # of the next
        context.record()
        await context.note_forward(stage.id, trainer)
        metrics = eval_names(await trainer.evaluate(trees))
        return metrics | intervals.of_losses(metrics, len(trees))
