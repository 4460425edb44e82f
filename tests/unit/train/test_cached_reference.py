"""`reference: cached` in the trainer: it learns what `reference: start` does, without that one's forwards."""

from __future__ import annotations

import asyncio
import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import align
from align.protocols.trees import Tree
from align.recipe.adapter import Adapter
from align.recipe.inputs import Model
from align.recipe.parts import LossTerm, Optim
from align.train import numerics
from align.train.spec import TrainerSpec
from align.train.strategy import trainable
from align.train.trainer import PolicyTrainer
from tests.unit.core.test_forward import make_model
from tests.unit.core.trees import pair, unpaired
from tests.unit.stages.test_reference_cache import make_cache

LORA, FULL = Adapter(rank=4, alpha=8), Adapter(kind="full")
APO = LossTerm(name="kto", variant="apo_zero_unpaired")
DPO = (LossTerm(name="dpo"),)


class Shell:
    """A PolicyTrainer behind coroutines, as an actor's proxy is."""

    def __init__(self, trainer: PolicyTrainer) -> None:
        self.trainer = trainer

    async def logps(self, trees: Sequence[Tree]) -> list[list[np.ndarray]]:
        return self.trainer.logps(trees)

    async def forward(self) -> dict[str, Any]:
        return self.trainer.forward()

    async def numerics(self) -> dict[str, Any]:
        return self.trainer.numerics()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "model"
    make_model("qwen3").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that was trained, so that what starts from it is not the base."""
    trainer = PolicyTrainer(make_spec(base, LORA, DPO, reference="start"))
    for step in range(3):
        trainer.step(trees_for(DPO), step=step, progress=step / 10)
    folder = tmp_path_factory.mktemp("adapter") / "adapter"
    trainer.write_model(folder)
    return folder


def make_spec(base: Path, kind: Adapter, losses: tuple[LossTerm, ...], **options: Any) -> TrainerSpec:
    return TrainerSpec(
        model=Model(path=str(base), dtype=options.pop("dtype", "float32")),
        base=str(base),
        adapter_config=kind,
        losses=losses,
        optim=Optim(lr=1e-2, schedule="constant", warmup=0.0),
        total_updates=10,
        **options,
    )


def trees_for(losses: Sequence[LossTerm], n: int = 6) -> list[Tree]:
    rng = np.random.default_rng(0)
    return [(unpaired if losses[0].name == "kto" else pair)(rng, i) for i in range(n)]


def with_reference(trainer: PolicyTrainer, trees: Sequence[Tree], folder: Path) -> list[Tree]:
    return asyncio.run(make_cache(folder, Shell(trainer), trainer.numerics()).attach(trees))


def count_forwards(trainer: PolicyTrainer) -> list[str]:
    """Every forward from now on: "policy" with gradient, "quiet" without."""
    seen: list[str] = []
    modules = {id(m): m for m in (trainer.module, getattr(trainer.policy, "_reference", None)) if m is not None}
    for module in modules.values():
        module.register_forward_hook(lambda *_: seen.append("policy" if torch.is_grad_enabled() else "quiet"))
    return seen


@pytest.mark.parametrize(
    ("kind", "continues", "losses"),
    [
        (LORA, False, DPO),
        (LORA, True, DPO),
        (FULL, False, DPO),
        (LORA, False, (LossTerm(name="dpo", weight=0.8), LossTerm(name="sft", weight=0.2))),
        (LORA, False, (*DPO, LossTerm(name="orpo"))),
        (LORA, True, (APO,)),
    ],
    ids=["lora", "lora from an adapter", "full", "dpo and sft", "dpo and orpo", "kto without a reference point"],
)
def test_a_stage_learns_the_same_with_start_and_with_cached_and_runs_no_reference_forward(
    base: Path, adapter: Path, tmp_path: Path, kind: Adapter, continues: bool, losses: tuple[LossTerm, ...]
) -> None:
    start = {"adapter": str(adapter)} if continues else {}
    plain, held = trees_for(losses), trees_for(losses, 9)[6:]
    ours, theirs = (
        PolicyTrainer(make_spec(base, kind, losses, reference=reference, max_tokens=40, **start))
        for reference in ("cached", "start")
    )
    carrying = with_reference(ours, [*plain, *held], tmp_path)
    mine, mine_held = carrying[: len(plain)], carrying[len(plain) :]
    forwards, more = count_forwards(ours), count_forwards(theirs)
    for step in range(4):
        forwards.clear()
        more.clear()
        got = ours.step(mine, step=step, progress=step / 10)
        expected = theirs.step(plain, step=step, progress=step / 10)
        if step == 0 and losses == DPO:
            assert got["loss/total"] == pytest.approx(math.log(2), abs=1e-6)
        assert got["loss/total"] == pytest.approx(expected["loss/total"], abs=1e-6)
        assert got["rewards/accuracies"] == expected["rewards/accuracies"]
        n = int(got["train/microbatches"])
        assert n > 1 and forwards == ["policy"] * n, "a microbatch is one forward, of the policy"
        assert sorted(more) == ["policy"] * n + ["quiet"] * n, "as many again for the reference that is not cached"
    reference = trainable(theirs.module)
    for name, value in trainable(ours.module).items():
        torch.testing.assert_close(value, reference[name], atol=1e-6, rtol=1e-6)
    assert ours.evaluate(mine_held)["loss/total"] == pytest.approx(theirs.evaluate(held)["loss/total"], abs=1e-6)


def test_no_second_copy_of_weights_or_adapter_is_kept(base: Path, adapter: Path) -> None:
    full = PolicyTrainer(make_spec(base, FULL, DPO, reference="cached"))
    assert full.policy._reference is None  # type: ignore[attr-defined]
    lora = PolicyTrainer(make_spec(base, LORA, DPO, reference="cached", adapter=str(adapter)))
    assert lora.policy.frozen is None  # type: ignore[attr-defined]
    assert not [name for name, _ in lora.module.named_parameters() if ".reference." in name]


def test_dropout_is_off_while_the_values_are_computed(base: Path, adapter: Path, tmp_path: Path) -> None:
    shutil.copytree(adapter, tmp_path / "adapter")
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"lora_dropout": 0.5}))
    dropout = LORA.model_copy(update={"dropout": 0.5})
    trainer = PolicyTrainer(make_spec(base, dropout, DPO, reference="cached", adapter=str(config.parent)))
    trainer.module.train()
    random = torch.get_rng_state()
    one, two = (with_reference(trainer, trees_for(DPO), tmp_path / name) for name in "ab")
    for a, b in zip(one, two, strict=True):
        for x, y in zip(a.branches, b.branches, strict=True):
            assert np.array_equal(x.reference_logps, y.reference_logps)
    assert torch.equal(torch.get_rng_state(), random), "a run that finds them in the file draws the same afterwards"
    assert trainer.evaluate(one)["loss/total"] == pytest.approx(math.log(2), abs=1e-6)


def test_trees_without_values_are_never_trained_against_the_policy_itself(base: Path, tmp_path: Path) -> None:
    trainer = PolicyTrainer(make_spec(base, LORA, DPO, reference="cached"))
    with pytest.raises(AssertionError, match="carry their reference"):
        trainer.step(trees_for(DPO), step=0, progress=0.0)
    some = with_reference(trainer, trees_for(DPO), tmp_path)
    with pytest.raises(AssertionError, match="others do not"):
        trainer.step([some[0], *trees_for(DPO)[1:]], step=0, progress=0.0)
    kto = (LossTerm(name="kto"),)
    matching = PolicyTrainer(make_spec(base, LORA, kto, reference="cached"))
    with pytest.raises(AssertionError, match="not those of another"):
        matching.step(with_reference(matching, trees_for(kto), tmp_path), step=0, progress=0.0)


def test_other_arithmetic_has_another_key_and_other_packing_has_not(base: Path) -> None:
    device = torch.device("cpu")

    def key(spec: TrainerSpec, device: torch.device = device) -> str:
        return make_cache(Path(), None, numerics.numerics(spec, device)).key([])

    spec = make_spec(base, LORA, DPO, reference="cached")
    keys = [
        key(spec),
        key(replace(spec, model=spec.model.model_copy(update={"dtype": "bfloat16"}))),
        key(replace(spec, model=spec.model.model_copy(update={"attention": "sdpa"}))),
        key(replace(spec, temperature=0.7)),
        key(replace(spec, adapter_config=FULL)),
        key(replace(spec, adapter_config=LORA.model_copy(update={"alpha": 16.0}))),
        key(spec, torch.device("cuda")),
    ]
    assert len(set(keys)) == len(keys)
    moved = replace(spec, model=spec.model.model_copy(update={"path": "elsewhere", "gradient_checkpointing": True}))
    dropout = LORA.model_copy(update={"dropout": 0.3})
    for same in (moved, replace(spec, max_tokens=7, seed=9, threads=3, adapter_config=dropout)):
        assert key(same) == keys[0]


@pytest.mark.parametrize("library", ["torch", "transformers", "peft"])
def test_another_version_of_a_library_has_another_key(
    base: Path, library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = make_spec(base, LORA, DPO)
    before = numerics.numerics(spec, torch.device("cpu"))
    real = numerics.version
    monkeypatch.setattr(numerics, "version", lambda name: "9.9" if name == library else real(name))
    after = numerics.numerics(spec, torch.device("cpu"))
    assert after != before and json.loads(json.dumps(after)) == after
    monkeypatch.setattr(numerics, "version", real)
    monkeypatch.setattr(numerics, "_code_version", lambda: "edited")
    assert numerics.numerics(spec, torch.device("cpu")) != before


def test_an_edit_of_any_file_that_packs_or_computes_has_another_key_in_subfolders_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = Path(align.__file__).parent
    for room in ("model", "train"):
        shutil.copytree(package / room, tmp_path / room, ignore=shutil.ignore_patterns("__pycache__"))
        (tmp_path / room / "deeper").mkdir()
        (tmp_path / room / "deeper" / "kernel.py").write_text("SCALE = 1.0\n")
    for name in ("data/microbatches", "data/packing", "data/prefixes", "protocols/trees", "types"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(package / f"{name}.py", tmp_path / f"{name}.py")
    monkeypatch.setattr(numerics, "__file__", str(tmp_path / "train" / "numerics.py"))
    files = sorted(tmp_path.rglob("*.py"))
    found = [numerics._code_version.__wrapped__()]
    for file in files:
        file.write_text(file.read_text() + "# edited\n")
        found.append(numerics._code_version.__wrapped__())
    assert len(files) > 60 and len(set(found)) == len(files) + 1
