from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import save_torch_state_dict
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from align.errors import ExportError, ModelError, Unsupported, UserError
from align.export import checkpoint
from align.export import merge as merging
from align.export.compare import BOUNDS, distance, log_probabilities, random_tokens, require_close
from align.export.merge import merge, module_error
from align.model import adapters
from align.model.load import load_model
from align.recipe.adapter import Adapter
from align.recipe.adapter_folder import QUANTISED
from align.recipe.inputs import Model
from align.train.trainer import PolicyTrainer
from tests.unit.model.tiny import LLAMA, QWEN3, logits, lora, train_a_little, write_tiny
from tests.unit.train.test_trainer import make_spec, trees_for

CONFIGS = {"qwen3": QWEN3, "llama": LLAMA}


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {name: write_tiny(root / name, config) for name, config in CONFIGS.items()}


def trained(base: Path, out: Path, scale: float = 0.2, **changes) -> Path:
    peft = adapters.attach(load_model(base, dtype=torch.float32), lora(**changes), None, seed=0)
    train_a_little(peft, scale=scale)
    adapters.save(peft, out)
    return out


def by_peft(base: Path, out: Path, **config) -> Path:
    """An adapter of another kind, made and saved by plain peft."""
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    peft = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**(settings | config)))
    train_a_little(peft)
    peft.save_pretrained(out)
    return out


def adapter_on(base: Path, adapter: Path) -> torch.Tensor:
    return logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval())


def plain(folder: Path) -> torch.Tensor:
    return logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))


# -------------------------------------------------------------------------------------------------- right merges


@pytest.mark.parametrize("name", CONFIGS)
def test_a_merged_folder_loads_in_plain_transformers_and_equals_the_adapter_on_model(bases, tmp_path, name):
    base, adapter, out = bases[name], trained(bases[name], tmp_path / "adapter"), tmp_path / "out"
    before = {p.name: p.read_bytes() for p in base.iterdir()}
    report = merge(base, adapter, out)
    assert torch.allclose(plain(out), adapter_on(base, adapter), atol=1e-5)
    assert not torch.allclose(plain(out), plain(base), atol=1e-2)
    assert AutoTokenizer.from_pretrained(out).encode("forty two") == AutoTokenizer.from_pretrained(base).encode(
        "forty two"
    )
    assert {p.name for p in out.iterdir()} == {*before, "merge_report.json"}
    assert before == {p.name: p.read_bytes() for p in base.iterdir()}
    assert json.loads((out / "merge_report.json").read_text())["modules"] == report.modules == 14
    assert 0 < report.module_error <= 1e-5 and report.dtype == "float32" and not report.untied_head
    assert report.kl_mean <= 1e-6 and report.top1 == 1.0 and report.adapter_kl > 1e-2
    assert not list(tmp_path.glob("*.partial"))


def test_a_lora_on_a_tied_head_unties_it(bases, tmp_path):
    base = bases["qwen3"]
    adapter = trained(base, tmp_path / "adapter", targets=("lm_head", "v_proj"))
    report = merge(base, adapter, tmp_path / "out")
    assert report.untied_head
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    state = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(
        state["model.embed_tokens.weight"], load_file(base / "model.safetensors")["model.embed_tokens.weight"]
    )
    assert not torch.equal(state["lm_head.weight"], state["model.embed_tokens.weight"])
    assert torch.allclose(plain(tmp_path / "out"), adapter_on(base, adapter), atol=1e-5)


@pytest.mark.parametrize(
    "config",
    [
        {"use_rslora": True},
        {"rank_pattern": {"layers.0.self_attn.q_proj": 2}, "alpha_pattern": {"down_proj": 32}},
        {"use_dora": True},
        {"lora_bias": True, "target_modules": ["q_proj", "o_proj"]},
        {"init_lora_weights": "orthogonal"},
        {"target_modules": "all-linear", "exclude_modules": ["k_proj"], "layers_to_transform": None},
    ],
    ids=["rslora", "patterns", "dora", "lora_bias", "orthogonal", "exclude"],
)
def test_adapters_of_other_kinds_made_by_peft_merge_to_what_peft_computes(bases, tmp_path, config):
    base, adapter = bases["llama"], by_peft(bases["llama"], tmp_path / "adapter", **config)
    report = merge(base, adapter, tmp_path / "out")
    assert report.modules >= 4
    assert torch.allclose(plain(tmp_path / "out"), adapter_on(base, adapter), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "dtype"),
    [
        ({"kind": "qlora"}, "float32"),
        ({"kind": "qlora", "targets": ("q_proj", "down_proj"), "rslora": True}, "float32"),
        ({"kind": "dora"}, "float32"),
        ({"kind": "dora", "quant": {"type": "fp4", "double": False}}, "float32"),
        ({"kind": "qlora"}, "bfloat16"),
    ],
    ids=["qlora", "qlora on some", "dora", "dora in four bits", "bfloat16"],
)
def test_what_is_merged_says_what_the_trainer_said(bases, tmp_path, changes, dtype):
    """Log-probabilities to 1e-3 of theirs in float32; in bfloat16 to the rounding of the two computations."""
    base = bases["llama"]
    adapter = Adapter.model_validate({"rank": 4, "alpha": 8.0} | changes)
    spec = replace(make_spec(base, "sft", adapter), model=Model(path=str(base), dtype=dtype))
    trainer, trees = PolicyTrainer(spec), trees_for("sft")
    for step in range(3):
        trainer.step(trees, step=step, progress=step / 10)
    trainer.write_model(tmp_path / "adapter")
    report = merge(base, tmp_path / "adapter", tmp_path / "out", dtype="float32")
    assert report.kl_mean <= 1e-6 and report.adapter_kl > 1e-3
    merged = PolicyTrainer(replace(spec, base=str(tmp_path / "out"), adapter_config=Adapter(rank=4)))
    for mine, theirs in zip(merged.logps(trees), trainer.logps(trees), strict=True):
        for one, other in zip(mine, theirs, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-3 if dtype == "float32" else 3e-2, atol=1e-5)
    if adapter.quant is not None:  # on the base in full precision it is another model
        (tmp_path / "adapter" / QUANTISED).unlink()
        merge(base, tmp_path / "adapter", tmp_path / "other", dtype="float32")
        elsewhere = PolicyTrainer(replace(merged.spec, base=str(tmp_path / "other"))).logps(trees)
        assert max(np.abs(a - b).max() for a, b in zip(elsewhere[0], trainer.logps(trees)[0], strict=True)) > 1e-2


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_cast_is_reported_and_within_its_bounds(bases, tmp_path, dtype):
    base = bases["llama"]
    report = merge(base, trained(base, tmp_path / "adapter"), tmp_path / "out", dtype=dtype)
    bound = BOUNDS[getattr(torch, dtype)]
    assert 0 < report.kl_mean <= bound.kl and bound.top1 <= report.top1 <= 1
    assert (report.kl_bound, report.top1_bound) == (bound.kl, bound.top1)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").dtype == getattr(torch, dtype)


def test_auto_keeps_the_dtype_of_the_base_and_says_when_rounding_swallows_the_adapter(tmp_path):
    base = write_tiny(tmp_path / "base", LLAMA, dtype="bfloat16")
    adapter = trained(base, tmp_path / "adapter", scale=1e-5)
    report = merge(base, adapter, tmp_path / "out")
    assert report.dtype == "bfloat16"
    assert len(report.warnings) == 1 and "merge in float32" in report.warnings[0]
    assert merge(base, adapter, tmp_path / "exact", dtype="float32").warnings == ()


def test_a_whole_model_is_copied_and_proved(bases, tmp_path):
    base = bases["qwen3"]
    report = merge(base, None, tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (base / "model.safetensors").read_bytes()
    assert report.modules == 0 and report.kl_mean == 0 and report.adapter is None


def test_a_divided_checkpoint_keeps_its_files_and_what_the_model_class_does_not_load(bases, tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    for path in bases["llama"].iterdir():
        if path.suffix != ".safetensors":
            (base / path.name).write_bytes(path.read_bytes())
    extra = {"model.layers.2.mtp.weight": torch.arange(6.0), "steps": torch.tensor([7])}
    state = load_file(bases["llama"] / "model.safetensors") | extra
    save_torch_state_dict(state, base, max_shard_size=40_000)
    assert len(list(base.glob("*.safetensors"))) > 2
    adapter = trained(base, tmp_path / "adapter")
    report = merge(base, adapter, tmp_path / "out", dtype="bfloat16")
    out = checkpoint.open_checkpoint(tmp_path / "out")
    assert out.files == checkpoint.open_checkpoint(base).files and report.tensors == len(out.files)
    kept = load_file(tmp_path / "out" / out.files["model.layers.2.mtp.weight"])["model.layers.2.mtp.weight"]
    assert torch.equal(kept, torch.arange(6.0, dtype=torch.bfloat16))
    assert load_file(tmp_path / "out" / out.files["steps"])["steps"].tolist() == [7]
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == report.bytes


# -------------------------------------------------------------------------------------------------- wrong merges


def test_one_wrong_module_is_caught_before_anything_is_written(bases, tmp_path, monkeypatch):
    base, right = bases["qwen3"], merging.merged_parameters
    calls: list[int] = []

    def wrong(layer, name):
        weight, bias = right(layer, name)
        calls.append(1)
        if len(calls) == 9:
            weight[3, 5] += 1e-3
        return weight, bias

    monkeypatch.setattr(merging, "merged_parameters", wrong)
    with pytest.raises(ExportError, match="differs from base"):
        merge(base, trained(base, tmp_path / "adapter"), tmp_path / "out")
    assert {p.name for p in tmp_path.iterdir()} == {"adapter"}


def test_a_scaling_that_is_off_by_a_ten_thousandth_is_caught(bases, tmp_path):
    peft = adapters.attach(load_model(bases["llama"], dtype=torch.float32), lora(), None, seed=0)
    train_a_little(peft)
    for _, layer in adapters.lora_layers(peft):
        weight, bias = merging.merged_parameters(layer, "default")
        assert module_error(layer, weight, bias, seed=1) < 1e-6
        layer.scaling["default"] *= 1.0001
        assert module_error(layer, weight, bias, seed=1) > 1e-5
        layer.scaling["default"] /= 1.0001
        if bias is not None:
            assert module_error(layer, weight, bias + 1e-3, seed=1) > 1e-5
    assert any(layer.get_base_layer().bias is not None for _, layer in adapters.lora_layers(peft))


def test_a_module_that_the_writer_forgets_is_caught_by_the_loaded_folder(bases, tmp_path, monkeypatch):
    base, right = bases["qwen3"], merging.replacements

    def forgetful(plan, peft):
        made = dict(right(plan, peft))
        del made["model.layers.1.mlp.down_proj.weight"]
        return made

    monkeypatch.setattr(merging, "replacements", forgetful)
    with pytest.raises(ExportError, match="beyond float32's bounds"):
        merge(base, trained(base, tmp_path / "adapter"), tmp_path / "out")
    assert {p.name for p in tmp_path.iterdir()} == {"adapter"}


def test_one_flipped_bit_on_disk_is_caught(bases, tmp_path, monkeypatch):
    base, right = bases["qwen3"], merging.rewrite

    def flaky(source, target, dtype, replaced):
        size = right(source, target, dtype, replaced)
        state = load_file(target / "model.safetensors")
        state["model.norm.weight"].view(torch.int32)[0] ^= 1
        save_file(state, target / "model.safetensors", metadata={"format": "pt"})
        return size

    monkeypatch.setattr(merging, "rewrite", flaky)
    with pytest.raises(ExportError, match=r"model\.norm\.weight was read back"):
        merge(base, trained(base, tmp_path / "adapter"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_head_that_stays_tied_after_untying_is_caught(bases, tmp_path, monkeypatch):
    base, right = bases["qwen3"], merging.edit_config
    monkeypatch.setattr(merging, "edit_config", lambda file, dtype, untie=False: right(file, dtype))
    adapter = trained(base, tmp_path / "adapter", targets=("lm_head",))
    with pytest.raises(ModelError, match=r"ties lm_head\.weight to model\.embed_tokens\.weight"):
        merge(base, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_each_dtype_s_bound_catches_one_wrong_module(bases, tmp_path):
    base = bases["llama"]
    peft = adapters.attach(load_model(base, dtype=torch.float32), lora(), None, seed=0)
    train_a_little(peft)
    tokens = random_tokens(peft.config, 0)
    right = log_probabilities(peft, tokens)
    with torch.no_grad():
        peft.get_base_model().model.layers[0].mlp.down_proj.lora_B["default"].weight.zero_()
    measured = distance(right, log_probabilities(peft, tokens))
    for dtype, bound in BOUNDS.items():
        with pytest.raises(ExportError, match="beyond"):
            require_close(measured, bound, "the merged model", dtype)
    require_close(distance(right, right), BOUNDS[torch.float32], "the merged model", torch.float32)


def test_weights_that_overflow_in_the_output_dtype_are_refused(tmp_path):
    base = write_tiny(tmp_path / "base", LLAMA)
    state = load_file(base / "model.safetensors")
    state["model.layers.0.mlp.up_proj.weight"][0, 0] = 1e6
    save_file(state, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ExportError, match=r"up_proj\.weight is not finite in float16"):
        merge(base, None, tmp_path / "out", dtype="float16")


# -------------------------------------------------------------------------------------------------- refusals


def test_what_cannot_be_merged_is_refused_before_anything_is_computed(bases, tmp_path, monkeypatch):
    base = bases["qwen3"]
    monkeypatch.setattr(merging, "load_model", None)  # refusing must not load a model
    adapter = trained(base, tmp_path / "adapter")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "something").write_text("kept")
    with pytest.raises(UserError, match="already exists"):
        merge(base, adapter, tmp_path / "taken")
    assert (tmp_path / "taken" / "something").read_text() == "kept"
    with pytest.raises(ModelError, match="no adapter_config"):
        merge(base, base, tmp_path / "out")
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"init_lora_weights": "pissa"}))
    with pytest.raises(Unsupported, match="pissa"):
        merge(base, adapter, tmp_path / "out")
    quantised = write_tiny(tmp_path / "quantised")
    config = json.loads((quantised / "config.json").read_text()) | {"quantization_config": {"quant_method": "fp8"}}
    (quantised / "config.json").write_text(json.dumps(config))
    with pytest.raises(Unsupported, match="quantised"):
        merge(quantised, None, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_under_other_names_is_refused_instead_of_merged_in_part(bases, tmp_path):
    base = write_tiny(tmp_path / "base", LLAMA)
    adapter = trained(base, tmp_path / "adapter")
    state = load_file(base / "model.safetensors")
    renamed = {name.removeprefix("model."): tensor for name, tensor in state.items()}
    save_file(renamed, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises((Unsupported, ModelError)):
        merge(base, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()
