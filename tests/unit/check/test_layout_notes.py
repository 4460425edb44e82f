"""What `align check` says of a model's layout from its config.json, and that the probe at load finds the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from align.check.layout_notes import layout_notes
from align.model.policy_module import PolicyModule
from align.model.probe.choose import probe
from tests.unit.core.families import BASE, FAMILIES, STATEFUL, make_family

LONGROPE = {
    "max_position_embeddings": 512,
    "original_max_position_embeddings": 32,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 4,
        "long_factor": [1.5, 2.0, 4.0, 8.0],
        "original_max_position_embeddings": 32,
    },
}


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "qwen2_5_vl"])
def test_a_family_with_state_is_known_before_it_is_loaded(family: str) -> None:
    config = make_family(family).config.to_dict()
    said = " ".join(layout_notes(config, 1000))
    assert ("carry a state" in said) == (family in STATEFUL)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("lfm2", {"layer_types": ["conv", "full_attention"]}),
        ("mamba", {"state_size": 8}),
        ("jamba", {"num_experts": 2, "mamba_d_state": 4, "mamba_dt_rank": 4, "use_mamba_kernels": False}),
        ("falcon_h1", {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8}),
    ],
)
def test_the_probe_agrees_that_a_kind_carries_a_state(kind: str, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(BASE | options)))
    assert "carry a state" in layout_notes(model.config.to_dict(), 10)[0]
    module = PolicyModule(model.eval())
    probe(module)
    assert module.verdict is not None and module.layout == "padded"
    assert "carries a state from one sequence to the next" in module.verdict.why[0]


def test_lengths_that_change_rotary_frequencies_are_noted_where_the_data_reach_them() -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model("phi3", **(BASE | LONGROPE | {"num_attention_heads": 4, "sliding_window": None}))
    module = PolicyModule(AutoModelForCausalLM.from_config(config).eval())
    probe(module)
    assert layout_notes(config.to_dict(), 32) == []
    [note] = layout_notes(config.to_dict(), 33)
    assert "beyond 32 tokens" in note and "longrope" in note
    assert module.lengths is not None and module.lengths.limit == 32 and "model.rotary_emb" in module.lengths.words
