"""Tiny models of every family that the forward is proved on: random weights, each with what sets its family apart."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from align.protocols.trees import Tree

BASE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
ALTERNATING = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}
LINEAR = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
# Windows are shorter than the sequences; caps are near the scores, so that they bend them.
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "llama": {},
    "mistral": {"sliding_window": 5},
    "gemma3_text": {"head_dim": 16, "query_pre_attn_scalar": 24, **ALTERNATING},
    "gemma2": {
        "head_dim": 16,
        "query_pre_attn_scalar": 24,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 4.0,
        **ALTERNATING,
    },
    "gpt_oss": {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, **ALTERNATING},
    "qwen3_moe": {"head_dim": 16, **EXPERTS},
    "deepseek_v3": {  # values narrower than keys
        "num_key_value_heads": 4,
        "q_lora_rank": 8,
        "kv_lora_rank": 8,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 12,
        "n_routed_experts": 4,
        "n_group": 1,
        "topk_group": 1,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "first_k_dense_replace": 1,
    },
    "qwen2_5_vl": {"rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}},
    "qwen3_5_text": {"head_dim": 16, **LINEAR},
    "qwen3_next": {"head_dim": 16, "shared_expert_intermediate_size": 16, **LINEAR, **EXPERTS},
}
STATEFUL = ("qwen3_5_text", "qwen3_next")
VISION = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}


def make_family(family: str, seed: int = 0, **options: Any) -> Any:
    """A float32 model, its own attention eager: the one that all families define themselves by."""
    settings = {**BASE, **FAMILIES[family], **options}
    torch.manual_seed(seed)
    if family == "qwen2_5_vl":
        config = AutoConfig.for_model(family, text_config=settings, vision_config=VISION)
        model = AutoModelForImageTextToText.from_config(config, attn_implementation="eager")
    else:
        config = AutoConfig.for_model(family, **settings)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model.eval()


def mrope_positions(tree: Tree) -> tuple[np.ndarray, list[np.ndarray]]:
    """Positions i64[3, n] of text under M-RoPE: three equal axes."""
    n = len(tree.trunk)
    return np.tile(np.arange(n), (3, 1)), [np.tile(np.arange(n, n + len(b)), (3, 1)) for b in tree.branches]
