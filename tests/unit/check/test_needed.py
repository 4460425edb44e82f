"""`align check` refuses by name what is not installed, and what a quantised base cannot be used for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from align.check import needed
from align.check.machine import Machine
from align.check.validate import validate
from align.errors import UserError
from align.recipe.load import load_document
from tests.unit.check.workshop import Workshop
from tests.unit.model.tiny import LLAMA, write_tiny

MACHINE = Machine(cores=8, gpus=0, memory=16 << 30)


def without(monkeypatch: pytest.MonkeyPatch, *modules: str) -> None:
    found = needed.installed
    monkeypatch.setattr(needed, "installed", lambda module: module not in modules and found(module))


def problems(recipe: Path, *overrides: str) -> str:
    loaded, document = load_document(recipe, overrides)
    with pytest.raises(UserError) as error:
        validate(loaded, recipe.parent, document=document, machine=MACHINE)
    return str(error.value)


@pytest.mark.parametrize(
    ("module", "overrides", "words"),
    [
        ("wandb", ["report.wandb.project=p"], "pip install 'wandb', or take it out of the recipe"),
        ("tensorboard", [], "set `report.tensorboard: false`"),
        ("vllm", ["stages.grpo.rollout.name=vllm"], "pip install 'align-rl[gpu]', or set `rollout.name: transformers`"),
        (
            "bitsandbytes",
            ["stages.sft.adapter.kind=qlora"],
            "pip install 'bitsandbytes', or use `adapter: {kind: lora}`",
        ),
        ("bitsandbytes", ["stages.sft.optim.name=adamw_8bit"], "pip install 'bitsandbytes', or use adamw"),
        ("deepspeed", ["placement.trainer.strategy=zero2", "placement.trainer.ranks=2"], "pip install 'deepspeed'"),
    ],
)
def test_a_missing_package_is_named_with_the_key_that_asks_for_it(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch, module: str, overrides: list[str], words: str
) -> None:
    without(monkeypatch, module)
    assert words in problems(Path(workshop.recipe).absolute(), *overrides)


def quantised(folder: Path, settings: dict[str, Any]) -> Path:
    base = write_tiny(folder / "base", LLAMA)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    rows = [{"prompt": "what is six times seven", "completion": " the answer is forty two"}] * 8
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "short.py").write_text(
        "from rewards import reward\n\n@reward\ndef short(samples):\n    return [0.0 for _ in samples]\n"
    )
    return base


def recipe(folder: Path, *stages: str, adapter: str = "{kind: lora, rank: 4}") -> Path:
    file = folder / "recipe.yaml"
    text = f"name: q\nmodel: {{path: {folder / 'base'}}}\nstages:\n"
    text += f"  - {{id: sft, kind: sft, adapter: {adapter}, data: rows.jsonl, steps: 1}}\n"
    file.write_text(text + "".join(f"  - {stage}\n" for stage in stages))
    return file


BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (BNB, "bitsandbytes, 4 bits"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes, 8 bits"),
        ({"quant_method": "gptq", "bits": 4}, "gptq, 4 bits"),
        ({"quant_method": "awq", "bits": 4}, "awq, 4 bits"),
        ({"quant_method": "fp8"}, "fp8"),
        ({"quant_method": "mxfp4"}, "mxfp4"),
    ],
)
def test_a_stage_that_needs_whole_weights_is_refused_before_training_on_a_quantised_base(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(needed, "installed", lambda module: True)
    quantised(tmp_path, settings)
    for kind, stage in (
        ("merge", "{id: merged, kind: merge, from: sft}"),
        ("export", "{id: out, kind: export, from: sft}"),
        (
            "evaluate",
            "{id: exam, kind: evaluate, of: [sft], data: rows.jsonl, rewards: [short.py:short], "
            "rollout: {name: transformers, max_tokens: 4}}",
        ),
    ):
        said = problems(recipe(tmp_path, stage))
        assert f"the base is quantised ({words}), and a stage of kind {kind} needs whole weights" in said
        assert "qlora" in said


def test_what_else_a_quantised_base_cannot_be_used_for_is_refused_by_its_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    quantised(tmp_path, BNB)
    loaded, document = load_document(recipe(tmp_path), [])
    assert validate(loaded, tmp_path, document=document, machine=MACHINE).stages, "LoRA on it is fine"
    assert "whole weights are trained" in problems(recipe(tmp_path, adapter="{kind: full}"))
    assert "would pack it again" in problems(recipe(tmp_path, adapter="{kind: qlora, rank: 4}"))


@pytest.mark.parametrize(
    ("method", "module", "package"),
    [("bitsandbytes",) * 3, ("gptq", "gptqmodel", "gptqmodel"), ("awq",) + ("gptqmodel",) * 2],
)
def test_the_package_that_loads_a_quantised_base_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, module: str, package: str
) -> None:
    monkeypatch.chdir(tmp_path)
    quantised(tmp_path, {"quant_method": method, "bits": 4})
    without(monkeypatch, module)
    assert f"the package '{package}' is not installed, and `model.path` needs it" in problems(recipe(tmp_path))
