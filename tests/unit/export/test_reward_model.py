"""A reward model merged and exported: the head comes along, and plain transformers computes what was trained."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

from align.errors import ExportError, Unsupported
from align.export import load_probe
from align.export.export import export
from align.export.merge import merge
from align.model import adapters
from align.model.score_head import folder_labels, load_score_model
from align.recipe.labels import Labels
from tests.tiny_vlms import write_tiny_vlm
from tests.unit.model.tiny import LLAMA, QWEN3, lora, train_a_little, write_tiny

F32 = torch.float32
exporting = importlib.import_module("align.export.load_proof")


@pytest.fixture(scope="module", params=["tied", "untied"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("base") / "model", QWEN3 if request.param == "tied" else LLAMA)


@pytest.fixture(scope="module")
def adapter(base: Path) -> Path:
    model: Any = load_score_model(base, dtype=F32, seed=5)
    peft = adapters.attach(model, lora(), None, seed=3)
    train_a_little(peft)
    with torch.no_grad():
        model.score.modules_to_save["default"].weight.add_(0.3)
    adapters.save(peft, base.parent / "adapter")
    return base.parent / "adapter"


@torch.no_grad()
def scores(model: Any) -> torch.Tensor:
    ids = torch.randint(3, model.config.vocab_size, (4, 9), generator=torch.Generator().manual_seed(0))
    ids[1, 6:] = ids[3, 2:] = 0  # right-padded
    model.config.pad_token_id = 0
    found: torch.Tensor = model.eval()(input_ids=ids, attention_mask=(ids != 0).long()).logits.float()
    return found


def plain(folder: Path) -> torch.Tensor:
    return scores(AutoModelForSequenceClassification.from_pretrained(folder, dtype=F32))


def adapter_on(base: Path, adapter: Path) -> torch.Tensor:
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    return scores(PeftModel.from_pretrained(model, adapter))


def test_a_merged_reward_model_scores_as_its_adapter_does(base: Path, adapter: Path, tmp_path: Path) -> None:
    report = merge(base, adapter, tmp_path / "out")
    torch.testing.assert_close(plain(tmp_path / "out"), adapter_on(base, adapter), atol=1e-5, rtol=1e-5)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"][0].endswith("ForSequenceClassification") and config["id2label"] == {"0": "LABEL_0"}
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert "score.weight" in names and "lm_head.weight" not in names
    assert report.modules == 14 and report.kl_mean <= 1e-6 and report.adapter_kl > 1e-3


@pytest.mark.slow
def test_a_merged_reward_model_is_trained_on_and_merged_again(base: Path, adapter: Path, tmp_path: Path) -> None:
    merge(base, adapter, tmp_path / "first")
    model: Any = load_score_model(tmp_path / "first", dtype=F32, seed=9)
    head = model.score.weight.clone()
    peft = adapters.attach(model, lora(), None, seed=4)
    train_a_little(peft, seed=1)
    adapters.save(peft, tmp_path / "adapter")
    merge(tmp_path / "first", tmp_path / "adapter", tmp_path / "second")
    torch.testing.assert_close(
        plain(tmp_path / "second"), adapter_on(tmp_path / "first", tmp_path / "adapter"), atol=1e-5, rtol=1e-5
    )
    assert torch.equal(load_file(tmp_path / "second" / "model.safetensors")["score.weight"], head)


def test_a_reward_model_is_cast_and_exported_under_the_proofs_of_its_dtype(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporting, "run_child", lambda loader, *rest: (load_probe.probe(loader, *rest[:2]), 0.0))
    merge(base, adapter, tmp_path / "merged", dtype="bfloat16")
    report = export(tmp_path / "merged", tmp_path / "out")
    assert [(check.loader, check.status) for check in report.checks] == [
        ("transformers", "proved"),
        ("vllm", "not checked"),
    ]
    assert "this model scores" in report.checks[1].message
    state = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in state.values()} == {torch.bfloat16}
    torch.testing.assert_close(plain(tmp_path / "out"), adapter_on(base, adapter), atol=0.2, rtol=0.1)


def test_a_head_that_was_written_wrong_is_found(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merging = importlib.import_module("align.export.merge")
    original = merging.verify

    def spoil(source: Any, target: Path, *rest: Any) -> int:
        count: int = original(source, target, *rest)
        state = load_file(target / "model.safetensors")
        state["score.weight"] = state["score.weight"] + 0.05
        save_file(state, target / "model.safetensors", metadata={"format": "pt"})
        return count

    monkeypatch.setattr(merging, "verify", spoil)
    with pytest.raises(ExportError, match="differs from what was trained"):
        merge(base, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------- several labels

LABELS = Labels(("bad", "so-so", "good"), "multi_label")


def trained(base: Path, folder: Path, **changes: Any) -> Any:
    """A classifier's adapter beside `base`, written to `folder`; the model with it on."""
    model: Any = load_score_model(base, dtype=F32, seed=5, labels=LABELS)
    peft = adapters.attach(model, lora(**changes), None, seed=3)
    train_a_little(peft)
    with torch.no_grad():
        model.score.modules_to_save["default"].weight.add_(0.3)
    adapters.save(peft, folder)
    return model


def test_a_merged_and_exported_classifier_keeps_its_labels_and_computes_what_was_trained(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporting, "run_child", lambda loader, *rest: (load_probe.probe(loader, *rest[:2]), 0.0))
    wanted = scores(trained(base, tmp_path / "adapter"))
    merge(base, tmp_path / "adapter", tmp_path / "merged")
    export(tmp_path / "merged", tmp_path / "out")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", dtype=F32)
    assert model.config.id2label == {0: "bad", 1: "so-so", 2: "good"}
    assert model.config.problem_type == "multi_label_classification"
    torch.testing.assert_close(scores(model), wanted, atol=1e-5, rtol=1e-5)


def test_a_difference_in_one_outputs_level_alone_is_found(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained(base, tmp_path / "adapter")
    merging = importlib.import_module("align.export.merge")
    original = merging.verify

    def spoil(source: Any, target: Path, *rest: Any) -> int:
        count: int = original(source, target, *rest)
        state = load_file(target / "model.safetensors")
        state["score.weight"][1] *= 1.05
        save_file(state, target / "model.safetensors", metadata={"format": "pt"})
        return count

    monkeypatch.setattr(merging, "verify", spoil)
    with pytest.raises(ExportError, match="differs from what was trained"):
        merge(base, tmp_path / "adapter", tmp_path / "out")


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen2_5_vl", "idefics3"])
def test_a_model_that_sees_is_merged_with_its_head_and_not_exported_for_others(family: str, tmp_path: Path) -> None:
    base = write_tiny_vlm(tmp_path / "base", family)
    language = r"model\.(language_model|text_model)\..*(q_proj|down_proj)"
    model = trained(base, tmp_path / "adapter", targets=language)
    ids = torch.randint(3, 200, (1, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = model.eval()(input_ids=ids).logits
        merge(base, tmp_path / "adapter", tmp_path / "merged")
        merged: Any = load_score_model(tmp_path / "merged", dtype=F32, seed=0)
        torch.testing.assert_close(merged(input_ids=ids).logits, wanted, atol=1e-4, rtol=1e-4)
    assert folder_labels(tmp_path / "merged") == LABELS
    with pytest.raises(Unsupported, match=f"transformers has no sequence classifier for {family}"):
        export(tmp_path / "merged", tmp_path / "out")
    assert not (tmp_path / "out").exists()
