"""Families whose adapters vLLM does not serve are refused by the check."""

from __future__ import annotations

import pytest

from align.errors import Unsupported
from align.recipe.parts import Rollout
from align.recipe.served import refuse_unserved
from rollout.vllm_facts import TOWER_OPTION


def test_adapters_that_vllm_refuses_are_refused_before_it_starts_and_merged_weights_are_not() -> None:
    with pytest.raises(Unsupported, match="no adapters on llava_onevision models") as error:
        refuse_unserved("llava_onevision", "adapter", Rollout())
    assert "rollout.weights: merged" in str(error.value)
    refuse_unserved("llava_onevision", "weights", Rollout())
    refuse_unserved("llava_onevision", "adapter", Rollout(name="transformers"))


def test_a_towers_adapter_is_refused_where_vllm_serves_the_language_models_alone() -> None:
    switched = Rollout(engine={TOWER_OPTION: True})
    with pytest.raises(Unsupported, match="on their language model alone"):
        refuse_unserved("internvl", "adapter", switched)
    refuse_unserved("internvl", "adapter", Rollout())
    refuse_unserved("qwen2_5_vl", "adapter", switched)
