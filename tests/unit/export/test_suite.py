"""The suite for an unknown model: what it says of a sound one, of one of text, and of one with a fault."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from align.cli.main import main
from align.export import merge as merging
from align.export import suite
from align.model.weights import merged_parameters
from tests.tiny_vlms import write_tiny_vlm
from tests.unit.model.tiny import write_tiny


def outcome(folder: Path, tmp_path: Path) -> dict[str, tuple[str, str]]:
    work = tmp_path / "work"
    work.mkdir()
    return {check.name: (check.status, check.detail) for check in suite.run_suite(folder, work, engines=())}


@pytest.fixture
def without_export(monkeypatch: pytest.MonkeyPatch) -> None:
    """Children that import transformers take their time."""
    monkeypatch.setattr(suite, "_exports", lambda subject: iter(()))


@pytest.mark.slow
def test_a_sound_model_that_sees_passes_every_check(tmp_path: Path) -> None:
    found = outcome(write_tiny_vlm(tmp_path / "model", "qwen2_5_vl"), tmp_path)
    assert {status for status, _ in found.values()} == {"passed"}, found
    targets = {name for name in found if name.startswith("LoRA targets")}
    assert targets == {f"LoRA targets: {part}" for part in ("vision", "projector", "language")}
    assert found["LoRA targets: language"][1] == "14 layers"
    assert "export loads in transformers, same values" in found


@pytest.mark.usefixtures("without_export")
def test_of_a_model_of_text_pictures_are_not_asked(tmp_path: Path) -> None:
    found = outcome(write_tiny(tmp_path / "model"), tmp_path)
    assert found.pop("reads a picture") == ("not checked", "a model of text")
    assert {status for status, _ in found.values()} == {"passed"}, found


@pytest.mark.usefixtures("without_export")
def test_a_part_without_linear_layers_gets_no_lora(tmp_path: Path) -> None:
    found = outcome(write_tiny_vlm(tmp_path / "model", "gemma3"), tmp_path)
    assert found["LoRA targets: projector"] == ("not checked", "it has no linear layer: full or frozen")
    assert found["merge = adapter on"][0] == "passed"


@pytest.mark.usefixtures("without_export")
def test_a_fault_is_told_and_the_other_checks_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_tiny_vlm(tmp_path / "model", "qwen2_vl")
    (folder / "processor_config.json").unlink()
    assert main(["check", "--model", str(folder), "--suite"]) == 1
    shown = capsys.readouterr().out
    assert "FAILED  reads a picture" in shown and "has no processor" in shown
    assert "ok      merge = adapter on" in shown and "1 of the checks failed" in shown


@pytest.mark.usefixtures("without_export")
def test_a_merge_that_forgets_the_tower_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forgets(layer: Any, name: str) -> Any:
        weight, bias = merged_parameters(layer, name)
        tower = weight.shape[-1] == 32
        return (layer.get_base_layer().weight.detach().float() if tower else weight), bias

    monkeypatch.setattr(merging, "merged_parameters", forgets)
    status, detail = outcome(write_tiny_vlm(tmp_path / "model", "qwen2_5_vl"), tmp_path)["merge = adapter on"]
    assert status == "failed" and "differs from base + adapter" in detail


def test_what_cannot_be_loaded_ends_the_suite(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "model")
    state = load_file(folder / "model.safetensors")
    state.pop(next(name for name in state if "q_proj" in name))
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    ((name, (status, detail)),) = outcome(folder, tmp_path).items()
    assert (name, status) == ("loads in transformers", "failed") and "lacks 1 weights" in detail


@pytest.mark.parametrize("words", [["check"], ["check", "--suite"], ["check", "a.yaml", "--model", "b", "--suite"]])
def test_a_check_is_of_a_recipe_or_of_a_model(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    assert "--model FOLDER --suite" in capsys.readouterr().err
