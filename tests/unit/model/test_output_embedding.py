"""An adapter on the language model head is the function that peft computes, and begins as the base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from align.errors import ModelError, Unsupported
from align.model import adapters
from align.model.head import LogitTransform
from align.model.load import load_model
from align.model.logits import logit_transform
from align.model.output_embedding import output_of
from align.model.policy_module import OutputHead
from align.recipe.adapter import Adapter
from tests.unit.core.families import make_family
from tests.unit.model.tiny import train_a_little

LABELS = torch.arange(40) % 97
KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "rslora and dora": {"use_rslora": True, "use_dora": True},
    "a bias in lora_B": {"lora_bias": True},
}


def with_head(kind: str = "lora", *, dropout: float = 0.0, base_bias: bool = False, trained: bool = True) -> Any:
    model = make_family("qwen3", tie_word_embeddings=False)
    if base_bias or KINDS[kind].get("lora_bias"):
        model.lm_head.bias = nn.Parameter(torch.linspace(-1, 1, 97))
    config = LoraConfig(r=4, lora_alpha=8, lora_dropout=dropout, target_modules=["lm_head"], **KINDS[kind])
    peft = get_peft_model(model, config)
    if trained:
        train_a_little(peft)
        if KINDS[kind].get("use_dora"):
            with torch.no_grad():
                model.lm_head.lora_magnitude_vector["default"].weight.mul_(1.3)
    return peft.eval()


def ours(model: Any, hidden: Tensor, autocast: torch.dtype | None = None) -> Tensor:
    logps: Tensor = OutputHead(model)(hidden, LABELS, LogitTransform(), (), autocast)[0]
    return logps


def pefts(model: Any, hidden: Tensor) -> Tensor:
    return torch.log_softmax(model.lm_head(hidden).float(), -1).gather(-1, LABELS[:, None])[:, 0]


@pytest.mark.parametrize("base_bias", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients_are_pefts(kind: str, base_bias: bool) -> None:
    model = with_head(kind, base_bias=base_bias).get_base_model()
    hidden, cotangent = torch.randn(40, 32), torch.randn(40)
    found = []
    for function in (ours, pefts):
        x = hidden.clone().requires_grad_()
        trained = [p for p in model.lm_head.parameters() if p.requires_grad]
        assert len(trained) == (3 if "dora" in kind or "bias" in kind else 2)
        values = function(model, x)
        found.append([values, *torch.autograd.grad((values * cotangent).sum(), [x, *trained])])
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_with_the_adapter_off_it_is_the_base(kind: str) -> None:
    peft = with_head(kind)
    model, hidden = peft.get_base_model(), torch.randn(40, 32)
    on = ours(model, hidden)
    with peft.disable_adapter():
        torch.testing.assert_close(ours(model, hidden), pefts(model, hidden))
        assert (ours(model, hidden) - on).abs().max() > 0.01


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_a_small_update_is_not_lost_in_the_rounding_of_a_half_precision_weight(kind: str) -> None:
    model = with_head(kind, trained=False).get_base_model()
    head, hidden = model.lm_head, torch.randn(40, 32).bfloat16()
    head.get_base_layer().to(torch.bfloat16)
    update = 1e-6 * torch.linspace(-1, 1, 97)[:, None].expand(-1, 4)

    def logits() -> Tensor:
        rows, weight, _ = output_of(model, hidden)
        return rows.double() @ weight.double().T

    with torch.no_grad():
        head.lora_B["default"].weight.zero_()
        if kind == "dora":
            head.lora_magnitude_vector["default"].weight.copy_(head.get_base_layer().weight.float().norm(dim=1))
        before = logits()
        head.lora_B["default"].weight.copy_(update)
        moved = logits() - before
        whole = head.get_base_layer().weight.double()
        target = whole + head.scaling["default"] * (update.double() @ head.lora_A["default"].weight.double())
        if kind == "dora":
            target *= whole.norm(dim=1, keepdim=True) / target.norm(dim=1, keepdim=True)
        expected = hidden.double() @ (target - whole).T
    assert expected.norm() > 0
    assert (moved - expected).norm() < 0.05 * expected.norm()


def test_dropout_on_the_head_is_drawn_in_training_and_only_there() -> None:
    model = with_head("lora", dropout=0.5).get_base_model()
    hidden = torch.randn(40, 32)
    torch.testing.assert_close(ours(model, hidden), pefts(model, hidden), atol=2e-5, rtol=1e-4)
    model.train()
    found = []
    for function in (ours, pefts):
        torch.manual_seed(3)
        found.append(function(model, hidden))
    torch.testing.assert_close(found[0], found[1], atol=2e-5, rtol=1e-4)
    assert (ours(model, hidden) - ours(model, hidden)).abs().max() > 0


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_a_head_in_bfloat16_is_held_to_the_rounding_of_pefts_own_forward(kind: str) -> None:
    """DoRA's product is float32 here and bfloat16 in peft: logits that differ by its rounding are no other function."""
    model = make_family("qwen3", tie_word_embeddings=False).bfloat16()
    get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=["lm_head"], **KINDS[kind]))
    assert logit_transform(model, 1.0) == LogitTransform()
    hidden = torch.randn(40, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert (ours(model, hidden) - pefts(model, hidden)).abs().max() < 0.05


def test_dora_with_dropout_on_the_head_is_refused_by_name() -> None:
    model = with_head("dora", dropout=0.5).get_base_model()
    output_of(model, torch.randn(2, 32))
    with pytest.raises(Unsupported, match="DoRA with dropout"):
        output_of(model.train(), torch.randn(2, 32))


@pytest.mark.parametrize("targets", [("lm_head",), ("q_proj",)])
def test_dora_on_rows_of_zeros_is_refused_with_their_number(tmp_path: Path, targets: tuple[str, ...]) -> None:
    model = make_family("qwen3", tie_word_embeddings=True)
    with torch.no_grad():
        model.lm_head.weight[0] = 0
        model.model.layers[1].self_attn.q_proj.weight[3:5] = 0
    model.save_pretrained(tmp_path)
    loaded = load_model(tmp_path, dtype=torch.float32)
    adapter = Adapter(kind="dora", rank=4, alpha=8, targets=targets)
    with pytest.raises(ModelError, match=r"1 of the 97 rows|2 of the 64 rows") as error:
        adapters.attach(loaded, adapter, None, seed=0)
    assert "adapter.targets" in str(error.value) and "kind: lora" in str(error.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dora_begins_as_its_base_to_the_last_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    make_family("qwen3", tie_word_embeddings=True).to(dtype).save_pretrained(tmp_path)
    model = load_model(tmp_path, dtype=dtype)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        before = model(input_ids=ids).logits
        adapters.attach(model, Adapter(kind="dora", rank=4, alpha=8, targets=("q_proj", "up_proj")), None, seed=0)
        assert torch.equal(model(input_ids=ids).logits, before)
