"""Prompts with pictures in the transformers engine, against the model's own forward over prompt and completion."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from align.errors import DataError, Unsupported
from align.mediastore import tensors_path
from align.model.generate.engine import TransformersEngine
from align.protocols.fleet import PromptItem, Sampling
from rollout.base import EngineSpec, generate
from tests.tiny_media import forward_logps, holds_mark
from tests.tiny_models import write_tiny_qwen3
from tests.vllm_families import Family

SAMPLING = Sampling(max_tokens=8)


def engine_of(family: Family) -> TransformersEngine:
    engine = TransformersEngine(EngineSpec("transformers", str(family.base)))
    engine.publish(family.as_it_is())
    return engine


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl", "internvl", "llava_onevision", "gemma3", "smolvlm"])
def test_completions_of_pictures_and_text_in_one_batch_have_the_log_probabilities_of_the_models_own_forward(
    name: str, tmp_path: Path
) -> None:
    family = Family(name, tmp_path)
    engine, model, prompts = engine_of(family), family.model(), family.prompts()
    groups = generate(engine, prompts, 4, SAMPLING)
    for group in groups:
        kept = [c for c in group.completions if not holds_mark(model, c.token_ids)]
        assert kept
        for completion in kept:
            mine = forward_logps(model, group.prompt, completion.token_ids)
            np.testing.assert_allclose(completion.logps, mine, atol=1e-5)
    alone = generate(engine, prompts[2:3], 4, SAMPLING)[0]
    assert [c.token_ids.tolist() for c in alone.completions] == [c.token_ids.tolist() for c in groups[2].completions]


def test_a_scored_sequence_with_a_picture_has_the_log_probabilities_that_it_was_sampled_with(tmp_path: Path) -> None:
    family = Family("qwen2_5_vl", tmp_path)
    engine, prompt = engine_of(family), family.prompts()[0]
    [group] = generate(engine, [prompt], 1, SAMPLING)
    drawn = group.completions[0]
    whole = np.concatenate([prompt.token_ids, drawn.token_ids])
    [seen] = engine.logps([whole], [prompt.media])
    np.testing.assert_allclose(seen[len(prompt.token_ids) - 1 :], drawn.logps, atol=1e-5)
    other = family.prompts()[1]  # the same text, another picture
    assert other.token_ids.tolist() == prompt.token_ids.tolist()
    [else_seen] = engine.logps([whole], [other.media])
    assert np.abs(else_seen - seen)[len(prompt.token_ids) - 1 :].max() > 1e-4


def test_a_new_version_of_the_tower_is_what_the_next_pictures_are_seen_with(tmp_path: Path) -> None:
    family = Family("qwen2_5_vl", tmp_path)
    engine, policy, prompts = engine_of(family), family.policy("all-linear"), family.prompts()[:1]
    generate(engine, prompts, 1, SAMPLING)
    engine.publish(family.weights(policy))
    [group] = generate(engine, prompts, 1, SAMPLING)
    drawn = group.completions[0]
    np.testing.assert_allclose(drawn.logps, forward_logps(policy, prompts[0], drawn.token_ids), atol=1e-5)


def test_a_text_model_refuses_pictures_and_a_lost_file_is_named(tmp_path: Path) -> None:
    family = Family("qwen2_5_vl", tmp_path)
    prompt = family.prompts()[0]
    engine = engine_of(family)
    text = TransformersEngine(EngineSpec("transformers", str(write_tiny_qwen3(tmp_path / "text"))))
    text.publish(family.as_it_is())
    readable = PromptItem(0, np.full_like(prompt.token_ids, 5), 0, media=prompt.media)
    with pytest.raises(Unsupported, match="takes no images"):
        generate(text, [readable], 1, SAMPLING)
    file = tensors_path(prompt.media[0].store, prompt.media[0].key)
    file.unlink()
    with pytest.raises(DataError, match=file.name):
        generate(engine, [prompt], 1, SAMPLING)
