"""Vision-language models from scratch: config, tokens, processor and template fit each other, for every loader."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from align.data.scratch import train_tokenizer
from align.errors import ModelError, Unsupported
from align.export.images import image_samples, picture
from align.model.load import load_model
from align.model.parts import sizes
from align.model.scratch import write_base
from align.recipe.families import FAMILIES, family_of
from align.recipe.inputs import Model
from tests.unit.model.images import image_logits

TEXT = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 512,
}  # fmt: skip
VISION: dict[str, dict[str, Any]] = {
    "qwen2_vl": {"depth": 2, "embed_dim": 32, "num_heads": 2, "mlp_ratio": 2},
    "qwen2_5_vl": {
        "depth": 2, "hidden_size": 32, "num_heads": 2, "intermediate_size": 48, "window_size": 56,
        "fullatt_block_indexes": [1],
    },
    "qwen3_vl": {
        "depth": 2, "hidden_size": 32, "num_heads": 2, "intermediate_size": 48, "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0],
    },
}  # fmt: skip


def config_of(family: str) -> dict[str, Any]:
    head = {"head_dim": 32} if family == "qwen3_vl" else {}  # the others have no such setting
    return copy.deepcopy({"model_type": family, "text_config": TEXT | head, "vision_config": VISION[family]})


def write(folder: Path, config: dict[str, Any], seed: int = 0) -> Path:
    data = folder.parent / "texts.jsonl"
    data.write_text("\n".join(json.dumps({"text": f"how many squares are red? {n}"}) for n in range(20)))
    spec = {"config": config, "tokenizer": {"train_on": str(data), "vocab_size": 320}}
    model = Model.model_validate(spec)
    assert model.tokenizer is not None
    train_tokenizer(model.tokenizer, folder, family=family_of(model.config))
    write_base(model, folder, seed)
    return folder


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    return request.param, write(tmp_path_factory.mktemp(request.param) / "base", config_of(request.param))


def test_the_processor_and_the_model_agree_on_a_picture(made: tuple[str, Path]) -> None:
    family, folder = made
    model = load_model(folder, dtype=torch.float32)
    assert model.config.model_type == family and set(sizes(model)) == {"vision", "projector", "language"}
    (one,), (two,) = image_samples(folder, 0), image_samples(folder, 1)
    tokens = int((one["input_ids"] == model.config.image_token_id).sum())
    merge = model.config.vision_config.spatial_merge_size
    assert tokens == int(one["image_grid_thw"].prod()) // merge**2 > 1
    assert (image_logits(model, one) - image_logits(model, two)).abs().max() > 1e-4


def test_the_template_writes_marks_for_media_and_marks_what_is_generated(made: tuple[str, Path]) -> None:
    from transformers import AutoProcessor

    _, folder = made
    processor = AutoProcessor.from_pretrained(folder)
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "how many"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "3"}]},
    ]
    text = processor.apply_chat_template(messages)
    assert text == (
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>how many<|im_end|>\n"
        "<|im_start|>assistant\n3<|im_end|>\n"
    )
    asked = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
    out = processor.tokenizer.apply_chat_template(messages, **asked)
    masked = [i for i, own in zip(out["input_ids"], out["assistant_masks"], strict=True) if own]
    assert processor.tokenizer.decode(masked) == "3<|im_end|>"
    ids = processor(text=[text], images=[[picture(0)]])["input_ids"][0]
    assert ids.count(processor.tokenizer.convert_tokens_to_ids("<|image_pad|>")) > 1


def test_the_same_seed_writes_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    one, two = (write(tmp_path / name / "base", config_of("qwen2_vl")) for name in ("one", "two"))
    assert {p.name: p.read_bytes() for p in one.iterdir()} == {p.name: p.read_bytes() for p in two.iterdir()}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"vision_config": {"dept": 2}}, r"vision_config\.dept.*no setting[\s\S]*did you mean 'depth'"),
        ({"text_config": {"hidden_sise": 2}}, r"text_config\.hidden_sise.*no setting[\s\S]*did you mean 'hidden_size'"),
        ({"text_configs": {}}, r"text_configs.*no setting[\s\S]*did you mean 'text_config'"),
        ({"text_config": {**TEXT, "vocab_size": 8}}, r"text_config\.vocab_size.*the tokenizer has"),
        ({"text_config": None}, "needs `text_config`"),
        ({"vision_config": {"depth": 1, "out_hidden_size": 63}}, "hands to the language model"),
    ],
)
def test_nested_settings_are_checked_as_others_are(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    with pytest.raises(ModelError, match=words):
        write(tmp_path / "base", config_of("qwen2_5_vl") | change)


def test_other_families_are_refused_with_those_that_are_offered(tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match=r"llava[\s\S]*qwen2_5_vl"):
        write(tmp_path / "base", {"model_type": "llava"})
