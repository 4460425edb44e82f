"""How the transformers engine reads prompts: rows have what they have alone, whatever layers a model has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from align.errors import Unsupported
from align.model.generate.engine import TransformersEngine
from align.model.generate.reading import find_reading
from align.model.load import load_model
from align.protocols.fleet import FailedPrompt, Sampling
from rollout.base import Request, generate
from tests.unit.model.test_generate import BASE, Spec, by_hand, prompt
from tests.unit.model.tiny import LLAMA, QWEN3, write_tiny


def write_stateful(folder: Path, name: str) -> Path:
    """A tiny model that carries a state from token to token, its random weights large enough to show it."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from tests.tiny_models import write_byte_tokenizer

    settings = {
        "vocab_size": 512,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "pad_token_id": 0,
        "max_position_embeddings": 128,
    }
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **settings, **STATEFUL[name]))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0 if parameter.ndim > 1 else 1.0)
    model.save_pretrained(folder)
    write_byte_tokenizer(folder)
    return folder


HEADS = {"intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
STATEFUL: dict[str, dict[str, Any]] = {
    "qwen3_next": {
        **HEADS,
        "head_dim": 16,
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
    },
    "lfm2": {**HEADS, "layer_types": ["conv", "full_attention"]},
    "mamba": {"state_size": 8},
}


@pytest.mark.parametrize("name", STATEFUL)
def test_prompts_of_unequal_lengths_leave_a_state_alone(name: str, tmp_path: Path) -> None:
    folder = write_stateful(tmp_path, name)
    engine = TransformersEngine(Spec(str(folder)))
    assert (engine._reading == "uncached") == (name == "mamba")  # whose cache goes by another name
    engine.publish(BASE)
    prompts = [prompt(n, length, group_id=n) for n, length in enumerate((3, 11, 3, 7))]
    model = load_model(folder, dtype=torch.float32)
    groups = generate(engine, prompts, 2, Sampling(0.7, max_tokens=9))
    assert [group.prompt.group_id for group in groups] == [0, 1, 2, 3]
    for group in groups:
        for completion in group.completions:
            expected = by_hand(model, group.prompt.token_ids, completion, 0.7)
            assert np.allclose(completion.logps, expected, atol=2e-4)


def test_attention_alone_reads_prompts_of_all_lengths_at_once(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "model", QWEN3)
    for dtype in ("bfloat16", "float32"):
        assert TransformersEngine(Spec(str(folder), dtype=dtype))._reading == "padded"


def test_where_padding_leaks_into_rows_prompts_of_one_length_are_read_together(tmp_path: Path) -> None:
    """A model that is told of no mask, as layers with a state that ignore it."""
    engine = TransformersEngine(Spec(str(write_tiny(tmp_path / "model", QWEN3))))
    model, own = engine._weights.model, engine._weights.model.forward
    model.forward = lambda *args, attention_mask=None, **kwargs: own(*args, **kwargs)
    engine._reading = find_reading(model, "cpu")
    assert engine._reading == "equal"
    engine.publish(BASE)
    groups = generate(engine, [prompt(n, length) for n, length in enumerate((4, 9, 4, 9))], 2, Sampling(max_tokens=6))
    for n, (group, length) in enumerate(zip(groups, (4, 9, 4, 9), strict=True)):
        assert len(group.prompt.token_ids) == length and group.prompt.seed == prompt(n, length).seed
        for completion in group.completions:
            expected = by_hand(model, group.prompt.token_ids, completion, 1.0)
            assert np.allclose(completion.logps, expected, atol=2e-5)


def test_a_model_whose_values_depend_on_its_company_is_refused(tmp_path: Path) -> None:
    model = load_model(write_tiny(tmp_path / "model", QWEN3), dtype=torch.float32)
    own = model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        out = own(*args, **kwargs)
        out.logits = out.logits * (1 + 0.5 * (len(out.logits) - 1))  # another temperature for more rows
        return out

    model.forward = forward
    with pytest.raises(Unsupported, match="cannot be sampled from") as error:
        find_reading(model, "cpu")
    assert "padded" in str(error.value) and "rollout.name=vllm" in str(error.value)


ROPES: dict[str, dict[str, Any]] = {
    "dynamic": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
    "longrope": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 4,
        "long_factor": [1.5, 2.0, 4.0, 8.0],
        "original_max_position_embeddings": 32,
    },
}


@pytest.mark.parametrize("rope", ROPES)
def test_rows_whose_frequencies_would_change_under_way_fail_with_the_reason(rope: str, tmp_path: Path) -> None:
    longest = 32 if rope == "dynamic" else 128
    folder = write_tiny(
        tmp_path / "model", {**LLAMA, "rope_parameters": ROPES[rope], "max_position_embeddings": longest}
    )
    engine = TransformersEngine(Spec(str(folder), max_model_len=100))
    engine.publish(BASE)
    request = Request(0, prompt(0, 20), 1, Sampling(max_tokens=13))
    engine.add([request])
    [(_, failed)] = engine.step()
    assert isinstance(failed, FailedPrompt) and failed.cause == "too long" and "beyond 32 tokens" in failed.message
    [group] = generate(engine, [prompt(0, 19)], 1, Sampling(max_tokens=13))
    expected = by_hand(load_model(folder, dtype=torch.float32), prompt(0, 19).token_ids, group.completions[0], 1.0)
    assert np.allclose(group.completions[0].logps, expected, atol=2e-5)
