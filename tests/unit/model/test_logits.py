"""Scales and caps of logits are the model's own, whatever its configuration calls them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from align.errors import ModelError
from align.model import logits
from align.model.logits import logit_transform
from tests.unit.core.families import BASE, make_family

SMALL = {**BASE, "head_dim": 8}
MAMBA = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1}
KNOWN: dict[str, tuple[dict[str, Any], float, float | None]] = {
    "llama": ({}, 1.0, None),
    "granite": ({"logits_scaling": 8.0}, 1 / 8, None),
    "hyperclovax": ({"logits_scaling": 8.0}, 8.0, None),  # the same name, and the opposite
    "cohere": ({"logit_scale": 0.25}, 0.25, None),
    "gemma2": ({"final_logit_softcapping": 3.0}, 1.0, 3.0),
    "falcon_h1": ({**MAMBA, "lm_head_multiplier": 0.5}, 0.5, None),
    "recurrent_gemma": ({"lru_width": 32, "logits_soft_cap": 3.0}, 1.0, 3.0),
    "mpt": ({"d_model": 32, "n_heads": 4, "n_layers": 1, "logit_scale": 7.0}, 1.0, None),  # named, and never used
}


def make(name: str, **options: Any) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **{**SMALL, **options}))
    with torch.no_grad():
        model.get_output_embeddings().weight.add_(0.2 * torch.randn_like(model.get_output_embeddings().weight))
    return model.eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", KNOWN)
def test_a_models_own_scale_and_cap_are_found(name: str, dtype: torch.dtype) -> None:
    options, scale, cap = KNOWN[name]
    model = make(name, **options).to(dtype)
    found = logit_transform(model, 0.7)
    assert (found.temperature, found.scale, found.softcap) == (0.7, pytest.approx(scale), cap)
    assert "forward" not in vars(model.base_model)


def test_a_head_that_does_more_is_refused_by_name() -> None:
    model = make(
        "modernbert-decoder", bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2
    )  # a layer, an activation and a norm before its output embedding
    with pytest.raises(ModelError, match=r"ModernBertDecoderForCausalLM does something .* around the output embedding"):
        logit_transform(model, 1.0)
    model = make_family("llama")
    own = model.forward

    def shifted(*args: Any, **kwargs: Any) -> Any:
        out = own(*args, **kwargs)
        out.logits[..., 5] = torch.finfo(out.logits.dtype).min  # Chameleon never says its picture tokens
        return out

    model.forward = shifted
    with pytest.raises(ModelError, match="not known"):
        logit_transform(model, 1.0)


def test_a_decoder_that_is_asked_by_another_way_is_left_to_the_probe() -> None:
    model = make("opt", ffn_dim=48, word_embed_proj_dim=32)
    assert logits._own(model) is None
    assert logit_transform(model, 1.0).scale == 1.0


def test_an_output_embedding_of_another_width_is_refused_by_name() -> None:
    model = make("rembert", is_decoder=True, output_embedding_size=64, input_embedding_size=32)
    with pytest.raises(ModelError, match=r"RemBertForCausalLM has hidden states of 32 and an output embedding .* 64"):
        logit_transform(model, 1.0)
