"""Images that an environment shows, in vLLM and in whole runs: engine and trainer agree on every token behind them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.image_runs import GRPO, write_data, write_recipe
from tests.runs import metrics, rollouts, run
from tests.unit.data.media_world import shown
from tests.unit.episodes.album import STOPS, World, computed, play, question

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_vllm_samples_behind_images_of_turns_as_the_trainer_computes_them(family: str, tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    world = World(tmp_path, family)
    prompts = world.prompts(question("What is ", shown("0.png"), " this?"), question("Only text"))
    spec = replace(world.spec("vllm", max_media=2, args={"opens": False}), max_model_len=1024, media={"image": 3})
    groups = play(spec, prompts, max_tokens=40, stop_token_ids=STOPS)
    assert [[len(c.media) for c in g.completions] for g in groups] == [[2, 2], [2, 2]]
    found = computed(world.model, groups)
    np.testing.assert_allclose(found["packed"], found["engine"], atol=1e-4)
    np.testing.assert_allclose(found["packed"], found["padded"], atol=1e-5)


WORLD = """
import numpy as np
from PIL import Image
from rewards import environment

@environment
class Paint:
    def reset(self, row, seed):
        self.turn, self.seed = 0, seed
        return ["First: ", self._picture()]

    def _picture(self):
        values = np.random.default_rng(self.seed + self.turn).integers(0, 256, (56, 84, 3), dtype=np.uint8)
        return Image.fromarray(values)

    def respond(self, reply):
        self.turn += 1
        return ["Now: ", self._picture()] if self.turn < 3 else None

    def reward(self):
        return self.turn / 3
"""


@pytest.mark.parametrize("engine", ["transformers", "vllm"])
def test_a_run_trains_on_images_that_its_environment_shows(engine: str, tmp_path: Path) -> None:
    if engine == "vllm":
        pytest.importorskip("vllm")
    write_data(tmp_path)
    (tmp_path / "world.py").write_text(WORLD)
    stage = {
        **GRPO,
        "from": None,
        "steps": 2,
        "batch": {"groups": 2, "group_size": 2},
        "rewards": [],
        "environment": {"use": "world.py:Paint", "max_media": 3, "max_observation_tokens": 64, "max_turns": 3},
        "rollout": {"name": engine, "max_tokens": 24, "stop_token_ids": list(STOPS), "truncated": "keep"},
    }
    run(write_recipe(tmp_path, "paint", [stage]))
    folder = tmp_path / "runs" / "paint"
    lines = metrics(folder, "grpo")
    assert max(line["mismatch/max_abs"] for line in lines) <= 1e-4
    assert all(line["episode/images"] > 1 and line["episode/refused_images"] == 0 for line in lines)
    for row in rollouts(folder, "grpo"):
        assert "First: <|vision_start|>" in row["prompt"] and len(row["media"]) >= 1
        shown_parts = [
            part
            for turn in json.loads(row["turns"])
            if isinstance(turn["content"], list)
            for part in turn["content"]
            if part["type"] == "image"
        ]
        assert shown_parts and all(part.keys() == {"type", "path"} for part in shown_parts)
    assert not (folder / "grpo" / "environment" / "images").exists(), "the next run is shown other images"
