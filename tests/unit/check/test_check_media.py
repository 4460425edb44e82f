"""`align check` on recipes with media: the report, and `media:` beside a model that has no use for it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from align.check.validate import validate
from align.errors import RecipeError, UserError
from align.recipe.load import load_document
from tests.tiny_vlms import write_tiny_vlm
from tests.unit.data.media_world import picture, png


def recipe(folder: Path, model: Path, media: str) -> Path:
    (folder / "a.png").write_bytes(png(picture(84, 56)))
    rows = [{"prompt": f"{i}?", "completion": "3.", "image": name} for i, name in enumerate(["a.png"] * 3 + ["b.png"])]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = folder / "recipe.yaml"
    path.write_text(
        f"name: x\noutput: {folder}/runs\nmodel: {{path: {model}}}\n{media}"
        "stages: [{id: sft, kind: sft, data: {path: data.jsonl, on_bad_row: skip}, batch: {sequences: 2}, steps: 1}]\n"
    )
    return path


def test_media_beside_a_model_of_text_and_images_for_it_are_refused(
    tiny_model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    path = recipe(tmp_path, tiny_model_folder(), "media: {max_pixels: 5000}\n")
    loaded, document = load_document(path, [])
    with pytest.raises(RecipeError, match="`media` beside a qwen3 model, which takes text alone"):
        validate(loaded, tmp_path, document=document)
    loaded, document = load_document(recipe(tmp_path, tiny_model_folder(), ""), [])
    with pytest.raises(UserError, match="the row has images, and the model takes text alone"):
        validate(loaded, tmp_path, document=document)


@pytest.mark.slow
@pytest.mark.usefixtures("measured_here")
def test_the_report_says_what_becomes_of_images(tmp_path: Path) -> None:
    model = write_tiny_vlm(tmp_path / "model", "qwen2_5_vl")
    loaded, document = load_document(recipe(tmp_path, model, "media: {max_pixels: 3200, workers: 1}\n"), [])
    [stage] = validate(loaded, tmp_path, document=document).stages
    text = "\n".join(stage.lines)
    assert "media: 3 images (1 different), sizes 84x56/84x56/84x56 -> 56x56/56x56/56x56, tokens each 4/4/4" in text
    assert "there is no file b.png" in text and "1 row refused for their media" in text
    assert list((tmp_path / "runs" / ".cache" / "media").glob("*.png")), "the run finds them there"
    assert "max_patches" not in text
    loaded, document = load_document(
        recipe(tmp_path, model, "media: {max_pixels: 3200, workers: 1}\n"), ["stages.sft.packing.max_patches=15"]
    )
    [stage] = validate(loaded, tmp_path, document=document).stages
    assert "the largest example are 16 patches, more than `packing.max_patches` (15)" in "\n".join(stage.lines)
