"""Only what computes the same for every input is exchanged: at large activations, in training mode, in half precision,
under hooks. Which parts of every supported family are is pinned, so that none loses its fused parts unseen."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.bamba.modeling_bamba import BambaRMSNormGated
from transformers.models.cohere.modeling_cohere import apply_rotary_pos_emb as cohere_rotation
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4MLP
from transformers.models.falcon_h1.modeling_falcon_h1 import FalconH1MLP
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.gemma4.modeling_gemma4 import Gemma4RMSNorm
from transformers.models.glm5_next.modeling_glm5_next import Glm5NextTextMLP
from transformers.models.helium.modeling_helium import HeliumRMSNorm
from transformers.models.idefics.modeling_idefics import IdeficsRMSNorm
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as llama_rotation
from transformers.models.llama4.modeling_llama4 import Llama4TextRMSNorm
from transformers.models.modernbert_decoder.modeling_modernbert_decoder import (
    apply_rotary_pos_emb as modernbert_rotation,
)
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm
from transformers.models.olmo2.modeling_olmo2 import apply_rotary_pos_emb as olmo_rotation
from transformers.models.phi3.modeling_phi3 import apply_rotary_pos_emb as phi_rotation
from transformers.models.seed_oss.modeling_seed_oss import SeedOssMLP
from transformers.models.step3p7.modeling_step3p7 import Step3p7MLP

from align.model import adapters
from align.model.fused import rotary
from align.model.fused.exchange import Exchange, fuse
from align.model.fused.forms import same_function
from align.recipe.adapter import Adapter
from tests.unit.core.families import FAMILIES, make_family
from tests.unit.model.test_fused import Mlp, grads

CONFIG = SimpleNamespace(
    hidden_size=16,
    intermediate_size=24,
    hidden_act="silu",
    mlp_bias=False,
    swiglu_limit=7.0,
    residual_dropout=0.5,
    mlp_multipliers=(2.0, 3.0),
    swiglu_limits_shared=(7.0,),
)


class Clamped(Mlp):
    """Equal to the plain one on every input of a usual size."""

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)).clamp(max=50.0) * self.up_proj(x))


class Dropping(Mlp):
    """Equal to the plain one outside training."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(
            self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x)), 0.5, self.training
        )


class Multiplied(Mlp):
    """Equal to the plain one with this multiplier."""

    multiplier = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x) * self.multiplier) * self.up_proj(x))


class Ordered(Mlp):
    """Equal, and not the code that is known: left alone too."""

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.up_proj(x) * self.act_fn(self.gate_proj(x)))


class Capped(nn.SiLU):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).clamp(max=50.0)


class HalfDropped(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(nn.functional.dropout(x, 0.5, self.training))


def with_a_layer_of_its_own() -> Mlp:
    module = Mlp(nn.SiLU())
    module.up_proj = HalfDropped(12, 20, bias=False)
    return module


def replaced() -> Mlp:
    module = Mlp(nn.SiLU())
    own = module.forward
    module.forward = lambda x: 2 * own(x)  # type: ignore[method-assign]
    return module


def step3p7() -> nn.Module:
    return Step3p7MLP(CONFIG, 0)


OTHERS: dict[str, Any] = {
    "DeepSeek-V4's clamp": lambda: DeepseekV4MLP(CONFIG),
    "GLM-5's clamp": lambda: Glm5NextTextMLP(CONFIG, 24),
    "Step-3.7's clamp": step3p7,
    "Seed-OSS' dropout": lambda: SeedOssMLP(CONFIG),
    "Falcon-H1's multipliers": lambda: FalconH1MLP(CONFIG),
    "a clamp": lambda: Clamped(nn.SiLU()),
    "a dropout": lambda: Dropping(nn.SiLU()),
    "a multiplier": lambda: Multiplied(nn.SiLU()),
    "another order": lambda: Ordered(nn.SiLU()),
    "an activation of its own": lambda: Mlp(Capped()),
    "a layer of its own": with_a_layer_of_its_own,
    "a forward that was put around": replaced,
    "a gated norm": lambda: BambaRMSNormGated(16),
    "a norm that looks at its weight's dtype": lambda: IdeficsRMSNorm(16),
    "a norm without weight": lambda: Gemma4RMSNorm(16, with_scale=False),
}


@pytest.mark.parametrize("case", OTHERS)
def test_what_computes_something_else_for_some_input_keeps_its_own_code(case: str) -> None:
    module = nn.Sequential(OTHERS[case]())
    kind = type(module[0])
    done = fuse(module)
    assert type(module[0]) is kind and not done
    [((name, reason), count)] = done.left.items()
    assert (name, count) == (kind.__name__, 1) and reason
    assert done.lines() == ["fused: nothing", f"not fused: 1 {name}, {reason}"]


@pytest.mark.parametrize("scale", [1.0, 10.0, 1000.0])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("case", ["Llama's", "DeepSeek-V4's clamp", "Seed-OSS' dropout", "a clamp", "a dropout"])
def test_a_fused_model_is_the_untouched_one_at_large_activations_and_in_training(
    case: str, training: bool, scale: float
) -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(LlamaMLP(CONFIG) if case == "Llama's" else OTHERS[case]()).train(training)
    ours = copy.deepcopy(plain)
    assert bool(fuse(ours)) == (case == "Llama's")
    width = plain[0].gate_proj.weight.shape[1]
    x, g = scale * torch.randn(1, 9, width), torch.randn(1, 9, width)
    found = []
    for module in (plain, ours):
        torch.manual_seed(1)
        found.append(grads(module, x, g))
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5 * float(theirs.abs().max()), rtol=1e-5)


def test_hooks_on_the_parts_of_a_feed_forward_are_called() -> None:
    module = nn.Sequential(Mlp(nn.SiLU()))
    assert fuse(module)
    x = torch.randn(3, 12)
    plain = module(x)
    module[0].gate_proj.register_forward_hook(lambda module, args, out: 0.0 * out)
    assert torch.equal(module(x), torch.zeros(3, 12)) and not torch.equal(plain, torch.zeros(3, 12))


def test_a_feed_forward_that_is_called_by_the_name_of_its_argument_answers() -> None:
    module = nn.Sequential(Mlp(nn.SiLU()))
    fuse(module)
    x = torch.randn(3, 12)
    torch.testing.assert_close(module[0](x=x), module[0](x))


NORMS = [LlamaRMSNorm, Olmo2RMSNorm, GemmaRMSNorm, Gemma4RMSNorm, HeliumRMSNorm, Llama4TextRMSNorm]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", NORMS)
def test_every_norm_that_is_exchanged_rounds_as_its_own_does(kind: type[nn.Module], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    plain = kind(64)
    with torch.no_grad():
        plain.weight.add_(0.02 * torch.randn(64))  # near 0 or 1, where bfloat16 of 1 + w would lose w
    plain = plain.to(dtype)
    ours = copy.deepcopy(plain)
    assert fuse(ours) == {kind.__name__: 1}
    x, g = (3 * torch.randn(200, 64)).to(dtype), torch.randn(200, 64).to(dtype)
    mine, theirs = grads(ours, x, g), grads(plain, x, g)
    assert [t.dtype for t in mine] == [t.dtype for t in theirs]
    if dtype == torch.float32:
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    else:  # the mean of squares is summed in another order: a rounding may fall the other way, rarely
        assert (mine[0] != theirs[0]).float().mean() < 0.01
        assert (mine[1].float() - theirs[1].float()).norm() < 5e-3 * theirs[1].float().norm()
        assert (mine[2].float() - theirs[2].float()).norm() < 1e-2 * theirs[2].float().norm()


def test_norms_with_and_without_weight_of_one_class_are_told_apart() -> None:
    model = nn.Sequential(Gemma4RMSNorm(16), Gemma4RMSNorm(16, with_scale=False))
    own = copy.deepcopy(model)
    done = fuse(model)
    assert done == {"Gemma4RMSNorm": 1} and done.left == {("Gemma4RMSNorm", "it has no weight"): 1}
    x = torch.randn(3, 16)
    torch.testing.assert_close(model(x), own(x))


ROTATIONS = {"llama": llama_rotation, "olmo": olmo_rotation, "modernbert": modernbert_rotation, "phi": phi_rotation}


@pytest.mark.parametrize("angles", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ROTATIONS)
def test_rotations_give_the_dtypes_and_values_of_the_models_own(
    name: str, dtype: torch.dtype, angles: torch.dtype
) -> None:
    torch.manual_seed(0)
    own = ROTATIONS[name]
    fused = next(f for known, f in rotary.FORMS if same_function(own, known))
    q, k = (torch.randn(1, heads, 40, 8).to(dtype) for heads in (4, 2))
    cos, sin = (torch.randn(1, 40, 8).to(angles) for _ in range(2))
    cotangents = torch.randn(1, 4, 40, 8), torch.randn(1, 2, 40, 8)

    def outcome(function: Any, *inputs: Tensor) -> list[Tensor]:
        qk = [x.clone().requires_grad_() for x in inputs[:2]]
        turned = function(*qk, *inputs[2:])
        given = [g.to(x.dtype) for g, x in zip(cotangents, turned, strict=True)]
        return [*turned, *torch.autograd.grad(turned, qk, given)]

    exact = outcome(llama_rotation, *(x.float() for x in (q, k, cos, sin)))
    ours = outcome(rotary.whole_heads(own, fused), q, k, cos, sin)
    for mine, theirs, truth in zip(ours, outcome(own, q, k, cos, sin), exact, strict=True):
        assert mine.dtype == theirs.dtype
        assert (mine.float() - truth).norm() <= 1.02 * (theirs.float() - truth).norm() + 1e-5


def test_neighbours_turned_as_pairs_are_no_halves() -> None:
    assert not any(same_function(cohere_rotation, known) for known, _ in rotary.FORMS)


def test_angles_that_are_learned_get_their_gradient() -> None:
    q, k = torch.randn(1, 4, 5, 8), torch.randn(1, 2, 5, 8)
    cos, sin = torch.randn(1, 5, 8, requires_grad=True), torch.randn(1, 5, 8, requires_grad=True)
    turned = rotary.whole_heads(llama_rotation, rotary.rotate)(q, k, cos, sin)
    grads = torch.autograd.grad(turned[0].sum(), (cos, sin))
    assert all(grad.abs().max() > 0 for grad in grads)


# modules of each supported family that are exchanged under a LoRA on all linear layers, and those that are not
EXCHANGED: dict[str, tuple[dict[str, int], set[str]]] = {
    "qwen2": ({"RMSNorm": 5, "Linear": 14, "MLP": 2, "Attention": 2}, set()),
    "qwen3": ({"RMSNorm": 9, "Linear": 14, "MLP": 2, "Attention": 2}, set()),
    "llama": ({"RMSNorm": 5, "Linear": 14, "MLP": 2, "Attention": 2}, set()),
    "mistral": ({"RMSNorm": 5, "Linear": 14, "MLP": 2, "Attention": 2}, set()),
    "gemma3_text": ({"RMSNorm": 13, "Linear": 14, "Attention": 2}, {"Gemma3MLP"}),
    "gemma2": ({"RMSNorm": 9, "Linear": 14, "Attention": 2}, {"Gemma2MLP"}),
    "gpt_oss": ({"RMSNorm": 5, "Linear": 8}, {"GptOssAttention"}),
    "qwen3_moe": ({"RMSNorm": 9, "Linear": 8, "Attention": 2}, set()),
    "deepseek_v3": ({"RMSNorm": 9, "MLP": 2, "Linear": 10, "Attention": 2}, set()),
    "qwen2_5_vl": ({"RMSNorm": 8, "Linear": 14, "MLP": 2, "Attention": 2}, {"Qwen2_5_VLMLP"}),
    "qwen3_5_text": ({"RMSNorm": 7, "Linear": 15, "MLP": 2, "Attention": 1}, {"Qwen3_5RMSNormGated"}),
    "qwen3_next": (
        {"RMSNorm": 7, "Linear": 9, "MLP": 2, "Attention": 1},
        {"Qwen3NextRMSNormGated"},
    ),
}


def by_part(done: Exchange) -> dict[str, int]:
    """Counts by the end of each class's name."""
    parts = ("RMSNorm", "MLP", "Attention", "Linear")
    return {part: n for part in parts if (n := sum(c for name, c in done.items() if name.endswith(part)))}


@pytest.mark.parametrize("family", FAMILIES)
def test_no_supported_family_loses_its_fused_parts(family: str) -> None:
    model = make_family(family)
    adapters.attach(model, Adapter(rank=4, alpha=8), None, seed=0)
    done = fuse(model)
    expected, left = EXCHANGED[family]
    assert by_part(done) == expected and sum(done.values()) == sum(expected.values())
    assert {name for name, _ in done.left} == left
    assert not fuse(model)  # once is enough
