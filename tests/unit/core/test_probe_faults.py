"""Faults planted in what is computed instead of a model's own forward: found in both dtypes, whatever the noise, and
named by the module that makes them. Models here are loud: their bfloat16 is as far off as a pretrained model's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from align.errors import ModelError
from align.model import head, policy_module
from align.model.attention import interface
from align.model.attention.plan import AttentionPlan
from align.model.fused import rotary
from align.model.fused.exchange import fuse
from align.model.policy_module import PolicyModule
from align.model.probe.choose import probe
from align.model.probe.own import measure
from align.model.probe.verdict import Verdict
from tests.unit.core.families import BASE, FAMILIES, make_family

DTYPES = [torch.float32, torch.bfloat16]
LFM2 = {"layer_types": ["conv", "full_attention", "conv"], "num_hidden_layers": 3}


def loud(family: str, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """A model whose logits are pretrained-like: of 6 layers, its matrices enlarged."""
    if "layer_types" in FAMILIES[family]:
        options["layer_types"] = 3 * FAMILIES[family]["layer_types"]
    model = make_family(family, num_hidden_layers=6, **options)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "embed" not in name:
                parameter.mul_(2.5)
            if name == "lm_head.weight":
                parameter.mul_(3)
    return model.to(dtype)


def verdict_of(model: Any, plant: Callable[[Any], object] = lambda model: None, **options: Any) -> Verdict:
    """The verdict on a model that was measured, then exchanged, then had `plant` done to it."""
    untouched = measure(model, **options)
    fuse(model)
    plant(model)
    module = PolicyModule(model, **options)
    module.untouched = untouched
    probe(module)
    assert module.verdict is not None
    return module.verdict


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama", "gpt_oss"])
def test_a_loud_model_in_bfloat16_stays_packed(family: str) -> None:
    verdict = verdict_of(loud(family, torch.bfloat16))
    assert verdict.own_error > 0.03  # what the bound of 0.05 between two such forwards would have refused
    assert (verdict.layout, verdict.attention, verdict.why) == ("shared", "sdpa", ())
    assert verdict.error < 4 * verdict.own_error


def test_float32_with_logits_in_the_thousands_stays_packed() -> None:
    model = loud("llama")
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(500)
    verdict = verdict_of(model)
    assert (verdict.layout, verdict.why) == ("shared", ()) and verdict.difference > 1e-3  # the old bound


class Carried(nn.Module):
    """A feed-forward that adds what the token before was given, a thousandth of it."""

    def __init__(self, own: nn.Module):
        super().__init__()
        self.own = own

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.own(x) + 1e-3 * nn.functional.pad(x, (0, 0, 1, 0))[:, :-1]


def carry(model: Any) -> None:
    model.model.layers[3].mlp = Carried(model.model.layers[3].mlp)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_state_that_an_exchanged_layer_carries_is_found_in_every_layout(dtype: torch.dtype) -> None:
    with pytest.raises(Exception, match=r"model\.layers\.3\.mlp is .* of its size away"):
        verdict_of(loud("llama", dtype), carry)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_models_own_state_gets_a_row_a_sequence_by_name(dtype: torch.dtype) -> None:
    model = loud("llama", dtype)
    carry(model)
    verdict = verdict_of(model)
    assert verdict.layout == "padded"
    assert "model.layers.3.mlp is" in verdict.why[0] and "carries a state" in verdict.why[0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1e-3, 1.0])
def test_a_fresh_hybrid_is_stateful_however_small_its_weights_are(dtype: torch.dtype, scale: float) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("lfm2", **(BASE | LFM2)))
    with torch.no_grad():
        for layer in model.model.layers:
            for parameter in layer.parameters():
                parameter.mul_(scale if parameter.ndim > 1 else 1.0)
    verdict = verdict_of(model.to(dtype))
    assert verdict.layout == "padded" and "model.layers.0.conv is" in verdict.why[0]


class Clamped(nn.Module):
    """A gated feed-forward whose gate stops at 7, as several families have it."""

    def __init__(self, own: Any):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj, self.act_fn = (
            own.gate_proj,
            own.up_proj,
            own.down_proj,
            own.act_fn,
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_proj(x).clamp(max=7), self.up_proj(x).clamp(-7, 7)
        return self.down_proj(self.act_fn(gate) * up)


class FusedClamped(Clamped):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_clamp_that_an_exchange_dropped_is_found_and_the_exchange_is_given_back(dtype: torch.dtype) -> None:
    """The clamp acts on none of the probe's tokens; the rest of the model keeps its exchanged parts and its layout."""
    model = make_family("llama").to(dtype)
    for layer in model.model.layers:
        layer.mlp = Clamped(layer.mlp).to(dtype)

    def drop(model: Any) -> None:
        for layer in model.model.layers:
            layer.mlp.__class__ = FusedClamped

    verdict = verdict_of(model, drop)
    assert verdict.layout == "shared"
    [why] = [why for why in verdict.why if "Clamped" in why]
    assert why.startswith("2 x Clamped keep their own, slower forward") and "model.layers.0.mlp" in why
    assert all(type(layer.mlp) is Clamped for layer in model.model.layers)
    assert type(model.model.norm).__name__.startswith("Fused")


def clamped(dtype: torch.dtype) -> Any:
    model = make_family("llama").to(dtype)
    for layer in model.model.layers:
        layer.mlp = Clamped(layer.mlp).to(dtype)
    return model


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_clamp_that_somebody_else_dropped_is_refused_in_every_layout(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing can be given back then, and no row of the probe shows it."""

    def drop(model: Any) -> None:
        monkeypatch.setattr(Clamped, "forward", FusedClamped.forward)

    with pytest.raises(ModelError, match=r"model\.layers\.0\.mlp is .* of its size away .* on large activations"):
        verdict_of(clamped(dtype), drop)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_clamp_that_packed_rows_alone_lose_costs_them_the_layout(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, right = clamped(dtype), Clamped.forward

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        packed = model.config._attn_implementation == interface.NAME
        return (FusedClamped.forward if packed else right)(self, x)

    verdict = verdict_of(model, lambda model: monkeypatch.setattr(Clamped, "forward", forward))
    assert verdict.layout == "padded" and "on large activations" in verdict.why[0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_wrong_rotation_is_found_and_the_attention_keeps_its_own(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    right: Any = rotary._Rotate

    class Scaled:
        @staticmethod
        def apply(x: Any, cos: Any, sin: Any) -> Any:
            return right.apply(x, 1.01 * cos, 1.01 * sin)

    model = loud("llama", dtype)
    untouched = measure(model)
    fuse(model)
    monkeypatch.setattr(rotary, "_Rotate", Scaled)
    module = PolicyModule(model)
    module.untouched = untouched
    probe(module)
    verdict = module.verdict
    assert verdict is not None and verdict.layout == "shared"
    assert any("LlamaAttention keep their own" in why and "self_attn" in why for why in verdict.why)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_bias_that_was_lost_is_named(dtype: torch.dtype) -> None:
    model = loud("qwen2", dtype)
    with torch.no_grad():
        model.model.layers[4].self_attn.q_proj.bias.normal_(0, 0.1)

    def lose(model: Any) -> None:
        model.model.layers[4].self_attn.q_proj.bias.data.zero_()

    with pytest.raises(Exception, match=r"model\.layers\.4\.self_attn\.q_proj is"):
        verdict_of(model, lose)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fault", ["parents", "neighbours", "ahead", "window"])
def test_a_wrong_view_of_the_packed_row_falls_back_by_name(
    dtype: torch.dtype, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    right, family = interface.sdpa_attention, "mistral" if fault == "window" else "llama"

    def seen(q: Any, k: Any, v: Any, plan: Any, **how: Any) -> Any:
        segments = [(a, b, 0, 0) if fault == "parents" else (a, b, c, d) for a, b, c, d in plan.segments]
        if fault == "neighbours":
            segments = [(0, segments[-1][1], 0, 0)]
        if fault == "window":
            how["sliding_window"] = None
        out = right(q, k, v, AttentionPlan(segments, plan.device), **how)
        return out + 1e-2 * out.roll(-1, dims=1) if fault == "ahead" else out

    monkeypatch.setattr(interface, "sdpa_attention", seen)
    verdict = verdict_of(loud(family, dtype))
    assert verdict.layout == "padded" and "model.layers.0.self_attn is" in verdict.why[0]
    assert not any("keep their own" in why for why in verdict.why)  # the exchanged rotation is not at fault
    assert ("sees its neighbours" in verdict.why[0]) == (fault in ("neighbours", "ahead"))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_head_that_forgets_a_cap_is_named_as_what_it_is(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    model = loud("gemma2", dtype)
    monkeypatch.setattr(policy_module, "logit_transform", lambda config, t: head.LogitTransform(t, 1.0, None))
    with pytest.raises(Exception, match="its layers agree, what makes logits or scores of their output does not"):
        verdict_of(model)


def test_an_adapter_whose_product_is_scaled_otherwise_is_found_though_it_is_fresh(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from align.model import adapters
    from align.model.fused.lora import FusedLoraLinear
    from align.recipe.adapter import Adapter

    model = make_family("llama")
    adapters.attach(model, Adapter(rank=4, alpha=8), None, seed=0)
    source = FusedLoraLinear.source

    def halved(self: Any, x: Any) -> Any:
        found = source(self, x)
        return None if found is None else found._replace(scaling=found.scaling / 2)

    monkeypatch.setattr(FusedLoraLinear, "source", halved)
    verdict = verdict_of(model)
    assert verdict.layout == "shared" and any("x Linear keep their own" in why for why in verdict.why)
    assert all(not p.count_nonzero() for n, p in model.named_parameters() if "lora_B" in n)  # as fresh as before


def test_attention_of_each_kernel_is_held_against_float32_on_its_own_input() -> None:
    told: list[float] = []
    module = PolicyModule(loud("llama", torch.bfloat16))
    probe(module)
    module.use("shared", "flex")
    from align.model.probe.rows import two_tree_batch

    batch, _ = two_tree_batch(97, "cpu")
    with torch.no_grad(), interface.witnessed(told.append):
        module(batch)
    assert len(told) == 6 and max(told) < 4
