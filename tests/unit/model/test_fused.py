"""Fused modules compute what the modules that they replace compute; what is something else stays as it was."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from align.data.packing import collate
from align.model.fused import mlp as fused_mlp
from align.model.fused.exchange import fuse
from align.model.fused.lora import FusedLoraLinear
from align.model.policy_module import PolicyModule
from tests.unit.core.test_forward import make_model
from tests.unit.core.trees import pair
from tests.unit.model.tiny import train_a_little


def grads(module: nn.Module, x: Tensor, cotangent: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    y = module(x).mul_(1.0)  # as models do that change in place what a layer returned
    parameters = [p for p in module.parameters() if p.requires_grad]
    return [y.detach(), *torch.autograd.grad(y, [x, *parameters], cotangent.to(y.dtype))]


def lora(bias: bool = False, dropout: float = 0.0, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    model = get_peft_model(
        nn.Sequential(nn.Linear(12, 20, bias=bias)),
        LoraConfig(r=4, lora_alpha=6, target_modules=["0"], lora_dropout=dropout, **options),
    )
    train_a_little(model)
    return model


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("trained_base", [False, True])
def test_lora_values_and_gradients_equal_pefts(bias: bool, trained_base: bool) -> None:
    plain = lora(bias).double()
    for p in plain.parameters():
        p.requires_grad_(p.requires_grad or trained_base)
    fused = copy.deepcopy(plain)
    assert fuse(fused) == {"Linear": 1}
    x, g = torch.randn(2, 5, 12).double(), torch.randn(2, 5, 20).double()
    for mine, theirs in zip(grads(fused, x, g), grads(plain, x, g), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-12, rtol=1e-12)


def test_lora_gradients_equal_finite_differences() -> None:
    model = lora(bias=True).double()
    fuse(model)
    assert torch.autograd.gradcheck(model, [torch.randn(3, 12).double().requires_grad_()])


def test_a_bfloat16_base_with_float32_masters_computes_in_bfloat16_and_learns_in_float32() -> None:
    exact = lora()
    model = copy.deepcopy(exact)
    base = model.base_model.model[0].get_base_layer()
    base.to(torch.bfloat16)
    fuse(model)
    x, g = torch.randn(64, 12), torch.randn(64, 20)
    found, expected = grads(model, x.bfloat16(), g), grads(exact, x, g)
    assert [t.dtype for t in found] == [torch.bfloat16, torch.bfloat16, torch.float32, torch.float32]
    for mine, theirs in zip(found, expected, strict=True):
        assert (mine.float() - theirs).norm() / theirs.norm() < 0.02


@pytest.mark.parametrize("case", ["dropout", "dora", "disabled", "two adapters", "merged", "other dtype"])
def test_what_is_not_one_plain_adapter_runs_pefts_own_code(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = lora(dropout=0.5 if case == "dropout" else 0.0, use_dora=case == "dora").train()
    x = torch.randn(4, 12)
    layer = model.base_model.model[0]
    if case == "two adapters":
        model.add_adapter("second", LoraConfig(r=4, target_modules=["0"]))
        model.base_model.set_adapter(["default", "second"])
    elif case == "merged":
        model.merge_adapter()
    elif case == "disabled":
        layer.enable_adapters(False)
    elif case == "other dtype":
        x = x.double()
        model = model.double()
        layer.lora_A.float(), layer.lora_B.float()
        layer.get_base_layer().float()
        x = x.float().bfloat16()
    calls: list[str] = []
    original = LoraLinear.forward
    monkeypatch.setattr(LoraLinear, "forward", lambda self, *a, **k: calls.append("peft") or original(self, *a, **k))
    fuse(model)
    assert type(layer) is FusedLoraLinear
    if case == "other dtype":
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model(x)
    else:
        model(x)
    assert calls == ["peft"]


@pytest.mark.parametrize("kind", [Qwen3RMSNorm, Gemma3RMSNorm])
@pytest.mark.parametrize("shape", [(7, 16), (2, 3, 5, 16)])
def test_norms_equal_the_models_own(kind: type[nn.Module], shape: tuple[int, ...]) -> None:
    plain = kind(16)
    with torch.no_grad():
        plain.weight.add_(0.3 * torch.randn(16))
    fused = copy.deepcopy(plain)
    assert fuse(fused) == {kind.__name__: 1}
    x, g = 3 * torch.randn(shape), torch.randn(shape)
    for mine, theirs in zip(grads(fused, x, g), grads(plain, x, g), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)


def test_a_norm_in_bfloat16_is_as_close_to_the_exact_one_as_the_models_own() -> None:
    exact = Qwen3RMSNorm(64)
    x, g = torch.randn(50, 64).bfloat16(), torch.randn(50, 64).bfloat16()
    expected = grads(exact, x.float(), g.float())
    plain = copy.deepcopy(exact).bfloat16()
    fused = copy.deepcopy(plain)
    fuse(fused)
    for mine, theirs, truth in zip(grads(fused, x, g), grads(plain, x, g), expected, strict=True):
        assert mine.dtype == theirs.dtype
        assert (mine.float() - truth).norm() < 1.2 * (theirs.float() - truth).norm() + 1e-6


class Lookalike(nn.Module):
    """A norm by its parts, and another function: it subtracts the mean."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(8)), 1e-6

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return self.weight * centred * torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + self.eps)


class Gated(Lookalike):
    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        return super().forward(x) * gate


@pytest.mark.parametrize("kind", [Lookalike, Gated])
def test_a_module_that_computes_something_else_keeps_its_own_forward(kind: type[nn.Module]) -> None:
    module = kind()
    assert not fuse(module) and type(module) is kind


@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_a_whole_model_computes_the_same_fused(family: str) -> None:
    from align.model import adapters
    from align.recipe.adapter import Adapter

    batch = collate([pair(torch_rng(), i) for i in range(3)])
    results = []
    for fused in (False, True):
        model = make_model(family)
        peft = adapters.attach(model, Adapter(rank=4, alpha=8), None, seed=0)
        train_a_little(peft)
        if fused:
            counts = fuse(model)
            assert counts["Linear"] == 14 and sum(counts.values()) >= 14 + 5
        logps = PolicyModule(model)(batch).logps
        trained = [p for p in model.parameters() if p.requires_grad]
        results.append([logps, *torch.autograd.grad((logps * torch.arange(len(logps))).sum(), trained)])
    for mine, theirs in zip(*results, strict=True):
        assert (mine - theirs).abs().max() <= 1e-5 * theirs.abs().max().clamp(min=1.0)


def torch_rng() -> Any:
    import numpy as np

    return np.random.default_rng(0)


class Mlp(nn.Module):
    def __init__(self, act: nn.Module, bias: bool = False) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.gate_proj, self.up_proj = nn.Linear(12, 20, bias=bias), nn.Linear(12, 20, bias=bias)
        self.down_proj, self.act_fn = nn.Linear(20, 12, bias=bias), act

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def mlp(targets: list[str], act: nn.Module | None = None, bias: bool = False) -> nn.Module:
    module = nn.Sequential(Mlp(act or nn.SiLU(), bias))
    if not targets:
        return module
    model = get_peft_model(module, LoraConfig(r=4, lora_alpha=6, target_modules=targets))
    train_a_little(model)
    return model


@pytest.mark.parametrize("targets", [[], ["gate_proj"], ["down_proj"], ["gate_proj", "up_proj", "down_proj"]], ids=str)
@pytest.mark.parametrize("trained_base", [False, True])
@pytest.mark.parametrize("rows", [0, 1, 7, 300])
def test_a_gated_feed_forward_equals_the_models_own(
    targets: list[str], trained_base: bool, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused_mlp, "MIN_ROWS", 64)
    monkeypatch.setattr(fused_mlp, "SLICE_ELEMENTS", 1)
    plain = mlp(targets).double()
    for p in plain.parameters():
        p.requires_grad_((p.requires_grad and bool(targets)) or trained_base)
    fused = copy.deepcopy(plain)
    assert fuse(fused)["Mlp"] == 1
    x, g = torch.randn(1, rows, 12).double(), torch.randn(1, rows, 12).double()
    for mine, theirs in zip(grads(fused, x, g), grads(plain, x, g), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-10, rtol=1e-10)
    with torch.no_grad():
        torch.testing.assert_close(fused(x), plain(x), atol=1e-10, rtol=1e-10)


def test_a_gated_feed_forward_with_its_adapter_off_is_the_bases() -> None:
    model = mlp(["gate_proj", "up_proj", "down_proj"])
    base = mlp([])
    fuse(model)
    x = torch.randn(5, 12)
    with model.disable_adapter():
        torch.testing.assert_close(model(x), base(x))
    assert (model(x) - base(x)).abs().max() > 0.01


@pytest.mark.parametrize("module", [mlp([], nn.GELU()), mlp([], bias=True)], ids=["gelu", "bias"])
def test_another_feed_forward_keeps_its_own_forward(module: nn.Module) -> None:
    assert not fuse(module)


def test_a_feed_forward_in_bfloat16_is_as_close_to_the_exact_one_as_the_models_own() -> None:
    exact = mlp([])
    x, g = torch.randn(200, 12).bfloat16(), torch.randn(200, 12).bfloat16()
    expected = grads(exact, x.float(), g.float())
    plain = copy.deepcopy(exact).bfloat16()
    fused = copy.deepcopy(plain)
    assert fuse(fused)["Mlp"] == 1
    for mine, theirs, truth in zip(grads(fused, x, g), grads(plain, x, g), expected, strict=True):
        assert mine.dtype == theirs.dtype
        assert (mine.float() - truth).norm() < 1.2 * (theirs.float() - truth).norm() + 1e-3 * truth.norm()
