"""What vLLM serves of vision-language families, as was found by running each (`tests.prove.prove_vllm_families`): asked
by the check, before an engine is started to find the same. A family that is not named here is for the engine to judge.
"""

from __future__ import annotations

from align.errors import Unsupported
from align.recipe.parts import Rollout
from align.recipe.support import Publish

TOWER_SWITCH = "enable_tower_connector_lora"
NO_ADAPTERS = frozenset({"llava_onevision"})
LANGUAGE_ADAPTERS = frozenset({"internvl", "gemma3"})
"""Adapters are served on the language model alone: vLLM's tower has other modules than transformers'."""


def refuse_unserved(model_type: str, publish: Publish, rollout: Rollout) -> None:
    """Raise Unsupported where vLLM would refuse this family's adapters, or leave a part of them out."""
    if rollout.name != "vllm" or publish != "adapter":
        return
    remedy = "set `rollout.weights: merged`, or `rollout.name: transformers`"
    if model_type in NO_ADAPTERS:
        raise Unsupported(f"vLLM serves no adapters on {model_type} models", where="rollout.weights", remedy=remedy)
    if model_type in LANGUAGE_ADAPTERS and rollout.engine.get(TOWER_SWITCH):
        raise Unsupported(
            f"vLLM serves adapters of {model_type} models on their language model alone",
            where=f"rollout.engine.{TOWER_SWITCH}",
            remedy=remedy,
        )
