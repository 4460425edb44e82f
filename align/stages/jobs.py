"""What a stage asks a backend for: how much of what at once, and a job for each of it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import ceil
from pathlib import Path
from typing import Any, Literal

from align.data.tokenizer import ChatTokenizer
from align.episodes.spec import EpisodeSpec, Sight, WorldSpec
from align.losses import Losses
from align.mediastore import processor_files
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
    context: Context,
    stage: StageBase,
    tokenizer: ChatTokenizer,
    descriptions: Sequence[Mapping[str, Any]],
    prompts: Sequence[PromptItem],
    kept: int | None = None,
) -> EpisodeSpec | None:
    """What engines are told of the stage's environments; None where it has none. kept: see `Sight`."""
    if not stage.worlds:
        return None
    logs = context.run.stage_folder(stage.id) / "environment"
    logs.mkdir(parents=True, exist_ok=True)
    return EpisodeSpec(
        WorldSpec.several(stage.worlds, descriptions, prompts),
        tokenizer,
        context.recipe_folder,
        context.recipe.seed,
        logs,
        _sight(context, stage, tokenizer, kept),
    )


def _sight(context: Context, stage: StageBase, tokenizer: ChatTokenizer, kept: int | None) -> Sight | None:
    folder = tokenizer.folder
    if folder is None or context.library(folder) is None or not processor_files(folder):
        return None
    return Sight(
        max(world.images(True) for world in stage.worlds),
        folder,
        _shown_in(context, stage),
        context.recipe.media,
        context.recipe.model.trust_remote_code,
        kept,
    )


def _shown_in(context: Context, stage: StageBase) -> Path:
    return (context.run.stage_folder(stage.id) / "environment" / "images").absolute()


@contextmanager
def shown_images(context: Context, stage: StageBase) -> Iterator[None]:
    """What environments show lies in the run's folder inside, and is gone behind it: the next run is shown other
    images. What a killed run left goes first."""
    folder = _shown_in(context, stage)
    shutil.rmtree(folder, ignore_errors=True)
    try:
        yield
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def media_of(prompts: Sequence[PromptItem], environment: EpisodeSpec | None) -> dict[str, int]:
    """The largest number of each kind of media in what an engine is given, images of an environment with them."""
    most = most_media(prompts)
    if environment is not None and environment.sight is not None and environment.sight.most:
        most["image"] = most.get("image", 0) + environment.sight.most
    return most


async def described_worlds(context: Context, stage: StageBase) -> list[Mapping[str, Any]]:
    """What each of the stage's environments says of itself."""
    return [await context.backend.describe_environment(world, context.recipe_folder) for world in stage.worlds]


def fleet_job(
    context: Context,
    stage: SamplingStage,
    start: Start,
    prompts: list[PromptItem],
    tokenizer: ChatTokenizer,
    descriptions: Sequence[Mapping[str, Any]],
    held: Sequence[PromptItem] = (),
) -> FleetJob:
    """held: prompts of its evaluation."""
    factor = stage.dynamic_sampling.max_factor if stage.dynamic_sampling else 1.0
    kept = ceil(stage.batch.groups * (stage.staleness + 2) * factor) + len(held)
    every = [*prompts, *held]
    environment = episode_spec(context, stage, tokenizer, descriptions, every, kept)
    return FleetJob(
        stage_id=stage.id,
        model=context.recipe.model,
        base=start.base,
        rollout=stage.rollout,
        group_size=stage.batch.group_size,
        adapter_rank=start.config.rank if publish_mode(start.config, stage.rollout) == "adapter" else 0,
        longest_prompt=longest_prompt(every),
        seed=context.recipe.seed,
        versions=stage.staleness + 1,
        end_ids=tokenizer.eos_ids,
        media=media_of(every, environment),
        pixels=pixel_limits(context.recipe.media),
        environment=environment,
    )
