from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from align.errors import ModelError, Unsupported, UserError
from align.model import adapters
from align.model.adapter_config import lora_rank, recipe_adapter
from align.model.load import load_model
from align.protocols.trainer import digest_arrays
from tests.unit.model.tiny import LLAMA, QWEN3, logits, lora, train_a_little, write_tiny


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("models") / "qwen3", QWEN3)


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("models") / "llama", LLAMA)


def model_of(folder: Path, dtype: torch.dtype = torch.float32):
    return load_model(folder, dtype=dtype)


def adapter_tensors(peft) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in peft.named_parameters() if "lora_" in name}


def trained(folder: Path, out: Path, **changes) -> Path:
    peft = adapters.attach(model_of(folder), lora(**changes), None, seed=0)
    train_a_little(peft)
    adapters.save(peft, out)
    return out


# -------------------------------------------------------------------------------------------------- making


def test_a_fresh_adapter_changes_nothing_and_depends_on_its_seed_alone(base):
    torch.manual_seed(1)
    first = adapters.attach(model_of(base), lora(), None, seed=7)
    assert torch.equal(logits(first), logits(model_of(base)))
    torch.manual_seed(99)
    before = torch.get_rng_state()
    second = adapters.attach(model_of(base), lora(), None, seed=7)
    assert torch.equal(before, torch.get_rng_state())
    a, b = adapter_tensors(first), adapter_tensors(second)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    other = adapter_tensors(adapters.attach(model_of(base), lora(), None, seed=8))
    assert all(not torch.equal(a[k], other[k]) for k in a if "lora_A" in k)
    values = a["base_model.model.model.layers.0.mlp.down_proj.lora_A.default.weight"]
    assert values.abs().max() <= 1 / 64**0.5 < 2 * values.abs().max()


def test_a_module_gets_the_same_values_whichever_others_are_targeted(base):
    every = adapter_tensors(adapters.attach(model_of(base), lora(), None, seed=7))
    few = adapter_tensors(adapters.attach(model_of(base), lora(targets=("q_proj",)), None, seed=7))
    assert len(few) == 4 and all(torch.equal(every[k], few[k]) for k in few)


def test_all_linear_means_every_linear_layer_but_the_head(llama):
    peft = adapters.attach(model_of(llama), lora(), None, seed=0)
    adapted = {path.rpartition(".")[2] for path, _ in adapters.lora_layers(peft)}
    assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert peft.peft_config["default"].target_modules == adapted
    assert all(("lora_" in name) == p.requires_grad for name, p in peft.named_parameters())


def test_targets_and_exclusions_choose_modules_and_unknown_ones_are_refused(base):
    peft = adapters.attach(model_of(base), lora(exclude=("layers.0.mlp.up_proj", "k_proj")), None, seed=0)
    adapted = {path for path, _ in adapters.lora_layers(peft)}
    assert len(adapted) == 14 - 3 and "model.layers.1.mlp.up_proj" in adapted
    peft = adapters.attach(model_of(base), lora(targets=r".*layers\.1\..*_proj"), None, seed=0)
    assert len(list(adapters.lora_layers(peft))) == 7
    with pytest.raises(ModelError, match="'q_prj' is no linear layer") as caught:
        adapters.attach(model_of(base), lora(targets=("q_prj", "v_proj")), None, seed=0)
    assert "did you mean 'q_proj'" in str(caught.value)
    with pytest.raises(ModelError, match=r"adapter\.exclude|'kproj'"):
        adapters.attach(model_of(base), lora(exclude=("kproj",)), None, seed=0)
    with pytest.raises(ModelError, match="embed_tokens"):
        adapters.attach(model_of(base), lora(targets=("embed_tokens",)), None, seed=0)


@pytest.mark.parametrize("changes", [{"kind": "full"}, {"tune": {"vision": "lora"}}])
def test_what_is_no_lora_of_a_language_model_is_refused(base, changes):
    with pytest.raises(Unsupported):
        adapters.attach(model_of(base), lora(**changes), None, seed=0)


def test_a_lora_on_a_tied_head_unties_it_and_leaves_the_embedding(base):
    model = model_of(base)
    embedding = model.get_input_embeddings().weight
    before = logits(model)
    peft = adapters.attach(model, lora(targets=("q_proj", "lm_head")), None, seed=0)
    head = peft.get_base_model().get_output_embeddings()
    assert model.get_input_embeddings().weight is embedding
    assert head.get_base_layer().weight.data_ptr() != embedding.data_ptr()
    assert torch.equal(head.get_base_layer().weight, embedding)
    assert model.config.tie_word_embeddings is False
    assert torch.equal(logits(peft), before)
    train_a_little(peft)
    names = dict(adapters.merged_state(peft, torch.float32))
    assert torch.equal(names["model.embed_tokens.weight"], embedding)
    assert not torch.equal(names["lm_head.weight"], embedding)
    model.tie_weights()
    assert head.get_base_layer().weight is not embedding


# -------------------------------------------------------------------------------------------------- folders


def test_a_saved_adapter_loads_in_plain_peft_and_in_ours(base, tmp_path):
    peft = adapters.attach(model_of(base), lora(), None, seed=3)
    train_a_little(peft)
    adapters.save(peft, tmp_path / "adapter")
    assert {p.name for p in (tmp_path / "adapter").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter").eval()
    assert torch.equal(logits(plain), logits(peft))
    again = adapters.attach(model_of(base), lora(), tmp_path / "adapter", seed=99)
    assert torch.equal(logits(again), logits(peft))
    assert all(("lora_" in name) == p.requires_grad for name, p in again.named_parameters())
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["inference_mode"] is True and config["r"] == 4
    with pytest.raises(UserError, match="already exists"):
        adapters.save(peft, tmp_path / "adapter")


def test_an_adapter_made_by_plain_peft_is_taken_with_its_own_configuration(base, tmp_path):
    config = LoraConfig(
        r=8,
        lora_alpha=4,
        use_rslora=True,
        target_modules=["q_proj", "down_proj", "lm_head"],
        rank_pattern={"layers.1.self_attn.q_proj": 2},
        alpha_pattern={"down_proj": 32},
        task_type="CAUSAL_LM",
    )
    theirs = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).eval()
    train_a_little(theirs)
    theirs.save_pretrained(tmp_path / "adapter")
    assert any("base_layer" in key for key in load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
    ours = adapters.attach(model_of(base), None, tmp_path / "adapter", seed=0)
    assert torch.allclose(logits(ours), logits(theirs), atol=1e-6)
    assert lora_rank(tmp_path / "adapter") == 8
    described = recipe_adapter(tmp_path / "adapter")
    assert (described.rank, described.alpha, described.targets) == (8, 4.0, ("down_proj", "lm_head", "q_proj"))
    adapters.attach(model_of(base), described, tmp_path / "adapter", seed=0)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"rank": 8}, "rank 8 in the recipe, 4"),
        ({"alpha": 16.0}, "alpha 16"),
        ({"dropout": 0.1}, "dropout 0.1"),
        ({"targets": ("q_proj",)}, "other target modules"),
    ],
)
def test_a_recipe_that_differs_from_the_adapter_it_starts_with_is_refused(base, tmp_path, changes, named):
    folder = trained(base, tmp_path / "adapter")
    with pytest.raises(ModelError, match=named) as caught:
        adapters.attach(model_of(base), lora(**changes), folder, seed=0)
    assert "put a merge stage between" in str(caught.value)


def test_equal_targets_in_other_words_are_equal(base, tmp_path):
    folder = trained(base, tmp_path / "adapter")
    leaves = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    adapters.attach(model_of(base), lora(targets=leaves), folder, seed=0)


def test_adapters_that_lack_weights_or_fit_another_model_are_refused(base, llama, tmp_path):
    folder = trained(base, tmp_path / "adapter")
    with pytest.raises(ModelError, match="does not fit the model"):
        adapters.attach(model_of(llama), None, folder, seed=0)
    from safetensors.torch import save_file

    file = folder / "adapter_model.safetensors"
    whole = load_file(file)
    save_file({k: v for k, v in whole.items() if "layers.0.mlp.up_proj.lora_A" not in k}, file)
    with pytest.raises(ModelError, match=r"lacks 1 weights.*up_proj"):
        adapters.attach(model_of(base), None, folder, seed=0)
    save_file(whole | {"base_model.model.model.layers.7.mlp.up_proj.lora_A.weight": torch.ones(4, 32)}, file)
    with pytest.raises(ModelError, match=r"the model lacks.*layers\.7"):
        adapters.attach(model_of(base), None, folder, seed=0)
    save_file(whole | {"base_model.model.model.embed_tokens.weight": torch.ones(300, 32)}, file)
    with pytest.raises(Unsupported, match="changed base weight"):
        adapters.attach(model_of(base), None, folder, seed=0)
    file.unlink()
    with pytest.raises(ModelError, match="no adapter_model"):
        adapters.attach(model_of(base), None, folder, seed=0)


@pytest.mark.parametrize(
    "beyond",
    [{"lora_bias": True}, {"modules_to_save": ["lm_head"]}, {"bias": "all"}, {"init_lora_weights": "pissa"}],
)
def test_adapters_that_are_more_than_lora_are_refused_for_training(base, tmp_path, beyond):
    folder = trained(base, tmp_path / "adapter")
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | beyond))
    with pytest.raises(Unsupported) as caught:
        adapters.attach(model_of(base), None, folder, seed=0)
    assert "merge" in str(caught.value)


# -------------------------------------------------------------------------------------------------- switching


@pytest.mark.parametrize("from_folder", [True, False])
def test_a_frozen_reference_stays_while_the_policy_moves(base, tmp_path, from_folder):
    folder = trained(base, tmp_path / "adapter")
    peft = adapters.attach(model_of(base), None, folder, seed=0)
    start = logits(peft)
    adapters.add_frozen(peft, folder if from_folder else None)
    flags = {name: p.requires_grad for name, p in peft.named_parameters()}
    assert not any(flag for name, flag in flags.items() if "reference" in name)
    assert all(flag for name, flag in flags.items() if ".default." in name)
    train_a_little(peft, seed=5)  # moves "default" and "reference" alike: put the reference back
    adapters_now = dict(peft.named_parameters())
    saved = load_file(folder / "adapter_model.safetensors")
    with torch.no_grad():
        for key, value in saved.items():
            adapters_now[key.replace(".weight", ".reference.weight")].copy_(value)
    moved = logits(peft)
    assert not torch.allclose(moved, start)
    with adapters.use_adapter(peft, "reference"):
        assert torch.equal(logits(peft), start)
    with adapters.use_adapter(peft, None):
        assert torch.equal(logits(peft), logits(model_of(base)))
    assert torch.equal(logits(peft), moved)
    assert flags == {name: p.requires_grad for name, p in peft.named_parameters()}


def test_switching_restores_even_after_an_error_and_keeps_a_frozen_adapter_frozen(base, tmp_path):
    peft = adapters.attach(model_of(base), lora(), None, seed=0)
    peft.requires_grad_(False)
    with pytest.raises(RuntimeError), adapters.use_adapter(peft, None):
        raise RuntimeError
    assert not any(p.requires_grad for p in peft.parameters())
    assert peft.active_adapter == "default"
    train_a_little(peft)
    assert not torch.allclose(logits(peft), logits(model_of(base)))


# -------------------------------------------------------------------------------------------------- digests


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_digest_is_that_of_the_arrays_an_engine_makes_from_the_saved_folder(base, tmp_path, dtype):
    peft = adapters.attach(model_of(base), lora(alpha=6.0), None, seed=0)
    train_a_little(peft)
    adapters.save(peft, tmp_path / "adapter")
    arrays = {}
    for key, tensor in load_file(tmp_path / "adapter" / "adapter_model.safetensors").items():
        tensor = tensor.to(dtype)
        if "lora_B" in key:
            tensor *= 6.0 / 4
        name = key.removeprefix("base_model.model.").removesuffix(".weight")
        arrays[name] = tensor.view(torch.uint16).numpy() if dtype == torch.bfloat16 else tensor.numpy()
    assert "model.layers.0.self_attn.q_proj.lora_A" in arrays
    assert adapters.digest(peft, dtype) == digest_arrays(arrays)


def test_one_bit_changes_the_digest(base):
    peft = adapters.attach(model_of(base), lora(), None, seed=0)
    train_a_little(peft)
    before, whole = adapters.digest(peft, torch.float32), adapters.weights_digest(model_of(base), torch.float32)
    _, layer = next(adapters.lora_layers(peft))
    layer.lora_B["default"].weight.detach().view(torch.int32)[3, 1] ^= 1
    assert adapters.digest(peft, torch.float32) != before
    model = model_of(base)
    assert adapters.weights_digest(model, torch.float32) == whole
    model.model.norm.weight.detach().view(torch.int32)[0] ^= 1
    assert adapters.weights_digest(model, torch.float32) != whole


def test_rank_stabilised_scaling_enters_the_digest(base, tmp_path):
    folder = trained(base, tmp_path / "adapter")
    plain = adapters.digest(adapters.attach(model_of(base), None, folder, seed=0), torch.float32)
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"use_rslora": True}))
    stabilised = adapters.attach(model_of(base), None, folder, seed=0)
    assert next(adapters.lora_layers(stabilised))[1].scaling["default"] == 8 / 2
    assert adapters.digest(stabilised, torch.float32) != plain


# -------------------------------------------------------------------------------------------------- weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_weights_equal_peft_s_own_merge_and_leave_the_base_alone(llama, dtype):
    model = model_of(llama, dtype)
    peft = adapters.attach(model, lora(), None, seed=0)
    train_a_little(peft)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    merged = dict(adapters.merged_state(peft, torch.float32))
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    theirs = adapters.attach(model_of(llama), lora(), None, seed=0)
    train_a_little(theirs)
    expected = theirs.merge_and_unload().state_dict()
    assert merged.keys() == expected.keys()
    # bfloat16: the base was rounded on loading, the adapter and the sum were not
    tolerance = {"rtol": 1e-6, "atol": 1e-7} if dtype == torch.float32 else {"rtol": 2**-8, "atol": 1e-7 + 2**-9}
    assert all(torch.allclose(merged[name], expected[name], **tolerance) for name in merged)


def test_a_tied_weight_is_stored_once_and_a_whole_model_saves_and_loads(base, tmp_path):
    model = model_of(base)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)
    assert "lm_head.weight" not in dict(adapters.full_state(model))
    adapters.save_full(model, tmp_path / "model", base=base, dtype=torch.float32)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert torch.equal(logits(plain), logits(model))
    assert (tmp_path / "model" / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    assert (tmp_path / "model" / "chat_template.jinja").is_file()
    adapters.save_full(model, tmp_path / "half", base=base, dtype=torch.bfloat16)
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype="auto").dtype == torch.bfloat16
    assert not list(tmp_path.glob("*.partial"))


def test_arrays_keep_their_bits():
    from align.model.weights import as_array

    x = torch.tensor([1.0, -2.5], dtype=torch.bfloat16)
    assert as_array(x).dtype == np.uint16 and as_array(x).tolist() == [0x3F80, 0xC020]
