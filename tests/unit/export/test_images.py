"""Models that read images: merged and exported whole, with their processors, proved on a picture."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from align.errors import ExportError
from align.export.export import export
from align.export.images import has_processor, image_samples, picture
from align.export.merge import merge
from align.mediastore import PROCESSOR_FILES
from align.model import adapters
from align.model.load import load_model
from align.recipe.adapter import Adapter
from tests.tiny_vlms import FAMILIES, write_tiny_vlm
from tests.unit.model.images import image_inputs, image_logits
from tests.unit.model.tiny import train_a_little, write_tiny

EACH_WAY = ("qwen3_vl", "internvl", "gemma3", "idefics3")  # of storing names, of placing the projector


OTHERS = [pytest.param(family, marks=pytest.mark.slow) for family in sorted(FAMILIES) if family not in EACH_WAY]


@pytest.fixture(scope="module", params=[*EACH_WAY, *OTHERS])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_vlm(tmp_path_factory.mktemp(request.param) / "base", request.param)


def test_an_adapter_on_tower_and_language_is_merged_into_both(base: Path, tmp_path: Path) -> None:
    projector = "frozen" if base.parent.name.startswith("gemma3") else "lora"
    tuned = Adapter.model_validate({"rank": 4, "tune": {"vision": "lora", "projector": projector}})
    peft = adapters.attach(load_model(base, dtype=torch.float32), tuned, None, seed=0)
    train_a_little(peft)
    adapters.save(peft, tmp_path / "adapter")
    inputs = image_inputs(base)
    wanted = image_logits(peft, inputs)
    report = merge(base, tmp_path / "adapter", tmp_path / "merged")
    assert report.modules == len(list(adapters.lora_layers(peft)))
    merged = load_model(tmp_path / "merged", dtype=torch.float32)
    assert (image_logits(merged, image_inputs(tmp_path / "merged")) - wanted).abs().max() < 1e-3
    assert (image_logits(load_model(base, dtype=torch.float32), inputs) - wanted).abs().max() > 1e-2


def test_the_picture_of_a_proof_reaches_the_model(base: Path) -> None:
    model = load_model(base, dtype=torch.float32)
    (one,), (two,) = image_samples(base, 0), image_samples(base, 1)
    assert torch.equal(one["input_ids"], two["input_ids"])
    assert (image_logits(model, one) - image_logits(model, two)).abs().max() > 1e-3


def test_a_model_of_text_has_no_picture_to_be_proved_on(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path)
    assert not has_processor(folder) and image_samples(folder, 0) == []
    assert picture(0).size == (112, 84) and picture(0).tobytes() != picture(1).tobytes()


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_vlm(tmp_path_factory.mktemp("qwen") / "base", "qwen2_vl")


@pytest.mark.slow
def test_an_export_carries_the_processor_and_is_proved_on_a_picture(qwen: Path, tmp_path: Path) -> None:
    report = export(qwen, tmp_path / "out", engines=())
    kept = {path.name for path in qwen.iterdir() if path.suffix in (".json", ".jinja")}
    assert kept <= {path.name for path in (tmp_path / "out").iterdir()} and has_processor(tmp_path / "out")
    assert [check.status for check in report.checks] == ["proved"]


def test_an_export_whose_processor_takes_no_picture_fails_and_leaves_nothing(qwen: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(qwen, broken)
    file = next(broken / name for name in PROCESSOR_FILES if (broken / name).is_file())
    settings = json.loads(file.read_text())
    settings.get("image_processor", settings)["patch_size"] = 13
    file.write_text(json.dumps(settings))
    with pytest.raises(ExportError, match="cannot read a picture"):
        export(broken, tmp_path / "out", engines=())
    assert not (tmp_path / "out").exists()
