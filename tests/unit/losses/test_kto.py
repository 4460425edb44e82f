"""KTO's reference point: over all mismatched pairs of the update, detached, never a prompt with its own completion."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from align.data.packing import collate, global_counts
from align.losses import configure, kto
from align.losses.base import LossInputs, Prepass
from align.protocols.trees import Tree
from align.train.trainer import PolicyTrainer
from align.types import HeadOutputs
from tests.unit.core.trees import unpaired
from tests.unit.losses.test_oracles import run, sequences_of
from tests.unit.train.test_trainer import base, make_spec  # noqa: F401


def rows(n: int = 6, seed: int = 0) -> list[Tree]:
    rng = np.random.default_rng(seed)
    return [unpaired(rng, i) for i in range(n)]


@pytest.mark.parametrize("variant", ["kto", "apo_zero_unpaired"])
def test_kto_equals_the_paper(variant: str) -> None:
    trees = rows()
    batch = collate(trees)
    n = batch.labels.numel()
    logps, reference = (-3 * torch.rand(n, dtype=torch.float64) for _ in range(2))
    z = 0.3
    loss = configure("kto", {"beta": 0.4, "desirable_weight": 1.5, "undesirable_weight": 0.7, "variant": variant})
    inputs = LossInputs(
        HeadOutputs(logps), batch, global_counts(trees), reference, batch_stats={"z": torch.tensor(z).double()}
    )
    owner, expected = batch.sequence_ids.numpy(), []
    for s in range(6):
        rho = float((logps - reference).numpy()[owner == s].sum())
        if variant == "kto":
            margin = rho - z if s % 2 else z - rho
        else:
            margin = rho if s % 2 else -rho
        expected.append((1.5 if s % 2 else 0.7) * (1 - 1 / (1 + math.exp(-0.4 * margin))))
    assert loss(inputs).loss.item() == pytest.approx(np.mean(expected), abs=1e-9)


@pytest.mark.parametrize(
    ("variant", "z", "expected"),
    [
        ("kto", 0.5, 0.403412132),  # s(-1) = 0.268941421 on both rows: (2 + 1) / 2 of it
        ("kto", 0.0, 0.371195858),  # (2 s(-1.5) + s(-0.5)) / 2
        ("apo_zero_unpaired", 0.5, 0.371195858),  # has no reference point
    ],
)
def test_kto_equals_a_value_computed_by_hand(variant: str, z: float, expected: float) -> None:
    """A desirable completion with rho 1.5 and an undesirable one with rho -0.5; beta 1, weights 2 and 1."""
    made = [sequences_of(2), sequences_of(1)]
    trees = [
        replace(tree, id=i, branches=(replace(tree.branches[0], columns={"desirable": float(i == 0)}),))
        for i, tree in enumerate(made)
    ]
    logps = torch.tensor([-1.0, -0.5, -2.0], dtype=torch.float64)
    reference = torch.tensor([-2.0, -1.0, -1.5], dtype=torch.float64)
    options = {"beta": 1.0, "desirable_weight": 2.0, "variant": variant}
    out, _ = run("kto", options, trees, logps, reference, stats={"z": torch.tensor(z, dtype=torch.float64)})
    assert out.loss.item() == pytest.approx(expected, abs=1e-8)
    told = {name: float(metric.sum) / float(metric.count) for name, metric in out.metrics.items()}
    assert told["rewards/chosen"] == 1.5 and told["rewards/rejected"] == -0.5 and told["rewards/accuracies"] == 1.0
    assert told["logps/chosen"] == -1.5 and told["logps/rejected"] == -2.0


def test_no_prompt_is_matched_with_a_completion_of_its_own_even_when_prompts_repeat() -> None:
    trees = rows(6)
    trees = [replace(tree, trunk=trees[i // 2].trunk) for i, tree in enumerate(trees)]
    owners = {tree.branches[0].token_ids.tobytes(): tree.trunk.token_ids.tobytes() for tree in trees}
    for tree in kto.auxiliary(list(reversed(trees)), kto.Config()):
        assert owners[tree.branches[0].token_ids.tobytes()] != tree.trunk.token_ids.tobytes()


@pytest.mark.parametrize("many", [1, 3])
def test_a_batch_of_one_prompt_trains_with_a_reference_point_of_zero(base: Path, many: int) -> None:  # noqa: F811
    trees = rows(many)
    same = [replace(tree, trunk=trees[0].trunk) for tree in trees]
    assert kto.auxiliary(same, kto.Config()) == [] and kto.lacking(same, kto.Config())
    assert kto.lacking(rows(3), kto.Config()) is None
    assert kto.lacking(same, kto.Config(variant="apo_zero_unpaired")) is None  # it has none to miss
    trainer = PolicyTrainer(make_spec(base, "kto", reference="start"))
    other = PolicyTrainer(make_spec(base, "kto", reference="start", loss_options={"variant": "apo_zero_unpaired"}))
    for step in range(2):
        got, expected = (t.step(same, step=step, progress=step / 10) for t in (trainer, other))
        assert got["policy/without_reference_point"] == 1.0 and got["policy/reference_point"] == 0.0
        assert got["loss/total"] == pytest.approx(expected["loss/total"], abs=1e-7) and got["optim/grad_norm"] > 0
    assert trainer.evaluate(same)["policy/without_reference_point"] == 1.0
    assert trainer.step(rows(), step=2, progress=0.2)["policy/without_reference_point"] == 0.0


def test_the_reference_point_is_never_negative_and_has_no_gradient() -> None:
    def found(*ratios: float) -> Prepass:
        values = torch.tensor(ratios, requires_grad=True)
        return Prepass(torch.arange(len(ratios)), values, values, torch.ones(len(ratios)))

    assert kto.batch_stats(found(-2.0, 1.0), kto.Config())["z"] == 0.0
    z = kto.batch_stats(found(2.0, 1.0), kto.Config())["z"]
    assert z == 1.5 and not z.requires_grad


def test_microbatches_of_one_see_the_reference_point_of_the_whole_update(
    base: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        kto, "batch_stats", lambda found, config: {"z": found.ratios.mean()}
    )  # its sign is not what is tested
    whole, split = (PolicyTrainer(make_spec(base, "kto", reference="start", max_tokens=n)) for n in (10_000, 1))
    for step in range(3):
        a, b = (t.step(rows(), step=step, progress=step / 10) for t in (whole, split))
        assert b["train/microbatches"] == 6 and a["train/microbatches"] == 1
        for name in ("loss/total", "policy/reference_point", "rewards/accuracies", "optim/grad_norm"):
            assert a[name] == pytest.approx(b[name], rel=2e-4, abs=1e-6), name
    assert abs(a["policy/reference_point"]) > 1e-3
