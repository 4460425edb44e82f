"""Whoever is compared with a policy computes in its dtypes: with equal weights, values are equal to the last bit."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from align.check.memory.plan import Work, trainer
from align.check.memory.sizes import sizes_of
from align.model.load import load_model
from align.recipe.adapter import Adapter
from align.recipe.inputs import Model
from align.recipe.parts import LossTerm, Optim
from align.train.arithmetic import narrowed
from align.train.spec import TrainerSpec, reference_spec
from align.train.trainer import PolicyTrainer
from tests.tiny_vlms import write_tiny_vlm
from tests.unit.core.families import make_family
from tests.unit.core.trees import pair

FAMILIES = ("qwen3", "gemma3_text", "gpt_oss", "qwen3_moe", "deepseek_v3", "qwen3_next")
FULL = Adapter(kind="full")


def spec_of(folder: Path, adapter: Adapter, **options: Any) -> TrainerSpec:
    return TrainerSpec(
        model=Model(path=str(folder), dtype=options.pop("dtype", "bfloat16")),
        base=str(folder),
        adapter_config=adapter,
        losses=(LossTerm(name="dpo"),),
        optim=Optim(lr=1e-2, schedule="constant", warmup=0.0),
        total_updates=10,
        device="cpu",
        **options,
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in made:
            made[family] = tmp_path_factory.mktemp(family)
            make_family(family).bfloat16().save_pretrained(made[family])
        return made[family]

    return folder


def pairs(n: int = 4) -> list[Any]:
    rng = np.random.default_rng(0)
    return [pair(rng, i) for i in range(n)]


def differences(subject: PolicyTrainer, other: Any = None) -> torch.Tensor:
    """Of the policy's log-probabilities and its reference's, f32[N]."""
    [(batch, _)] = subject.packer.microbatches(pairs())
    own = subject._quiet(subject.module, batch).logps
    theirs = subject._reference_logps(batch) if other is None else other.batch_logps(batch)
    assert theirs is not None and own.abs().max() > 0
    return (own - theirs).abs()


@pytest.mark.parametrize("family", FAMILIES)
def test_dpo_over_a_whole_model_in_bfloat16_begins_at_a_ratio_of_one(folders: Any, family: str) -> None:
    subject = PolicyTrainer(spec_of(folders(family), FULL, reference="start"))
    assert differences(subject).max() == 0
    metrics = subject.step(pairs(), step=0, progress=0.0)
    assert metrics["loss/total"] == pytest.approx(math.log(2), abs=1e-7)
    assert metrics["rewards/margins"] == 0 and differences(subject).max() > 0


@pytest.mark.parametrize("kind", ["lora", "dora", "qlora"])
def test_and_so_does_an_adapter(folders: Any, kind: str) -> None:
    adapter = Adapter.model_validate({"kind": kind, "rank": 4, "alpha": 8})
    subject = PolicyTrainer(spec_of(folders("qwen3"), adapter, reference="start"))
    assert differences(subject).max() == 0
    assert subject.step(pairs(), step=0, progress=0.0)["loss/total"] == pytest.approx(math.log(2), abs=1e-7)


@pytest.mark.parametrize("adapter", [FULL, Adapter(rank=4, alpha=8)], ids=["full", "lora"])
def test_a_reference_of_its_own_computes_as_the_policy_does(folders: Any, adapter: Adapter) -> None:
    folder = folders("qwen3")
    policy = spec_of(folder, adapter, reference="path")
    other = PolicyTrainer(reference_spec(policy, folder, None, Adapter()))
    subject = PolicyTrainer(policy, reference=other.batch_logps)
    assert not any(p.requires_grad for p in other.module.parameters())
    assert differences(subject).max() == 0 and differences(subject, other).max() == 0
    assert subject.step(pairs(), step=0, progress=0.0)["loss/total"] == pytest.approx(math.log(2), abs=1e-7)


@pytest.mark.parametrize("tune", [{"vision": "full", "projector": "full"}, {"vision": "lora", "language": "full"}])
def test_parts_that_are_trained_whole_are_evaluated_as_they_are_trained(tmp_path: Path, tune: dict[str, str]) -> None:
    folder = write_tiny_vlm(tmp_path / "model", "qwen2_5_vl")
    adapter = Adapter.model_validate({"kind": "lora", "rank": 4, "alpha": 8, "tune": tune})
    subject = PolicyTrainer(spec_of(folder, adapter, reference="start"))
    other = PolicyTrainer(spec_of(folder, adapter, trainable=False))
    assert differences(subject).max() == 0 and differences(subject, other).max() == 0
    by_path = PolicyTrainer(reference_spec(subject.spec, folder, None, Adapter()))
    assert differences(subject, by_path).max() == 0


def test_a_reference_keeps_rounded_what_autocast_rounds_and_the_plan_counts_it(folders: Any) -> None:
    subject = PolicyTrainer(spec_of(folders("qwen3"), FULL, reference="start"))
    reference = subject.policy._reference.model
    held = sum(p.numel() * p.element_size() for p in reference.parameters())
    sizes = sizes_of(reference.config.to_dict())
    assert sizes is not None
    planned = trainer(sizes, FULL, Work("bfloat16", 128, second_copy=True)).parts["reference"]
    assert planned == pytest.approx(held, rel=0.02)
    assert trainer(sizes, FULL, Work("float32", 128, second_copy=True)).parts["reference"] == 4 * sizes.parameters
    tied = load_model(folders("gemma3_text"), dtype=torch.float32)
    assert tied.lm_head.weight is tied.get_input_embeddings().weight
    narrowed(tied, torch.bfloat16)
    assert tied.lm_head.weight.dtype == torch.float32
    linear = [m for m in tied.model.modules() if type(m) is nn.Linear]
    assert linear and all(m.weight.dtype == torch.bfloat16 for m in linear)
