"""Parts of a model trained in their own ways: what is trained is what changes, survives, is published and merged."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from align.errors import ModelError, Unsupported
from align.export.merge import merge
from align.export.soup import soup
from align.model.load import load_model
from align.model.parts import parts_of
from align.protocols.trees import Tree
from align.recipe.adapter import Adapter, Rate
from align.recipe.inputs import Model
from align.recipe.parts import LossTerm, Optim
from align.train.spec import TrainerSpec
from align.train.trainer import PolicyTrainer
from tests.tiny_vlms import write_tiny_vlm
from tests.unit.core.trees import conversation, pair
from tests.unit.model.images import image_inputs, image_logits

FAMILY = "qwen2_5_vl"


def adapter(kind: str = "lora", **tune: Any) -> Adapter:
    return Adapter.model_validate({"kind": kind, "rank": 4, "alpha": 8, "tune": tune})


MIXED = adapter(vision="full", projector="full")
TUNES = {
    "defaults": adapter(),
    "lora everywhere": adapter(vision="lora", projector="lora"),
    "full tower and projector, LoRA language": MIXED,
    "LoRA tower, full language": adapter(vision="lora", language="full"),
    "projector alone": adapter("full", projector="full", language="frozen"),
    "full": adapter("full"),
    "full everywhere": adapter("full", vision="full", projector="full"),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_vlm(tmp_path_factory.mktemp("base") / "model", FAMILY)


def make_spec(base: Path, tuned: Adapter, loss: str = "sft", **options: Any) -> TrainerSpec:
    model = Model(path=str(base), dtype=options.pop("dtype", "float32"))
    return TrainerSpec(
        model=model,
        base=str(base),
        adapter_config=tuned,
        losses=(LossTerm(name=loss),),
        optim=Optim(lr=1e-2, schedule="constant", warmup=0.0),
        total_updates=10,
        **options,
    )


def trees(seed: int = 0, n: int = 3, make: Any = conversation) -> list[Tree]:
    rng = np.random.default_rng(seed)
    return [make(rng, i) for i in range(n)]


def update_on_an_image(trainer: PolicyTrainer, folder: Path, seed: int = 0) -> None:
    """One step of the trainer's own optimizer on the gradient of the model's own forward with an image."""
    assert trainer.optimizer is not None
    model = trainer.module.model
    inputs = image_inputs(folder, seed)
    labels = torch.where(inputs["input_ids"] < 250, inputs["input_ids"], -100)
    trainer.module.use("padded", "sdpa")
    with torch.autocast("cpu", torch.bfloat16, enabled=trainer.module.autocast is not None):
        model(**inputs, labels=labels, use_cache=False).loss.backward()
    trainer.optimizer.step()
    trainer.optimizer.zero_grad(set_to_none=True)


def logits_of(trainer: PolicyTrainer, folder: Path) -> torch.Tensor:
    trainer.module.eval()
    trainer.module.use("padded", "sdpa")
    return image_logits(trainer.module.model, image_inputs(folder))


# ------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("tuned", TUNES.values(), ids=TUNES)
def test_what_is_trained_is_what_changes(base: Path, tuned: Adapter) -> None:
    trainer = PolicyTrainer(make_spec(base, tuned))
    model = trainer.module.model
    parts, before = parts_of(model), {n: p.detach().clone() for n, p in model.named_parameters()}
    for step in range(2):  # the first moves lora_B alone
        update_on_an_image(trainer, base, step)
    changed: dict[str, set[str]] = {"vision": set(), "projector": set(), "language": set()}
    for name, parameter in model.named_parameters():
        if not torch.equal(before[name], parameter):
            changed[parts.of(name)].add("lora" if "lora_" in name else "full")
    expected = {part: set() if mode == "frozen" else {mode} for part, mode in tuned.modes.items()}
    assert changed == expected
    table = trainer.describe()["parts"]
    assert {part: row["mode"] for part, row in table.items()} == tuned.modes
    assert sum(row.get("trained", 0) for row in table.values()) == trainer.describe()["trained_parameters"]


def test_every_part_has_its_own_rates_under_one_schedule(base: Path) -> None:
    rates = {"vision": Rate(1e-5, 0.3), "projector": Rate(2e-4, 0.0)}
    spec = make_spec(base, MIXED, rates=rates)
    spec = replace(spec, optim=spec.optim.model_copy(update={"schedule": "linear", "weight_decay": 0.1}))
    trainer = PolicyTrainer(spec)
    assert trainer.optimizer is not None
    metrics = trainer.step(trees(), step=0, progress=0.45)
    assert metrics["optim/lr"] == pytest.approx(0.5e-2)
    assert metrics["optim/lr_vision"] == pytest.approx(0.5e-5)
    assert metrics["optim/lr_projector"] == pytest.approx(1e-4)
    decays = {(g["part"], g["params"][0].ndim > 1): g["weight_decay"] for g in trainer.optimizer.param_groups}
    assert decays["vision", True] == 0.3 and decays["projector", True] == 0.0 and decays["language", True] == 0.1
    assert decays["vision", False] == 0.0


def test_parts_that_are_trained_whole_are_float32_masters(base: Path) -> None:
    trainer = PolicyTrainer(make_spec(base, MIXED, dtype="bfloat16"))
    parts = parts_of(trainer.module.model)
    kinds = {(parts.of(n), "lora_" in n): p.dtype for n, p in trainer.module.model.named_parameters()}
    assert kinds["vision", False] == kinds["projector", False] == torch.float32
    assert kinds["language", False] == torch.bfloat16
    assert kinds["language", True] == torch.float32
    before = {n: p.detach().clone() for n, p in trainer.module.model.named_parameters() if p.requires_grad}
    update_on_an_image(trainer, base)
    assert any(not torch.equal(before[n], p) for n, p in trainer.module.model.named_parameters() if ".visual." in n)


def test_a_part_that_the_model_has_not_is_refused(tmp_path: Path) -> None:
    from tests.unit.model.tiny import write_tiny

    folder = write_tiny(tmp_path)
    for tuned in (MIXED, adapter("full", vision="full")):
        with pytest.raises(Unsupported, match=r"adapter\.tune\.vision"):
            PolicyTrainer(make_spec(folder, tuned))


# ------------------------------------------------------------------------------------------------- references


@pytest.mark.parametrize("tuned", [MIXED, adapter(vision="lora", language="full")], ids=["mixed", "language"])
def test_the_reference_stands_still_where_whole_parts_are_trained(base: Path, tuned: Adapter) -> None:
    trainer = PolicyTrainer(make_spec(base, tuned, "dpo", reference="start"))
    pairs = trees(make=pair)
    before = logits_of(trainer, base)
    trainer.module.use("shared", "sdpa")
    for step in range(2):
        trainer.step(pairs, step=step, progress=step / 10)
    update_on_an_image(trainer, base)
    moved = logits_of(trainer, base)
    assert (moved - before).abs().max() > 1e-3
    with trainer.policy.reference():
        held = logits_of(trainer, base)
    assert torch.equal(held, before)
    assert torch.equal(logits_of(trainer, base), moved)


# ------------------------------------------------------------------------------------------------- files


@pytest.fixture(scope="module", params=["full tower and projector, LoRA language", "lora everywhere"])
def trained(request: pytest.FixtureRequest, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    trainer = PolicyTrainer(make_spec(base, TUNES[request.param]))
    for step in range(3):
        update_on_an_image(trainer, base, step)
    folder = tmp_path_factory.mktemp("trained")
    trainer.write_model(folder / "adapter")
    return trainer, folder / "adapter", TUNES[request.param]


def start_base(base: Path, folder: Path) -> Path:
    return folder / "base" if (folder / "base").is_dir() else base


def test_a_stage_goes_on_with_what_another_left(trained: Any, base: Path) -> None:
    trainer, folder, tuned = trained
    own = start_base(base, folder)
    assert (own != base) == tuned.mixed
    assert not tuned.mixed or (own / "preprocessor_config.json").is_file() or (own / "processor_config.json").is_file()
    spec = replace(make_spec(own, tuned), adapter=str(folder))
    assert torch.equal(logits_of(PolicyTrainer(spec), base), logits_of(trainer, base))


@pytest.mark.slow
def test_merging_carries_every_part(trained: Any, base: Path, tmp_path: Path) -> None:
    trainer, folder, _ = trained
    wanted = logits_of(trainer, base)
    report = merge(start_base(base, folder), folder, tmp_path / "merged")
    model = load_model(tmp_path / "merged", dtype=torch.float32)
    got = image_logits(model, image_inputs(tmp_path / "merged"))
    assert (got - wanted).abs().max() < 1e-4
    assert (got - image_logits(load_model(base, dtype=torch.float32), image_inputs(base))).abs().max() > 1e-2
    assert report.module_error < 1e-5


def test_published_weights_are_those_of_every_part(trained: Any, base: Path, tmp_path: Path) -> None:
    trainer, _, _ = trained
    trainer.policy.spec = replace(trainer.policy.spec, publish="weights")
    published = trainer.publish(tmp_path / "v1", 1)
    assert published.kind == "weights"
    state, old = load_file(tmp_path / "v1" / "model.safetensors"), load_file(base / "model.safetensors")
    assert state.keys() == old.keys()
    moved = {name for name in state if not torch.equal(state[name], old[name])}
    assert any("visual.blocks" in name for name in moved)
    assert any("visual.merger" in name for name in moved)
    assert any("q_proj" in name for name in moved)


def test_a_restored_trainer_has_every_part(trained: Any, base: Path, tmp_path: Path) -> None:
    trainer, _, tuned = trained
    (tmp_path / "checkpoint").mkdir()
    trainer.save(tmp_path / "checkpoint")
    again = PolicyTrainer(make_spec(base, tuned))
    again.restore(tmp_path / "checkpoint")
    assert torch.equal(logits_of(again, base), logits_of(trainer, base))
    update_on_an_image(trainer, base, 7)
    update_on_an_image(again, base, 7)
    assert torch.equal(logits_of(again, base), logits_of(trainer, base))


def test_an_adapter_beside_whole_parts_is_not_taken_for_one_of_the_plain_base(base: Path, tmp_path: Path) -> None:
    PolicyTrainer(make_spec(base, MIXED)).write_model(tmp_path / "adapter")
    with pytest.raises(ModelError, match="its own base"):
        merge(base, tmp_path / "adapter", tmp_path / "merged")
    with pytest.raises(Unsupported, match="trained whole beside this adapter"):
        soup([tmp_path / "adapter"], [1.0], tmp_path / "soup")
