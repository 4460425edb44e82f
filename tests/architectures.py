"""A tiny model of every name in transformers' mapping of causal language models, random weights, or why none is made.

Sizes are given by what the field calls them; a configuration takes those that it knows, and its parts (text, vision)
the same. What a family needs beside that stands in OWN.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch

VOCABULARY = 97
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "max_position_embeddings": 512,
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "embedding_size", "dim"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "encoder_ffn_dim", "decoder_ffn_dim"), 48),
    "ffn_hidden_size": 48,
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"), 2),
    "encoder_layers": 1,
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "attention_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    "num_key_value_heads": 2,
    "head_dim": 8,
    "n_positions": 512,
    "sliding_window": 8,
    "attention_window": 8,
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    "num_experts_per_tok": 2,
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 24),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace", "n_shared_experts", "num_shared_experts"), 1),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 8),
    **dict.fromkeys(("linear_num_key_heads",), 2),
    "linear_num_value_heads": 4,
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 8),
    **dict.fromkeys(("state_size", "mamba_n_heads", "mamba_d_head", "mamba_d_state"), 8),
    "mamba_n_groups": 1,
    "mamba_d_conv": 4,
    "depth": 1,
    "num_heads": 4,
}
LATENT = {"num_key_value_heads": 4}  # heads of latent attention all have keys of their own
INDEXED = {**LATENT, "index_topk": 16, "index_n_heads": 32, "index_head_dim": 16}  # few heads: scores of 0, ties
PARTIAL = {"rotary_dim": 8}
PLAIN_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
SECTIONED = {**PLAIN_ROPE, "mrope_section": [1, 1, 2]}
WINDOWED = ["sliding_attention", "full_attention"]
OWN: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("axk1", "axk2", "deepseek_v2", "deepseek_v3", "glm4_moe_lite", "longcat_flash"), LATENT),
    **dict.fromkeys(("minicpm3", "youtu"), LATENT),
    **dict.fromkeys(("deepseek_v32", "glm_moe_dsa"), INDEXED),
    **dict.fromkeys(("codegen", "gptj"), PARTIAL),
    "cohere_compass_text": {
        "layer_types": WINDOWED,
        "rope_parameters": {"sliding_attention": SECTIONED, "full_attention": SECTIONED},
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma2": {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0, "query_pre_attn_scalar": 8},
    "gemma3_text": {"layer_types": WINDOWED},
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "layer_types": WINDOWED * 2,
        "num_kv_shared_layers": 2,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": VOCABULARY,
        "laurel_rank": 4,
        "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
    },
    "gemma4_text": {
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": VOCABULARY,
        "layer_types": WINDOWED,
        "global_head_dim": 8,
    },
    "got_ocr2": {
        "text_config": {
            "model_type": "qwen2",
            **dict.fromkeys(("bos_token_id", "eos_token_id"), 1),
            "vocab_size": 97,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "pad_token_id": 0,
        },
        "vision_config": {
            "hidden_size": 32,
            "output_channels": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "image_size": 64,
            "mlp_dim": 48,
            "global_attn_indexes": [0],
        },
        "image_token_id": 5,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2, "window_size": 8},
    "granite": {"logits_scaling": 8.0, "embedding_multiplier": 2.0, "residual_multiplier": 0.5},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8, "head_dim": 8, "expand": 2, "n_groups": 1},
    "reformer": {"is_decoder": True, "axial_pos_shape": [16, 32], "axial_pos_embds_dim": [16, 16]},
    "roc_bert": {
        "pronunciation_vocab_size": VOCABULARY,
        "shape_vocab_size": VOCABULARY,
        "shape_embed_dim": 32,
        "pronunciation_embed_dim": 32,
    },
    "xmod": {"default_language": "en_XX", "languages": ["en_XX"]},
    "zamba": {"num_hidden_layers": 4, "layer_types": ["mamba", "hybrid"] * 2, "mamba_dt_rank": 4},
    "zamba2": {
        "num_hidden_layers": 4,
        "layers_block_type": ["mamba", "hybrid"] * 2,
        "hybrid_layer_ids": [1, 3],
        "mamba_ngroups": 1,
        "n_mamba_heads": 8,
        "mamba_headdim": 8,
    },
    "zaya": {"num_experts_per_tok": 1},
}
# the same architectures, told what their configurations also allow
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama, llama3 rotary": ("llama", {"rope_parameters": {
        "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16}}),
    "llama, yarn rotary": ("llama", {"rope_parameters": {
        "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}}),
    "llama, linear rotary": ("llama", {"rope_parameters": {
        "rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}}),
    "llama, dynamic rotary": ("llama", {"max_position_embeddings": 32, "rope_parameters": {
        "rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}}),
    "phi3, longrope": ("phi3", {"original_max_position_embeddings": 32, "sliding_window": None, "rope_parameters": {
        "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4, "long_factor": [1.5, 2.0, 4.0, 8.0],
        "original_max_position_embeddings": 32}}),
    "llama, biases": ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "falcon, alibi": ("falcon", {"alibi": True, "new_decoder_architecture": False}),
    "olmo, clipped": ("olmo", {"clip_qkv": 0.5}),
    "stablelm, norms of queries": ("stablelm", {"qk_layernorm": True, "use_parallel_residual": True}),
    "qwen2, windows": ("qwen2", {"use_sliding_window": True, "max_window_layers": 1}),
}  # fmt: skip
# encoders' names, asked to look back only: what they are called a decoder for
DECODERS = {"is_decoder": True}


def small_config(name: str) -> Any:
    """The configuration of a model type of transformers, or of one of VARIANTS, with tiny sizes, its parts included."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind, more = VARIANTS.get(name, (name, {}))
    return _small(CONFIG_MAPPING[kind], {**OWN.get(kind, {}), **more})


def _small(kind: Any, own: dict[str, Any]) -> Any:
    known = _fields(kind)
    sizes = {**SIZES, **(DECODERS if "is_decoder" in known else {})}
    settings = {field: size for field, size in sizes.items() if field in known}
    for alias, field in getattr(kind, "attribute_map", {}).items():
        if alias in settings and field in settings:
            settings.pop(alias)
    parts = {
        part: _small(sub, OWN.get(getattr(sub, "model_type", ""), {})).to_dict()
        for part, sub in (getattr(kind, "sub_configs", None) or {}).items()
        if inspect.isclass(sub) and getattr(sub, "model_type", "") not in ("", "auto")
    }
    return kind(**{**settings, **parts, **own})


def _fields(kind: Any) -> set[str]:
    """What a configuration class takes, its ancestors' included."""
    found: set[str] = set(getattr(kind, "attribute_map", {}))
    for ancestor in kind.__mro__:
        found |= set(getattr(ancestor, "__annotations__", {}))
        if "__init__" in ancestor.__dict__:
            found |= set(inspect.signature(ancestor.__init__).parameters)
    return found


def make(name: str, seed: int = 0, scale: float = 4.0) -> Any:
    """A float32 model of what `small_config` calls `name`, in eval mode. Matrices are `scale` times what is drawn, so
    that attention is sharp and logits are as wide as a pretrained model's."""
    from transformers import AutoModelForCausalLM

    config = small_config(name)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(scale)
    return model
