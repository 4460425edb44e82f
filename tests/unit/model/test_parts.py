"""Parts of vision-language models: every parameter in one, targets of LoRA by part, and models that are not known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from align.errors import ModelError, Unsupported
from align.model import adapters
from align.model.load import load_model
from align.model.lora_targets import fresh_config, target_notes, targeted_modules
from align.model.parts import parts_of, sizes
from align.recipe.adapter import Adapter
from tests import architectures
from tests.tiny_vlms import FAMILIES, write_tiny_vlm
from tests.unit.model.tiny import write_tiny

# where each family keeps its tower and what stands between it and the language model
WHERE = {
    "qwen2_vl": ("model.visual.blocks", "model.visual.merger"),
    "qwen2_5_vl": ("model.visual.blocks", "model.visual.merger"),
    "qwen3_vl": ("model.visual.blocks", "model.visual.deepstack_merger_list"),
    "internvl": ("model.vision_tower", "model.multi_modal_projector"),
    "llava_onevision": ("model.vision_tower", "model.multi_modal_projector"),
    "gemma3": ("model.vision_tower", "model.multi_modal_projector"),
    "idefics3": ("model.vision_model", "model.connector"),
    "smolvlm": ("model.vision_model", "model.connector"),
}


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any]:
    folder = write_tiny_vlm(tmp_path_factory.mktemp(request.param), request.param)
    return request.param, load_model(folder, dtype=torch.float32)


def test_every_parameter_is_of_one_part(family: tuple[str, Any]) -> None:
    name, model = family
    parts = parts_of(model)
    found: dict[str, list[str]] = {"vision": [], "projector": [], "language": []}
    for path, _ in model.named_parameters():
        found[parts.of(path)].append(path)
    tower, projector = WHERE[name]
    assert any(path.startswith(tower) for path in found["vision"])
    assert any(path.startswith(projector) for path in found["projector"])
    backbone = next(path for path, module in model.named_modules() if module is model.get_decoder())
    assert all(path.startswith((backbone, "lm_head")) for path in found["language"])
    assert sum(sizes(model).values()) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("part", ["vision", "projector", "language"])
def test_all_linear_means_the_layers_of_the_parts_that_get_lora(family: tuple[str, Any], part: str) -> None:
    _, model = family
    tune = dict.fromkeys(("vision", "projector", "language"), "frozen") | {part: "lora"}
    parts = parts_of(model)
    adapter = Adapter.model_validate({"tune": tune})
    linear = {n for n, m in model.named_modules() if isinstance(m, nn.Linear) and parts.of(n) == part} - {"lm_head"}
    if not linear:  # Gemma 3 keeps its projection as a bare matrix
        with pytest.raises(ModelError, match=rf"adapter\.tune\.{part}.*no linear layer"):
            fresh_config(model, adapter)
        return
    assert targeted_modules(model, fresh_config(model, adapter)) == linear


def test_a_word_is_looked_for_in_the_parts_that_get_lora_alone(family: tuple[str, Any]) -> None:
    name, model = family
    found = targeted_modules(model, fresh_config(model, Adapter(targets=("q_proj", "v_proj"))))
    assert found and {parts_of(model).of(path) for path in found} == {"language"}
    assert len(found) == 2 * model.config.get_text_config().num_hidden_layers, name


def test_a_model_of_text_is_one_part_and_has_no_others_to_tune(tmp_path: Path) -> None:
    model = load_model(write_tiny(tmp_path), dtype=torch.float32)
    assert set(sizes(model)) == {"language"}
    with pytest.raises(Unsupported, match=r"adapter\.tune\.vision.*reads text alone"):
        fresh_config(model, Adapter.model_validate({"tune": {"vision": "lora"}}))


def test_a_module_of_no_known_part_is_named(family: tuple[str, Any]) -> None:
    _, model = family
    model.model.oracle = nn.Linear(2, 2)
    try:
        with pytest.raises(ModelError, match=r"no part that is known: model\.oracle"):
            parts_of(model)
    finally:
        del model.model.oracle


@pytest.mark.parametrize(
    ("name", "without", "said"),
    [
        ("falcon_h1", "mamba.out_proj", "peft refuses"),
        ("nemotron_h", "mixer.out_proj", "peft refuses"),
        ("phimoe", "router", "not the product"),
        ("llama4_text", "router", "not the product"),
        ("deepseek_v4", "o_a_proj", "not the product"),
        ("qwen3_moe", "experts", "stacked in tensors"),
    ],
)
def test_all_linear_leaves_out_what_lora_cannot_be_put_on_and_says_so(name: str, without: str, said: str) -> None:
    """Such models could not be trained with the default targets: peft raised, or its sum with what a router returns."""
    model = architectures.make(name)
    config = fresh_config(model, Adapter(rank=4))
    found = targeted_modules(model, config)
    assert found and not any(path.endswith(without) for path in found)
    assert any(path.endswith(without) for path, _ in model.named_modules())
    [note] = [note for note in target_notes(model, Adapter(rank=4)) if without.rpartition(".")[2] in note]
    assert said in note
    peft = adapters.attach(model, Adapter(rank=4), None, seed=0)
    assert torch.isfinite(peft(input_ids=torch.arange(3, 20)[None], use_cache=False).logits).all()
    assert target_notes(architectures.make("llama"), Adapter(rank=4)) == []
    assert target_notes(model, Adapter(rank=4, targets=["q_proj"])) == [], "what is asked for by name is no surprise"


@pytest.mark.parametrize("name", ["deepseek_v3", "glm4_moe", "qwen2_moe"])
def test_an_adapter_for_a_model_of_experts_is_taken_up_again_by_us_and_by_peft(name: str, tmp_path: Path) -> None:
    """peft put LoRA of a dense layer's names on the stacked experts, and the next stage refused the saved adapter."""
    from peft import PeftModel

    architectures.make(name).save_pretrained(tmp_path / "base")
    base = load_model(tmp_path / "base", dtype=torch.float32)
    peft = adapters.attach(base, Adapter(rank=4), None, seed=0)
    with torch.no_grad():
        for path, values in peft.named_parameters():
            assert "lora_" not in path or ".experts." not in path
            if "lora_B" in path:
                values.normal_(0, 0.2)
    ids = torch.arange(3, 30)[None]
    wanted = peft(input_ids=ids, use_cache=False).logits
    peft.save_pretrained(tmp_path / "adapter")
    again = adapters.attach(load_model(tmp_path / "base", dtype=torch.float32), None, tmp_path / "adapter", seed=0)
    plain = PeftModel.from_pretrained(load_model(tmp_path / "base", dtype=torch.float32), tmp_path / "adapter")
    for one in (again, plain):
        assert torch.equal(one(input_ids=ids, use_cache=False).logits, wanted)
    if name == "deepseek_v3":
        with pytest.raises(ModelError, match=r"peft gives LoRA on gate_proj, up_proj .* stacked experts"):
            fresh_config(architectures.make(name), Adapter(rank=4, targets=("q_b_proj", "up_proj", "gate_proj")))
