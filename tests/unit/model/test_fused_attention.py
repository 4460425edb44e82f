"""What is fused around attention computes what the model's own code computes: weights with their adapter in them,
three projections in one product, and the rotation."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers.models.gptj import modeling_gptj
from transformers.models.llama import modeling_llama

from align.data.packing import collate, text_positions
from align.model import adapters
from align.model.fused import lora as fused_lora
from align.model.fused import qkv, rotary
from align.model.fused.exchange import fuse
from align.model.fused.lora import FusedLoraLinear
from align.model.policy_module import PolicyModule
from align.model.probe.choose import probe
from align.recipe.adapter import Adapter
from tests.unit.core.families import FAMILIES, make_family, mrope_positions
from tests.unit.core.test_forward import make_model
from tests.unit.core.trees import pair
from tests.unit.model.test_fused import grads, lora
from tests.unit.model.tiny import train_a_little

ALWAYS, NEVER = 0.0, math.inf


@pytest.mark.parametrize("fold_from", [ALWAYS, NEVER])
@pytest.mark.parametrize("trained_base", [False, True])
def test_a_weight_with_its_adapter_in_it_has_pefts_values_and_gradients(
    fold_from: float, trained_base: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused_lora, "FOLD_FROM", fold_from)
    plain = lora(bias=True).double()
    for p in plain.parameters():
        p.requires_grad_(p.requires_grad or trained_base)
    ours = copy.deepcopy(plain)
    fuse(ours)
    x, g = torch.randn(40, 12).double(), torch.randn(40, 20).double()
    for mine, theirs in zip(grads(ours, x, g), grads(plain, x, g), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-12, rtol=1e-12)


def test_a_small_update_is_not_lost_in_the_rounding_of_a_half_precision_weight() -> None:
    many = 1 << 20
    assert not fused_lora.folds(many, torch.empty(8, 8, dtype=torch.bfloat16))
    assert not fused_lora.folds(many, torch.empty(8, 8, dtype=torch.float16))
    assert fused_lora.folds(many, torch.empty(8, 8))
    assert not fused_lora.folds(1, torch.empty(8, 8))


def outcome(family: str, *, exchanged: bool, reference: bool = False) -> list[Tensor]:
    """Log-probabilities of packed trees, and the adapter's gradients; with the adapter off, the first alone."""
    positions = mrope_positions if family == "qwen2_5_vl" else text_positions
    batch = collate([pair(np.random.default_rng(0), i) for i in range(3)], positions)
    model = make_family(family)
    peft = adapters.attach(model, Adapter(rank=4, alpha=8), None, seed=0)
    train_a_little(peft)
    if exchanged:
        assert fuse(model)
    module = PolicyModule(model)
    probe(module)
    if reference:
        with torch.no_grad(), adapters.use_adapter(peft, None):
            return [module(batch).logps]
    logps = module(batch).logps
    trained = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad((logps * torch.arange(len(logps))).sum(), trained, allow_unused=True)
    assert all(one.given is None for one in model.modules() if isinstance(one, FusedLoraLinear))
    return [logps, *(torch.zeros(1) if one is None else one for one in found)]


def assert_equal(mine: list[Tensor], theirs: list[Tensor]) -> None:
    largest = max(1.0, *(one.abs().max() for one in theirs))
    for a, b in zip(mine, theirs, strict=True):
        assert (a - b).abs().max() <= 1e-5 * largest


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_computes_the_same_with_its_products_joined(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = outcome(family, exchanged=False)
    monkeypatch.setattr(fused_lora, "FOLD_FROM", ALWAYS)
    assert_equal(outcome(family, exchanged=True), plain)


@pytest.mark.parametrize("family", ["qwen3", "qwen2"])
@pytest.mark.parametrize("fold_from", [ALWAYS, NEVER])
@pytest.mark.parametrize("reference", [False, True], ids=["policy", "adapter off"])
def test_projections_are_joined_over_many_rows_and_with_the_adapter_off_too(
    family: str, fold_from: float, reference: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = outcome(family, exchanged=False, reference=reference)
    monkeypatch.setattr(fused_lora, "FOLD_FROM", fold_from)
    joint: list[int] = []
    apply = qkv._Joint.apply
    monkeypatch.setattr(qkv._Joint, "apply", lambda *a: joint.append(len(a)) or apply(*a))
    assert_equal(outcome(family, exchanged=True, reference=reference), plain)
    assert bool(joint) == (fold_from == ALWAYS)


class Projections(nn.Module):
    """Asks twice, and for another input: what was given must answer once, and for its own input only."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(12, 16), nn.Linear(12, 8), nn.Linear(12, 8)

    def forward(self, x: Tensor, other: Tensor) -> list[Tensor]:
        return [f(y) for f in (self.q_proj, self.k_proj, self.v_proj) for y in (x, x, other)]


def test_a_given_result_answers_for_its_input_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from peft import LoraConfig, get_peft_model

    monkeypatch.setattr(fused_lora, "FOLD_FROM", ALWAYS)
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj"])
    model = get_peft_model(nn.Sequential(Projections()), config)
    train_a_little(model)
    module: Any = model.base_model.model[0]
    x, other = torch.randn(9, 12), torch.randn(9, 12)
    expected = module(x, other)
    fuse(model)
    assert qkv.projects_jointly(module)
    qkv.give(module, x)
    for mine, theirs in zip(module(x, other), expected, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-5)
    assert module.q_proj.given is None
    qkv.give(module, x)
    qkv.withdraw(module)
    assert module.q_proj.given is module.v_proj.given is None


@pytest.mark.parametrize("heads_axis", [1, 2])
def test_the_rotation_equals_transformers_in_values_and_gradients(heads_axis: int) -> None:
    torch.manual_seed(0)
    q, k = torch.randn(2, 6, 7, 8, dtype=torch.float64), torch.randn(2, 2, 7, 8, dtype=torch.float64)
    if heads_axis == 2:
        q, k = q.transpose(1, 2), k.transpose(1, 2)
    cos, sin = torch.randn(2, 7, 8, dtype=torch.float64), torch.randn(2, 7, 8, dtype=torch.float64)
    found = []
    for function in (modeling_llama.apply_rotary_pos_emb, rotary.rotate):
        own = [x.clone().requires_grad_() for x in (q, k)]
        turned = function(*own, cos, sin, heads_axis)
        found.append([*turned, *torch.autograd.grad(turned, own, [q.cos(), k.sin()])])
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-12, rtol=1e-12)


def test_only_the_exchanged_model_rotates_anew() -> None:
    own = modeling_llama.apply_rotary_pos_emb
    model = make_model("llama")
    fuse(model)
    attention = model.model.layers[0].self_attn
    assert type(attention).__name__ == "FusedLlamaAttention"
    assert isinstance(attention, modeling_llama.LlamaAttention)
    assert modeling_llama.apply_rotary_pos_emb is own
    assert type(make_model("llama").model.layers[0].self_attn) is modeling_llama.LlamaAttention


def test_where_a_part_of_each_head_is_turned_the_model_turns_it_itself() -> None:
    from transformers.models.qwen3_5 import modeling_qwen3_5

    own = modeling_qwen3_5.apply_rotary_pos_emb
    q, k = torch.randn(1, 4, 5, 16), torch.randn(1, 2, 5, 16)
    cos, sin = torch.randn(1, 5, 4), torch.randn(1, 5, 4)
    turn = rotary.whole_heads(own, rotary.rotate)
    for mine, theirs in zip(turn(q, k, cos, sin), own(q, k, cos, sin), strict=True):
        assert torch.equal(mine, theirs)


def interleaved(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """GPT-J's rotation: neighbours are pairs, not halves."""
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    turned = [x * cos + modeling_gptj.rotate_every_two(x) * sin for x in (q, k)]
    return turned[0], turned[1]


apply_rotary_pos_emb = interleaved


class OtherRotation(nn.Module):
    def forward(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        return apply_rotary_pos_emb(q, k, cos, sin)


def test_another_rotation_under_the_same_name_stays_as_it_is() -> None:
    module = OtherRotation()
    assert rotary.calls_rotation(module)
    assert not fuse(nn.Sequential(module)) and type(module) is OtherRotation
