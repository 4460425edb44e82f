"""Weights in four bits: which they are, that they are what transformers would load, and that nothing else is kept."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from align.errors import ModelError, Unsupported
from align.model import adapters
from align.model.fused.exchange import fuse
from align.model.load import load_model
from align.model.quantised import QuantisedLinear, quantise, quantised_layers
from align.recipe.adapter import Adapter, Quant
from align.recipe.adapter_folder import QUANTISED, QuantisedBase, quantised_base
from tests.unit.core.families import make_family
from tests.unit.model.tiny import LLAMA, QWEN3, logits, lora, train_a_little, write_tiny

LANGUAGE = ("language",)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {"qwen3": write_tiny(folder / "qwen3", QWEN3), "llama": write_tiny(folder / "llama", LLAMA)}


def packed_model(folder: Path, quant: Quant | None = None, dtype: torch.dtype = torch.float32):
    model = load_model(folder, dtype=dtype)
    quantise(model, quant or Quant(), LANGUAGE, dtype=dtype)
    return model


@pytest.mark.parametrize("name", ["qwen3", "llama"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("quant", [Quant(), Quant(type="fp4", double=False)], ids=["nf4 double", "fp4"])
def test_a_packed_model_is_bit_for_bit_what_transformers_loads_in_four_bits(bases, name, dtype, quant):
    theirs = AutoModelForCausalLM.from_pretrained(
        bases[name],
        dtype=dtype,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=quant.type,
            bnb_4bit_use_double_quant=quant.double,
            bnb_4bit_compute_dtype=dtype,
        ),
    ).train()  # in eval mode, bitsandbytes computes with kernels of its own on some CPUs
    assert torch.equal(logits(packed_model(bases[name], quant, dtype)), logits(theirs))


def test_linear_layers_of_the_blocks_are_packed_and_nothing_else_is(bases):
    model = packed_model(bases["llama"])
    assert len(quantised_layers(model)) == 14
    plain = [name for name, module in model.named_modules() if type(module) is nn.Linear]
    assert plain == ["lm_head"] and type(model.get_input_embeddings()) is nn.Embedding
    assert not any(layer.weight.requires_grad for layer in quantised_layers(model).values())
    weight = model.model.layers[0].mlp.up_proj.weight
    assert weight.numel() * weight.element_size() == 32 * 48 // 2


def test_a_tower_is_packed_where_it_takes_lora():
    for tune, wanted in (({}, {"language"}), ({"vision": "lora"}, {"vision", "language"})):
        adapter = Adapter.model_validate({"kind": "qlora", "tune": tune})
        assert set(adapter.quantised_parts) == wanted
    model = make_family("qwen2_5_vl")
    places = quantise(model, Quant(), ("vision", "language"), dtype=torch.float32)
    assert any("visual" in path for path in places) and any("language_model" in path for path in places)


def test_models_whose_weights_are_in_no_linear_layer_are_refused():
    with pytest.raises(Unsupported, match="stacked experts"):
        quantise(make_family("qwen3_moe"), Quant(), LANGUAGE, dtype=torch.float32)


@pytest.mark.parametrize("tokens", [3, 90])
def test_fused_products_have_the_gradients_of_pefts_own_on_the_unpacked_weights(bases, tokens):
    ours = adapters.attach(packed_model(bases["llama"]), lora(), None, seed=0)
    theirs = adapters.attach(load_model(bases["llama"], dtype=torch.float32), lora(), None, seed=0)
    for peft in (ours, theirs):
        train_a_little(peft)
    with torch.no_grad():
        plain = dict(theirs.get_base_model().named_modules())
        for path, layer in quantised_layers(ours.get_base_model()).items():
            plain[path].weight.copy_(layer.packed.dense())
    assert {"Linear", "LlamaMLP"} <= set(fuse(ours))
    ids = torch.randint(0, ours.config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(0))
    kept: list[torch.Tensor] = []
    found = []
    for peft in (ours, theirs):
        hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t)
        with hooks:
            loss = peft(input_ids=ids, labels=ids).loss
        if peft is ours:
            base = {(32, 32), (48, 32), (32, 48)}
            weights = [t for t in kept if tuple(t.shape) in base and t.grad_fn is None and not t.requires_grad]
            assert not weights, "an unpacked weight is kept for backward"
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in peft.parameters() if p.requires_grad)])
    for mine, other in zip(*found, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-6, rtol=1e-4)


def test_merged_weights_are_those_that_the_trainer_computes_with(bases):
    peft = adapters.attach(packed_model(bases["qwen3"]), lora(), None, seed=0)
    train_a_little(peft)
    plain = load_model(bases["qwen3"], dtype=torch.float32)
    before = logits(plain)
    plain.load_state_dict(dict(adapters.merged_state(peft, torch.float32)), strict=False)
    assert torch.allclose(logits(plain), logits(peft), atol=1e-5)
    assert not torch.allclose(logits(plain), before, atol=1e-2)


def test_an_adapter_says_what_it_was_trained_on_and_other_bases_are_refused(bases, tmp_path):
    peft = adapters.attach(packed_model(bases["qwen3"]), lora(kind="qlora"), None, seed=0)
    said = QuantisedBase(Quant(), LANGUAGE, "float32")
    adapters.save(peft, tmp_path / "adapter", packed=said)
    assert quantised_base(tmp_path / "adapter") == said
    for changes in ({"kind": "lora"}, {"kind": "qlora", "quant": Quant(type="fp4")}):
        with pytest.raises(ModelError, match="weights in four bits"):
            adapters.attach(packed_model(bases["qwen3"]), lora(**changes), tmp_path / "adapter", seed=0)
    with pytest.raises(ModelError, match="those of this model are not"):
        adapters.load_frozen(load_model(bases["qwen3"], dtype=torch.float32), tmp_path / "adapter", use="generate")
    (tmp_path / "adapter" / QUANTISED).write_text("{}")
    with pytest.raises(ModelError, match="unreadable"):
        quantised_base(tmp_path / "adapter")


def test_a_packed_layer_keeps_its_mode_and_bias(bases):
    linear = nn.Linear(64, 32).eval()
    packed = QuantisedLinear.of(linear, Quant(), torch.device("cpu"), torch.float32)
    assert not packed.training and packed.bias is not None and not packed.bias.requires_grad
    x = torch.randn(5, 64, requires_grad=True)
    expected = x @ packed.packed.dense().T + linear.bias
    torch.testing.assert_close(packed(x), expected)
    assert torch.autograd.grad(packed(x).sum(), x)[0].allclose(packed.packed.dense().sum(0).expand(5, -1), atol=1e-5)
