from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from align.errors import ModelError, UserError
from align.export.checkpoint import open_checkpoint
from align.model.folders import written_aside
from align.model.load import load_model, resolve_dtype
from align.model.scratch import write_base
from align.recipe.model_folder import refuse_untied_head
from tests.unit.model.tiny import LLAMA, QWEN3, logits, recipe_model, write_tiny, write_tokenizer


def file_hashes(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


@pytest.mark.parametrize("config", [QWEN3, LLAMA], ids=["qwen3", "llama"])
def test_the_same_seed_writes_the_same_bytes_whatever_the_global_generator(tmp_path, config):
    torch.manual_seed(1)
    first = file_hashes(write_tiny(tmp_path / "a", config, seed=5))
    torch.manual_seed(2)
    before = torch.get_rng_state()
    second = file_hashes(write_tiny(tmp_path / "b", config, seed=5))
    assert torch.equal(before, torch.get_rng_state())
    assert first == second
    other = file_hashes(write_tiny(tmp_path / "c", config, seed=6))
    assert other["model.safetensors"] != first["model.safetensors"]


def test_a_base_from_scratch_is_a_plain_transformers_folder(tmp_path):
    folder = write_tiny(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.config.vocab_size == len(tokenizer)
    assert tokenizer.eos_token_id == 2 and tokenizer.pad_token_id == 0
    generation = GenerationConfig.from_pretrained(folder)
    assert (generation.eos_token_id, generation.pad_token_id) == (2, 0)
    assert (model.config.eos_token_id, model.config.pad_token_id) == (2, 0)
    assert not list(folder.glob(".*"))


def test_a_padded_vocabulary_is_kept_and_a_smaller_one_refused(tmp_path):
    folder = write_tiny(tmp_path / "padded", QWEN3 | {"vocab_size": 512})
    assert load_model(folder, dtype=torch.float32).get_input_embeddings().weight.shape[0] == 512
    write_tokenizer(tmp_path / "small")
    with pytest.raises(ModelError, match="the tokenizer has"):
        write_base(recipe_model(QWEN3 | {"vocab_size": 64}), tmp_path / "small", 0)
    assert not (tmp_path / "small" / "config.json").exists()


def test_a_misspelt_config_key_or_architecture_is_answered_with_the_nearest(tmp_path):
    write_tokenizer(tmp_path)
    with pytest.raises(ModelError, match="'hidden_sise' is no setting") as caught:
        write_base(recipe_model(QWEN3 | {"hidden_sise": 8}), tmp_path, 0)
    assert "hidden_size" in str(caught.value)
    with pytest.raises(ModelError, match="'qwen33'"):
        write_base(recipe_model(QWEN3 | {"model_type": "qwen33"}), tmp_path, 0)


def test_dtype_words_resolve_by_device():
    assert resolve_dtype("auto", "cpu") == torch.float32
    assert resolve_dtype("auto", "cuda:0") == torch.bfloat16
    assert resolve_dtype("float16", "cpu") == torch.float16
    with pytest.raises(ModelError, match="float8"):
        resolve_dtype("float8", "cpu")


def test_a_model_loads_in_the_dtype_asked_for_with_the_cache_off(tmp_path):
    folder = write_tiny(tmp_path / "base")
    model = load_model(folder, dtype=torch.bfloat16, attention="eager")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.config._attn_implementation == "eager"
    assert not model.training and model.config.use_cache is False
    plain = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(logits(load_model(folder, dtype=torch.float32)), logits(plain))


def test_a_checkpoint_without_some_weight_is_refused_instead_of_filled_with_noise(tmp_path):
    folder = write_tiny(tmp_path / "base", LLAMA)
    file = folder / "model.safetensors"
    state = load_file(file)
    del state["model.layers.1.mlp.up_proj.weight"]
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 1 weights.*layers\.1\.mlp\.up_proj"):
        load_model(folder, dtype=torch.float32)


def test_folders_that_are_no_model_are_refused_with_the_reason(tmp_path):
    with pytest.raises(ModelError, match="no such model folder"):
        load_model(tmp_path / "absent", dtype=torch.float32)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError) as caught:
        load_model(tmp_path / "adapter", dtype=torch.float32)
    assert "model.adapter" in str(caught.value)
    folder = write_tiny(tmp_path / "base")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="no weights in safetensors"):
        load_model(folder, dtype=torch.float32)
    write_tiny(tmp_path / "unknown")
    config = json.loads((tmp_path / "unknown" / "config.json").read_text()) | {"model_type": "never_heard_of"}
    (tmp_path / "unknown" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="cannot load"):
        load_model(tmp_path / "unknown", dtype=torch.float32)


def test_a_folder_written_aside_is_complete_or_absent(tmp_path):
    with pytest.raises(RuntimeError), written_aside(tmp_path / "out") as aside:
        (aside / "half").write_text("x")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with written_aside(tmp_path / "out") as aside:
        (aside / "whole").write_text("x")
        assert not (tmp_path / "out").exists()
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["whole"]
    with pytest.raises(UserError, match="already exists"), written_aside(tmp_path / "out"):
        pass


def test_an_adapter_among_the_files_of_a_model_is_refused_before_it_is_put_on_a_second_time(tmp_path):
    from peft import LoraConfig, get_peft_model

    base = write_tiny(tmp_path / "base", LLAMA)
    trained = get_peft_model(load_model(base, dtype=torch.float32), LoraConfig(r=2, target_modules=["q_proj"]))
    trained.save_pretrained(tmp_path / "merged")
    trained.merge_and_unload().save_pretrained(tmp_path / "merged")  # the usual place, and the wrong one
    merged = tmp_path / "merged"
    for refused in (lambda: load_model(merged, dtype=torch.float32), lambda: open_checkpoint(merged)):
        with pytest.raises(ModelError, match="a second time where they were merged"):
            refused()
    (merged / "adapter_config.json").unlink()
    load_model(merged, dtype=torch.float32)


def test_a_head_that_differs_from_the_embedding_it_is_tied_to_is_refused(tmp_path):
    base = write_tiny(tmp_path / "base", QWEN3)
    state = load_file(base / "model.safetensors")
    embedding = state["model.embed_tokens.weight"]
    for head, differs in ((embedding.clone(), False), (embedding + 0.01, True)):
        save_file({**state, "lm_head.weight": head}, base / "model.safetensors", metadata={"format": "pt"})
        if not differs:
            refuse_untied_head(base)
            assert load_model(base, dtype=torch.float32).lm_head.weight is not None
            continue
        for refused in (lambda: load_model(base, dtype=torch.float32), lambda: refuse_untied_head(base)):
            with pytest.raises(ModelError, match=r"config\.json ties lm_head"):
                refused()
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    refuse_untied_head(base)
    assert torch.equal(load_model(base, dtype=torch.float32).lm_head.weight, embedding + 0.01)


@pytest.mark.parametrize("indexed", [True, False])
def test_two_sets_of_weights_in_one_folder_are_refused(tmp_path, indexed):
    base = write_tiny(tmp_path / "base", LLAMA)
    state = load_file(base / "model.safetensors")
    part = "model-00001-of-00001.safetensors"
    save_file({name: 2 * tensor for name, tensor in state.items()}, base / part, metadata={"format": "pt"})
    index = base / "model.safetensors.index.json"
    if indexed:
        index.write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(state, part)}))
    for refused in (lambda: load_model(base, dtype=torch.float32), lambda: open_checkpoint(base)):
        with pytest.raises(ModelError, match="holds two sets of weights"):
            refused()
    index.write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(state, "model.safetensors")}))
    load_model(base, dtype=torch.float32)  # an index may name the one file; what it does not name is read by nobody
