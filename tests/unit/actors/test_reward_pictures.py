"""The reward `reward_model` where the checkpoint sees: against transformers, a picture and a completion at a time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from align.actors.plugins import plugin_spec
from align.model import adapters
from align.model.score_head import load_score_model
from align.model.scoring_class import scoring_class
from align.recipe.parts import Reward
from rewards import Sample
from rewards.pool import RewardPool
from tests.tiny_media import picture
from tests.tiny_vlms import write_tiny_vlm

pytestmark = pytest.mark.slow  # its process, and that of its pictures, import transformers


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward model as our stage writes it, and two pictures beside it."""
    folder = tmp_path_factory.mktemp("seeing")
    base = write_tiny_vlm(folder / "base", "qwen2_5_vl")
    model = load_score_model(base, dtype=torch.float32, seed=5)
    adapters.save_full(model, folder / "rm", base=base, dtype=torch.float32)
    for name, seed in (("a", 1), ("b", 2)):
        picture(seed).save(folder / f"{name}.png")
    return folder


@pytest.fixture(scope="module")
def pool(written: Path) -> Iterator[RewardPool]:
    reward = {"use": "reward_model", "args": {"path": str(written / "rm")}, "max_error_rate": 1.0}
    with RewardPool([plugin_spec(Reward.model_validate(reward))], written, seed=0) as pool:
        yield pool


def asked(image: Path | None, text: str = "What is it?") -> list[dict[str, Any]]:
    shown = [] if image is None else [{"type": "image", "path": str(image)}]
    return [{"role": "user", "content": [*shown, {"type": "text", "text": text}] if shown else text}]


@torch.inference_mode()
def alone(folder: Path, sample: Sample) -> float:
    """By transformers' own processor and forward."""
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(folder)
    model = scoring_class(folder).from_pretrained(folder, dtype=torch.float32).eval()
    turns = [*sample.messages, {"role": "assistant", "content": sample.completion}]
    start = processor.apply_chat_template(list(sample.messages), tokenize=False, add_generation_prompt=True)
    rest = processor.apply_chat_template(turns, tokenize=False).removeprefix(start)
    files = [part["path"] for m in sample.messages if isinstance(m["content"], list) for part in m["content"][:1]]
    given = processor(text=[start], images=[Image.open(f) for f in files] or None, return_tensors="pt")
    behind = processor.tokenizer(rest, add_special_tokens=False, return_tensors="pt")["input_ids"]
    given["input_ids"] = torch.cat([given["input_ids"], behind], 1)
    given["attention_mask"] = torch.ones_like(given["input_ids"])
    if "mm_token_type_ids" in given:
        given["mm_token_type_ids"] = torch.cat([given["mm_token_type_ids"], torch.zeros_like(behind)], 1)
    return float(model(**given).logits[0])


def test_scores_after_pictures_equal_transformers_one_by_one(written: Path, pool: RewardPool) -> None:
    a, b = written / "a.png", written / "b.png"
    samples = [Sample("red", asked(a)), Sample("red", asked(b)), Sample("a blue one", asked(b)),
               Sample("red", asked(None))]  # fmt: skip
    result = pool.score_sync(samples)
    assert not result.failures, result.failures
    found = [row[0] for row in result.scores]
    assert found == pytest.approx([alone(written / "rm", sample) for sample in samples], abs=1e-4)
    assert abs(found[0] - found[1]) > 1e-3, "what it is shown decides"  # type: ignore[operator]


def test_a_prompt_that_cannot_be_shown_is_a_failure_of_its_own(written: Path, pool: RewardPool) -> None:
    video = [{"role": "user", "content": [{"type": "video", "path": "x.mp4"}, {"type": "text", "text": "?"}]}]
    samples = [Sample("red", asked(written / "a.png")), Sample("red", video), Sample("red", asked(written / "c.png"))]
    result = pool.score_sync(samples)
    assert [row[0] is None for row in result.scores] == [False, True, True]
    said = " ".join(failure.message for failure in result.failures)
    assert "reads images from files" in said and "there is no file" in said
