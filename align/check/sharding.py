"""What must hold where the trainer's parameters are spread over ranks (`placement.trainer.strategy`), and of dtypes."""

from __future__ import annotations

from align.check.findings import Findings
from align.errors import Unsupported
from align.recipe.capabilities import TrainStage
from align.recipe.schema import Recipe
from align.recipe.support import is_sound
from align.stages.stage_start import adapter_of

WHERE = "placement.trainer.strategy"


def check_sharding(recipe: Recipe, found: Findings) -> None:
    """Refusals that the recipe alone decides; those that the loaded model decides are `align.train.zero`'s."""
    trainer = recipe.placement.trainer
    spreads = trainer.strategy.facts.spreads
    if spreads and trainer.ranks > 1 and trainer.gpus is not None and 0 < trainer.gpus < 1:
        found.add(
            Unsupported(
                f"`strategy: {trainer.strategy.name}` with ranks that share a GPU (`gpus: {trainer.gpus:g}` each): "
                "NCCL wants a GPU for each",
                where=WHERE,
                remedy="set `placement.trainer.gpus: 1`, or leave `strategy` out",
            )
        )
    for stage in recipe.stages:
        if not isinstance(stage, TrainStage):
            continue
        if recipe.model.dtype == "float16":
            found.add(
                Unsupported(
                    "training in float16: gradients below 6e-8 would be lost, and loss scaling is not offered",
                    where="model.dtype",
                    remedy="use bfloat16, which has float32's range, or float32",
                ),
                stage.id,
            )
        if "parameters" in spreads:
            _check_towers(recipe, stage, found)


def _check_towers(recipe: Recipe, stage: TrainStage, found: Findings) -> None:
    adapter = adapter_of(recipe, stage)
    if not is_sound(adapter):  # the stage that asks for it has been told
        return
    for part in ("vision", "projector"):
        if adapter.modes[part] != "frozen":
            strategy = recipe.placement.trainer.strategy.name
            found.add(
                Unsupported(
                    f"`strategy: {strategy}` with `adapter.tune.{part}: {adapter.modes[part]}`: ranks run towers as "
                    "often as their rows have media, and what is spread must be run by all at one time",
                    where=WHERE,
                    remedy="use zero2, or leave the towers frozen",
                ),
                stage.id,
            )
