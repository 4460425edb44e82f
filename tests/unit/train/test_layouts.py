"""Models that the trainer computes otherwise: a row per sequence, soft-capping, checkpointed layers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from align.model.load import load_model
from align.model.policy_module import PolicyModule
from align.model.probe.choose import probe
from align.recipe.adapter import Adapter
from align.train.trainer import PolicyTrainer
from tests.architectures import make
from tests.unit.core.families import make_family
from tests.unit.train.test_trainer import DORA, FULL, LORA, QLORA, make_spec, trees_for, weights


def saved(family: str, folder: Path) -> Path:
    make_family(family).save_pretrained(folder / family)
    return folder / family


@pytest.mark.parametrize("adapter", [LORA, FULL], ids=["lora", "full"])
def test_a_stateful_model_is_trained_a_row_a_sequence_within_the_same_budget(adapter: Adapter, tmp_path: Path) -> None:
    spec = make_spec(saved("qwen3_5_text", tmp_path), "dpo", adapter, reference="start", max_tokens=64)
    trainer = PolicyTrainer(spec)
    described = trainer.describe()
    assert (described["layout"], described["attention"]) == ("padded", "sdpa")
    trees = trees_for("dpo")
    first = trainer.step(trees, step=0, progress=0.0)
    assert first["loss/total"] == pytest.approx(0.6931472, abs=1e-5)  # the reference computes as the policy does
    assert trainer.step(trees, step=1, progress=0.1)["loss/total"] < first["loss/total"]
    repeated = sum(len(tree.trunk) for tree in trees)  # of two branches each, once more
    packed = sum(tree.tokens for tree in trees)
    assert trainer.packer.budget(trees) == 64 * packed // (packed + repeated)


def test_a_plain_model_is_described_as_shared(tmp_path: Path) -> None:
    described = PolicyTrainer(make_spec(saved("qwen3", tmp_path), "sft")).describe()
    assert (described["layout"], described["attention"]) == ("shared", "sdpa")


@pytest.mark.parametrize("name", ["gemma3n_text", "gemma4_text"])
def test_an_adapter_on_a_projection_outside_of_all_layers_costs_no_layout(name: str, tmp_path: Path) -> None:
    """What peft keeps there in lists was taken for the last layer, and the last layer's trimmed tokens for a fault."""
    make(name).save_pretrained(tmp_path)
    trainer = PolicyTrainer(make_spec(tmp_path, "sft", LORA))
    assert any("per_layer_model_projection.lora_A" in path for path, _ in trainer.module.named_parameters())
    assert trainer.describe()["layout"] == "shared", trainer.forward()["slower"]


@pytest.mark.parametrize("adapter", [LORA, QLORA, DORA, FULL], ids=["lora", "qlora", "dora", "full"])
def test_gradient_checkpointing_changes_no_update(adapter: Adapter, tmp_path: Path) -> None:
    spec = make_spec(saved("qwen3", tmp_path), "dpo", adapter, reference="start")
    trainers = [
        PolicyTrainer(replace(spec, model=spec.model.model_copy(update={"gradient_checkpointing": on})))
        for on in (False, True)
    ]
    layers = [trainer.module.model.base_model.layers for trainer in trainers]
    assert [layer[0].gradient_checkpointing for layer in layers] == [False, True]
    done = [[t.step(trees_for("dpo", seed=s), step=s, progress=s / 10) for s in range(2)] for t in trainers]
    for plain, checkpointed in zip(*done, strict=True):
        for name in ("loss/total", "optim/grad_norm"):
            assert checkpointed[name] == pytest.approx(plain[name], rel=1e-6)
    for plain, checkpointed in zip(*(weights(t).values() for t in trainers), strict=True):
        torch.testing.assert_close(plain, checkpointed, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("family", ["gemma2", "gpt_oss", "qwen2_5_vl"])
def test_a_folder_of_every_kind_is_loaded_with_the_attention_that_defines_it(family: str, tmp_path: Path) -> None:
    made = make_family(family)
    model = load_model(saved(family, tmp_path), dtype=torch.float32)
    ids = torch.arange(12)[None]
    torch.testing.assert_close(model(input_ids=ids).logits, made(input_ids=ids).logits, atol=1e-5, rtol=1e-5)
    module = PolicyModule(model)
    assert probe(module) < 1e-5
    assert module.layout == "shared"
