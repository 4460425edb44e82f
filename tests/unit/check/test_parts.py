"""`align check` of models that read images: what is trained, as a table; the memory it takes; what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from align.check.memory import sizes as memory
from align.check.memory.plan import Work, trainer
from align.check.plan import lines
from align.check.trained import Measured
from align.check.validate import validate
from align.errors import ModelError, Unsupported, UserError
from align.recipe.adapter import Adapter
from align.recipe.load import load_document
from tests.tiny_vlms import write_tiny_vlm


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_vlm(tmp_path_factory.mktemp("base") / "model", "qwen2_5_vl")


def checked(folder: Path, base: Path, tune: dict[str, Any], **adapter: Any) -> str:
    data = folder / "data.jsonl"
    row = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}
    data.write_text("\n".join([json.dumps(row)] * 4))
    stage = {"id": "one", "kind": "sft", "data": {"path": "data.jsonl"}, "steps": 2, "optim": {"lr": 1e-4}}
    stage["adapter"] = {"tune": tune, **adapter}
    recipe = folder / "recipe.yaml"
    recipe.write_text(json.dumps({"name": "vlm", "model": {"path": str(base)}, "stages": [stage]}))
    loaded, document = load_document(recipe, [])
    return "\n".join(lines(validate(loaded, folder, document=document), "recipe.yaml"))


@pytest.mark.usefixtures("measured_here")
def test_the_plan_shows_what_is_trained_of_each_part(base: Path, tmp_path: Path) -> None:
    tune = {"vision": {"mode": "full", "lr": 1e-5, "weight_decay": 0.05}, "projector": "full"}
    shown = checked(tmp_path, base, tune, rank=8)
    rows = [line.split() for line in shown.splitlines() if line.startswith(("  vision", "  projector", "  language"))]
    table = {row[0]: row[1:] for row in rows}
    assert table["vision"][0] == "full" and table["vision"][1] == table["vision"][2]
    assert table["vision"][3:] == ["1e-05", "0.05"]
    assert table["projector"][3:] == ["0.0001", "0"]
    assert table["language"][0] == "lora"
    assert "on all-linear of language, and all weights of vision and projector" in shown


@pytest.mark.usefixtures("measured_here")
@pytest.mark.parametrize(
    ("tune", "adapter", "words"),
    [
        ({"vision": "lora"}, {"kind": "full"}, "makes no adapter"),
        ({"language": "frozen"}, {}, "puts LoRA on no part"),
        ({"language": "frozen"}, {"kind": "full"}, "freezes every part"),
        ({"vision": {"mode": "frozen", "lr": 1e-4}}, {}, "a frozen part has no `lr`"),
        ({"tower": "full"}, {}, "tower"),
        ({"vision": "lora"}, {"targets": ["q_prjo"]}, "no linear layer"),
    ],
)
def test_contradictions_are_refused(
    base: Path, tmp_path: Path, tune: dict[str, Any], adapter: dict[str, Any], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        checked(tmp_path, base, tune, **adapter)


@pytest.mark.slow
def test_the_numbers_of_a_table_are_those_of_the_model(base: Path) -> None:
    import torch

    from align.model.load import load_model
    from align.model.parts import sizes

    config = memory.read_config(base)
    table = Measured(config).table(Adapter.model_validate({"tune": {"vision": "full"}, "rank": 4}))
    assert table is not None
    model = load_model(base, dtype=torch.float32)
    assert {part: row.parameters for part, row in table.items()} == sizes(model)
    assert table["vision"].trained == table["vision"].parameters and table["projector"].trained == 0
    layers = [m for n, m in model.model.language_model.named_modules() if isinstance(m, torch.nn.Linear)]
    assert table["language"].trained == sum(4 * sum(layer.weight.shape) for layer in layers)


@pytest.mark.usefixtures("measured_here")
def test_a_model_from_scratch_is_measured_as_it_will_be_written() -> None:
    text = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = {"depth": 2, "hidden_size": 32, "num_heads": 2, "intermediate_size": 48}
    config = {"model_type": "qwen2_5_vl", "text_config": text | {"num_key_value_heads": 1}, "vision_config": vision}
    table = Measured(config, 400).table(Adapter.model_validate({"tune": {"projector": "full"}}))
    assert table is not None and table["projector"].trained == table["projector"].parameters
    layers = (128 + 1) * 128 + (128 + 1) * 64  # two, of four patches of 32
    assert table["projector"].parameters == 32 + layers
    with pytest.raises(ModelError, match="'dept' is no setting"):
        Measured(config | {"vision_config": {"dept": 1}}, 400).table(Adapter())


def test_models_of_text_have_no_parts_to_tune() -> None:
    with pytest.raises(Unsupported, match="reads text alone"):
        Measured({"model_type": "qwen3"}).table(Adapter.model_validate({"tune": {"projector": "full"}}))
    assert Measured({"model_type": "qwen3"}).table(Adapter()) is None


def test_memory_counts_the_tower_and_what_is_trained_whole() -> None:
    row = memory.Row
    layers = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2}
    sizes = memory.sizes_of({**layers, "vocab_size": 9})
    assert sizes is not None
    tower = memory.tower_of({"vision_config": {"depth": 3, "hidden_size": 32, "intermediate_size": 48}})
    assert tower == memory.Tower(3, 32, 48) and memory.tower_of({}) is None

    def estimate(mode: Any, trained: int, patches: int = 0) -> Any:
        table: memory.Table = {"vision": row(mode, 1000, trained), "language": row("lora", 5000, 100)}
        work = Work("bfloat16", tokens=10, patches=patches, second_copy=True)
        return trainer(sizes, Adapter(), work, table=table, tower=tower).parts

    frozen, full = estimate("frozen", 0, 7), estimate("full", 1000, 7)
    assert frozen["weights"] == 12000 and full["weights"] == 5000 * 2 + 1000 * 4
    assert frozen["reference"] == 0 and full["reference"] == 4000
    assert full["optimizer"] - frozen["optimizer"] == 8 * 1000 and full["gradients"] == 4 * 1100
    assert full["activations of images"] == 3 * frozen["activations of images"] == 3 * 7 * (12 * 32 + 4 * 48) * 2
