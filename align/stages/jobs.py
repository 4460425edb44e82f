"""What a stage asks a backend for: how much of what at once, and a job for each of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from align.data.tokenizer import ChatTokenizer
from align.episodes.spec import EpisodeSpec
from align.losses import Losses
from align.protocols.fleet import PromptItem, Sampling
from align.recipe.capabilities import SamplingStage, StageBase, TrainStage
from align.recipe.parts import ReferencePath, Reward, Rollout
from align.recipe.support import check_adapter, publish_mode
from align.stages.backend import FleetJob, Needs, ScorerJob, Start, TrainerJob, longest_prompt, most_media, pixel_limits
from align.stages.context import Context


def reference_of(stage: TrainStage) -> Literal["start", "base", "cached"] | ReferencePath | None:
    """Where reference log-probabilities come from: as the recipe says, `start` where a loss needs one, else None."""
    return (stage.reference or "start") if Losses.of(stage.loss).needs_reference else None


def reward_sets(stage: StageBase) -> list[tuple[Reward, ...]]:
    """The rewards of what a stage samples, and those of its evaluation where it names its own."""
    if stage.engines is None:
        return []
    own = stage.eval.rewards if isinstance(stage, TrainStage) and stage.eval else ()
    every = [stage.rewarded_by, own] if own else [stage.rewarded_by]
    return [rewards for rewards in every if rewards]


def needs_of(stage: StageBase) -> Needs:
    """What a stage runs at the same time."""
    return Needs(
        trainer=stage.trains or (bool(stage.losses) and stage.engines is None),
        reference=isinstance(stage, TrainStage) and isinstance(reference_of(stage), ReferencePath),
        engines=stage.engines.workers if stage.engines else 0,
        scorers=len(reward_sets(stage)),
        files=stage.makes_folder,
        overlap=isinstance(stage, SamplingStage) and stage.staleness > 0,
    )


def trainer_job(context: Context, stage: TrainStage, start: Start, total: int) -> TrainerJob:
    check_adapter(start.config)
    return TrainerJob(
        stage_id=stage.id,
        model=context.recipe.model,
        start=start,
        losses=stage.loss,
        optim=stage.optim_for(start.config),
        rates=stage.rates_for(start.config),
        total=total,
        packing=stage.packing,
        seed=context.seed(stage.id),
        reference=reference_of(stage),
        rollout=stage.engines,
        labels=stage.score_head,
        chat=context.carried(start).files,
    )


def scorer_job(context: Context, stage: StageBase, rewards: tuple[Reward, ...], number: int = 0) -> ScorerJob:
    logs = context.run.stage_folder(stage.id) / ("rewards" if number == 0 else "eval-rewards")
    cache = context.run.path.parent / ".cache" / "rewards.sqlite"
    return ScorerJob(stage.id, rewards, context.recipe_folder, context.recipe.seed, logs, number, cache)


def sampling_of(rollout: Rollout) -> Sampling:
    return Sampling(
        temperature=rollout.temperature,
        max_tokens=rollout.max_tokens,
        stop=rollout.stop,
        stop_token_ids=rollout.stop_token_ids,
    )


def episode_spec(
    context: Context, stage: StageBase, tokenizer: ChatTokenizer, description: Mapping[str, Any] | None
) -> EpisodeSpec | None:
    """What engines are told of the stage's environment; None where it has none."""
    if stage.world is None or description is None:
        return None
    logs = context.run.stage_folder(stage.id) / "environment"
    logs.mkdir(parents=True, exist_ok=True)
    return EpisodeSpec(stage.world, tokenizer, description, context.recipe_folder, context.recipe.seed, logs)


async def described_world(context: Context, stage: StageBase) -> Mapping[str, Any] | None:
    """What the stage's environment says of itself; None where it has none."""
    if stage.world is None:
        return None
    return await context.backend.describe_environment(stage.world, context.recipe_folder)


def world_tools(stage: StageBase, description: Mapping[str, Any] | None) -> tuple[Mapping[str, Any], ...]:
    """Schemas that the chat template is given with every prompt."""
    written = stage.world is not None and stage.world.tools_in == "template"
    return tuple(description["tools"]) if description is not None and written else ()


def fleet_job(
    context: Context,
    stage: SamplingStage,
    start: Start,
    prompts: list[PromptItem],
    tokenizer: ChatTokenizer,
    description: Mapping[str, Any] | None,
) -> FleetJob:
    return FleetJob(
        stage_id=stage.id,
        model=context.recipe.model,
        base=start.base,
        rollout=stage.rollout,
        group_size=stage.batch.group_size,
        adapter_rank=start.config.rank if publish_mode(start.config, stage.rollout) == "adapter" else 0,
        longest_prompt=longest_prompt(prompts),
        seed=context.recipe.seed,
        versions=stage.staleness + 1,
        end_ids=tokenizer.eos_ids,
        media=most_media(prompts),
        pixels=pixel_limits(context.recipe.media),
        environment=episode_spec(context, stage, tokenizer, description),
    )
