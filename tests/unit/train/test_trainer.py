"""The trainer: it learns, it is the same after a restore, its reference stands still, its bad steps change nothing."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from align.errors import NonFiniteError
from align.protocols.trees import Tree
from align.recipe.adapter import Adapter
from align.recipe.inputs import Model
from align.recipe.parts import LossTerm, Optim
from align.train.spec import TrainerSpec
from align.train.strategy import trainable
from align.train.trainer import PolicyTrainer
from tests.unit.core.test_forward import make_model
from tests.unit.core.trees import conversation, group, pair

LORA, FULL = Adapter(rank=4, alpha=8), Adapter(kind="full")
QLORA, DORA = Adapter(kind="qlora", rank=4, alpha=8), Adapter(kind="dora", rank=4, alpha=8, rslora=True)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "model"
    make_model("qwen3").save_pretrained(folder)
    return folder


def make_spec(base: Path, loss: str = "sft", kind: Adapter = LORA, **options: Any) -> TrainerSpec:
    loss_options = options.pop("loss_options", {})
    return TrainerSpec(
        model=Model(path=str(base), dtype="float32"),
        base=str(base),
        adapter_config=kind,
        losses=(LossTerm(name=loss, **loss_options),),
        optim=Optim(lr=1e-2, schedule="constant", warmup=0.0),
        total_updates=10,
        **options,
    )


def trees_for(loss: str, n: int = 6, seed: int = 0) -> list[Tree]:
    rng = np.random.default_rng(seed)
    make = {"sft": conversation, "dpo": pair, "grpo": group}[loss]
    return [make(rng, i) for i in range(n)]


def weights(trainer: PolicyTrainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainable(trainer.module).items()}


def train(trainer: PolicyTrainer, loss: str, steps: range) -> list[dict[str, float]]:
    return [trainer.step(trees_for(loss, seed=s % 3), step=s, progress=s / 10) for s in steps]


@pytest.mark.parametrize("adapter", [LORA, QLORA, DORA, FULL], ids=["lora", "qlora", "dora", "full"])
@pytest.mark.parametrize("loss", ["sft", "dpo"])
def test_training_lowers_the_loss(base: Path, loss: str, adapter: Adapter) -> None:
    trainer = PolicyTrainer(make_spec(base, loss, adapter, reference="start" if loss == "dpo" else None))
    history = [m["loss/total"] for m in train(trainer, loss, range(9))]
    assert history[-3] < history[0] and history[-1] < history[2]


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit"])
@pytest.mark.parametrize("adapter", [LORA, QLORA, DORA, FULL], ids=["lora", "qlora", "dora", "full"])
def test_a_restored_trainer_goes_on_bit_for_bit(base: Path, adapter: Adapter, optimizer: str, tmp_path: Path) -> None:
    spec = make_spec(base, "sft", replace_dropout(adapter))
    spec = replace(spec, optim=spec.optim.model_copy(update={"name": optimizer}))
    straight = PolicyTrainer(spec)
    train(straight, "sft", range(3))
    (tmp_path / "checkpoint").mkdir()
    straight.save(tmp_path / "checkpoint")
    expected = train(straight, "sft", range(3, 6))

    resumed = PolicyTrainer(spec)
    resumed.restore(tmp_path / "checkpoint")
    got = train(resumed, "sft", range(3, 6))
    for mine, theirs in zip(got, expected, strict=True):
        assert {k: v for k, v in mine.items() if not k.startswith("time/")} == {
            k: v for k, v in theirs.items() if not k.startswith("time/")
        }
    other = weights(resumed)
    assert all(torch.equal(value, other[name]) for name, value in weights(straight).items())


def replace_dropout(adapter: Adapter) -> Adapter:
    """Dropout on the LoRA case, so that the random state matters."""
    return adapter if adapter.kind == "full" else adapter.model_copy(update={"dropout": 0.1})


def test_weights_in_four_bits_are_counted_as_the_weights_that_they_are(base: Path) -> None:
    counts = [PolicyTrainer(make_spec(base, "sft", adapter)).describe() for adapter in (LORA, QLORA)]
    assert counts[0]["parameters"] == counts[1]["parameters"] and counts[0]["parts"] == counts[1]["parts"]


@pytest.mark.parametrize("adapter", [LORA, QLORA, DORA, FULL], ids=["lora", "qlora", "dora", "full"])
def test_the_start_reference_is_the_start_from_base_and_from_an_adapter(
    base: Path, adapter: Adapter, tmp_path: Path
) -> None:
    first = PolicyTrainer(make_spec(base, "dpo", adapter, reference="start"))
    assert first.evaluate(trees_for("dpo"))["loss/total"] == pytest.approx(math.log(2), abs=1e-6)
    train(first, "dpo", range(4))
    assert first.evaluate(trees_for("dpo"))["loss/total"] != pytest.approx(math.log(2), abs=1e-3)
    first.write_model(tmp_path / "out")
    start = {"adapter": str(tmp_path / "out")} if adapter.kind != "full" else {}
    folder = base if adapter.kind != "full" else tmp_path / "out"
    second = PolicyTrainer(make_spec(folder, "dpo", adapter, reference="start", **start))
    assert second.evaluate(trees_for("dpo"))["loss/total"] == pytest.approx(math.log(2), abs=1e-6)
    if adapter.kind != "full":
        against_base = PolicyTrainer(make_spec(base, "dpo", adapter, reference="base", **start))
        assert against_base.evaluate(trees_for("dpo"))["loss/total"] != pytest.approx(math.log(2), abs=1e-3)


def test_only_the_adapter_is_trained_and_the_reference_is_not(base: Path, tmp_path: Path) -> None:
    seed = PolicyTrainer(make_spec(base, "dpo", reference="start"))
    train(seed, "dpo", range(2))
    seed.write_model(tmp_path / "adapter")
    trainer = PolicyTrainer(make_spec(base, "dpo", reference="start"))
    trainer = PolicyTrainer(replace(trainer.spec, adapter=str(tmp_path / "adapter")))
    before = {n: p.detach().clone() for n, p in trainer.module.named_parameters()}
    train(trainer, "dpo", range(3))
    for name, parameter in trainer.module.named_parameters():
        moved = not torch.equal(before[name], parameter)
        assert moved == ("lora_" in name and ".default." in name), name


def test_the_packing_budget_changes_no_update(base: Path) -> None:
    whole, split = (PolicyTrainer(make_spec(base, "grpo", max_tokens=n)) for n in (10_000, 12))
    a, b = (t.step(trees_for("grpo"), step=0, progress=0.0) for t in (whole, split))
    assert b["train/microbatches"] > a["train/microbatches"]
    assert a["loss/total"] == pytest.approx(b["loss/total"], rel=1e-5)
    other = weights(split)
    for name, value in weights(whole).items():
        torch.testing.assert_close(value, other[name], atol=1e-5, rtol=1e-4)


def test_a_list_of_losses_is_a_weighted_sum_under_the_names_of_its_first_term(base: Path) -> None:
    spec = make_spec(base, "dpo", reference="start")
    terms = (LossTerm(name="dpo", weight=0.8), LossTerm(name="sft", weight=0.2), LossTerm(name="sft", weight=0.1))
    both = PolicyTrainer(replace(spec, losses=terms))
    alone = {name: PolicyTrainer(replace(spec, losses=(LossTerm(name=name),))) for name in ("dpo", "sft")}
    metrics = both.evaluate(trees_for("dpo"))
    parts = {name: trainer.evaluate(trees_for("dpo")) for name, trainer in alone.items()}
    expected = 0.8 * parts["dpo"]["loss/total"] + 0.3 * parts["sft"]["loss/total"]
    assert metrics["loss/total"] == pytest.approx(expected, rel=1e-6)
    assert metrics["loss/dpo"] == pytest.approx(parts["dpo"]["loss/total"])
    assert metrics["loss/sft"] == metrics["loss/sft-2"] == pytest.approx(parts["sft"]["loss/total"])
    assert metrics["rewards/margins"] == parts["dpo"]["rewards/margins"]
    assert "policy/token_probability" in metrics


def test_logps_are_returned_per_tree_and_sequence_in_the_order_given(base: Path) -> None:
    trainer = PolicyTrainer(make_spec(base, "grpo", max_tokens=20))
    trees = list(reversed(trees_for("grpo", 5)))
    together = trainer.logps(trees)
    for tree, found in zip(trees, together, strict=True):
        assert [len(x) for x in found] == [len(b) for b in tree.branches]
        (alone,) = trainer.logps([tree])
        for x, y in zip(found, alone, strict=True):
            np.testing.assert_allclose(x, y, atol=1e-5)


def test_a_non_finite_step_changes_nothing_and_three_stop_the_run(base: Path) -> None:
    trainer = PolicyTrainer(make_spec(base, "grpo"))
    train(trainer, "grpo", range(2))
    poisoned = trees_for("grpo", 2)
    branch = poisoned[0].branches[0]
    bad = replace(branch, advantages=np.full(len(branch), np.nan, dtype=np.float32))
    poisoned[0] = replace(poisoned[0], branches=(bad, *poisoned[0].branches[1:]), origin="prompts.jsonl:12")
    before = weights(trainer)
    metrics = trainer.step(poisoned, step=2, progress=0.2)
    assert metrics["optim/skipped"] == 1.0
    after = weights(trainer)
    assert all(torch.equal(v, after[k]) for k, v in before.items())
    trainer.step(poisoned, step=3, progress=0.3)
    with pytest.raises(NonFiniteError, match=r"prompts\.jsonl:12"):
        trainer.step(poisoned, step=4, progress=0.4)


@pytest.mark.parametrize("adapter", [LORA, FULL], ids=["lora", "full"])
def test_a_publication_names_the_weights_by_digest(base: Path, adapter: Adapter, tmp_path: Path) -> None:
    trainer = PolicyTrainer(make_spec(base, "grpo", adapter))
    first = trainer.publish(tmp_path / "v1", 1)
    same = trainer.publish(tmp_path / "again", 1)
    train(trainer, "grpo", range(1))
    second = trainer.publish(tmp_path / "v2", 2)
    assert first.digest == same.digest != second.digest
    assert second.kind == ("adapter" if adapter.kind == "lora" else "weights")
    (file,) = Path(second.path).glob("*.safetensors")
    assert load_file(file)


def test_full_training_in_bfloat16_keeps_float32_masters(base: Path) -> None:
    spec = make_spec(base, "sft", FULL)
    trainer = PolicyTrainer(replace(spec, model=Model(path=str(base), dtype="bfloat16")))
    assert all(p.dtype == torch.float32 for p in trainer.parameters)
    history = [m["loss/total"] for m in train(trainer, "sft", range(6))]
    assert history[-1] < history[0]
