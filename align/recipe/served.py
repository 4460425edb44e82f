"""What an engine serves of vision-language families: asked by the check, before an engine is started to find it."""

from __future__ import annotations

from align.errors import Unsupported
from align.recipe.engines import facts_of
from align.recipe.parts import Rollout
from align.recipe.support import Publish


def refuse_unserved(model_type: str, publish: Publish, rollout: Rollout) -> None:
    """Raise Unsupported where the engine would refuse this family's adapters, or leave a part of them out."""
    if publish != "adapter":
        return
    facts = facts_of(rollout.name)
    remedy = "set `rollout.weights: merged`, or `rollout.name: transformers`"
    if model_type in facts.without_adapters:
        what = f"{facts.title} serves no adapters on {model_type} models"
        raise Unsupported(what, where="rollout.weights", remedy=remedy)
    if model_type in facts.language_adapters and facts.tower_option and rollout.engine.get(facts.tower_option):
        raise Unsupported(
            f"{facts.title} serves adapters of {model_type} models on their language model alone",
            where=f"rollout.engine.{facts.tower_option}",
            remedy=remedy,
        )
