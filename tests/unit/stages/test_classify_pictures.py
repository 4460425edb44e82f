"""A classifier of pictures from files on disk to `align classify`: the stage, its adapter, and the merged folder."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from align.cli.main import main
from align.recipe.schema import Recipe
from tests.tiny_vlms import write_tiny_vlm
from tests.unit.stages.test_pipeline import start
from tests.unit.stages.test_reward_model import LocalBackend, write_rows

pytestmark = pytest.mark.slow  # processes that read pictures import transformers
LANGUAGE = r"(.*\.)?language_model\..*(q|v|down)_proj"
COLOURS = {"red": (200, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 200)}


def coloured(folder: Path, name: str, rows: int) -> str:
    """Questions about a picture of one colour, with a little noise; the label is its name."""
    rng, found = random.Random(name), []
    for number in range(rows):
        label = list(COLOURS)[number % 3]
        noise = np.random.default_rng([number, len(name)]).integers(-20, 20, (56, 56, 3))
        pixels = np.clip(np.array(COLOURS[label]) + noise, 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{name}-{number}.png")
        text = rng.choice(["Which colour? <image>", "<image> What do you see?"])
        messages = [{"role": "user", "content": text}]
        found.append({"messages": messages, "images": [f"{name}-{number}.png"], "label": label})
    return write_rows(folder / f"{name}.jsonl", found)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, Any]:
    folder = tmp_path_factory.mktemp("pictures")
    recipe = Recipe.model_validate(
        {
            "name": "pictures",
            "output": str(folder / "runs"),
            "model": {"path": str(write_tiny_vlm(folder / "model", "qwen3_vl")), "dtype": "float32"},
            "stages": [
                {"id": "judge", "kind": "classify", "labels": list(COLOURS), "data": coloured(folder, "train", 24),
                 "adapter": {"rank": 4, "alpha": 8, "targets": LANGUAGE},
                 "batch": {"sequences": 12}, "steps": 16, "optim": {"lr": 1e-2},
                 "eval": {"data": coloured(folder, "held", 9)}, "save": {"every": "100%"}},
                {"id": "merged", "kind": "merge", "from": "judge"},
            ],
        }
    )  # fmt: skip
    summary, _ = start(recipe, LocalBackend())
    return recipe, summary["stages"]["judge"]


def test_it_learns_the_colours_and_tells_those_of_other_pictures(finished: tuple[Recipe, Any]) -> None:
    _, stage = finished
    assert stage["metrics"]["eval/accuracy"] == 1.0 and stage["metrics"]["eval/f1/green"] == 1.0


@pytest.mark.parametrize("which", ["adapter", "merged"])
def test_align_classify_says_the_same_of_the_files(
    which: str, finished: tuple[Recipe, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, stage = finished
    folder = Path(stage["artefacts"]["adapter"]) if which == "adapter" else recipe.run_folder / "merged" / "model"
    data = recipe.stages[0].eval.data[0].path  # type: ignore[union-attr]
    command = ["classify", str(folder), data, "--base", str(recipe.model.path), "--out", str(tmp_path / "said.jsonl")]
    assert main(command) == 0, capsys.readouterr().err
    answers = [json.loads(line) for line in (tmp_path / "said.jsonl").read_text().splitlines()]
    assert [answer["label"] for answer in answers] == [list(COLOURS)[n % 3] for n in range(9)]
    loss = -sum(answer["log_probs"][answer["expected"]] for answer in answers) / 9
    assert loss == pytest.approx(stage["metrics"]["eval/loss"], abs=1e-4)
