"""A completion that holds an image's token: a word for engines, and for every forward of the trainer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from align.data.packing import collate, text_positions
from align.model.generate.engine import TransformersEngine
from align.model.media.placeholders import positions_of
from align.model.media.prompt_inputs import prompt_inputs
from align.model.policy_module import PolicyModule
from align.protocols.fleet import Completion, Group
from align.stages.groups import to_trees
from rollout.base import EngineSpec
from tests.tiny_media import image_ids
from tests.vllm_families import Family


@pytest.mark.parametrize("name", ["qwen2_5_vl", "internvl", "gemma3", "smolvlm"])
@torch.no_grad()
def test_an_images_token_in_a_completion_is_computed_as_engines_compute_it(name: str, tmp_path: Path) -> None:
    family = Family(name, tmp_path)
    prompt, model = family.prompts()[0], family.model()
    [mark, *_] = image_ids(model)
    drawn = np.array([5, mark, 7, mark, 9])
    _, position, inputs = prompt_inputs(model, [(prompt.token_ids, prompt.media)], "cpu")
    out = model(**inputs, use_cache=True)
    expected = []
    for n, token in enumerate(drawn.tolist()):  # as an engine does: a token at a time, and no features
        expected.append(float(out.logits[0, -1].log_softmax(-1)[token]))
        out = model(
            input_ids=torch.tensor([[token]]),
            position_ids=position[:, None] + n,
            past_key_values=out.past_key_values,
            use_cache=True,
        )
    engine = TransformersEngine(EngineSpec("transformers", str(family.base)))
    engine.publish(family.as_it_is())
    [scored] = engine.logps([np.concatenate([prompt.token_ids, drawn])], [prompt.media])
    np.testing.assert_allclose(scored[-5:], expected, atol=1e-5)

    zeros = np.zeros(5, np.float32)
    whole = Completion(drawn, zeros, np.zeros(5, np.int32), "", "length")
    start = Completion(drawn[1:3], zeros[:2], np.zeros(2, np.int32), "", "length")
    trees = to_trees([Group(prompt, (whole, start))], np.zeros(2, np.float32), np.zeros(2, dtype=bool))
    batch = collate(trees, positions_of(model, text_positions))
    module = PolicyModule(model)
    np.testing.assert_allclose(module(batch).logps[:5], expected, atol=1e-5)
    module.use("padded", "eager")
    np.testing.assert_allclose(module(batch).logps[:5], expected, atol=1e-5)
    assert not model.get_input_embeddings()._forward_hooks
