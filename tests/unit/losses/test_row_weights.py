"""A row's `weight`: every loss multiplies the row's terms by it and divides by counts, as without weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from align.data.packing import collate, global_counts, mark_nll
from align.errors import DataError
from align.losses import configure, names
from align.losses.base import LossInputs
from align.protocols.trees import Tree
from align.recipe.parts import LossTerm
from align.stages.row_weights import refuse_weights
from align.train.metrics import MetricSums
from align.train.trainer import PolicyTrainer
from tests.unit.core.trees import conversation, pair, unpaired
from tests.unit.losses.test_oracles import by_sequence, random_logps
from tests.unit.losses.test_oracles import run as run_once
from tests.unit.losses.test_splits import ALL, MAKE, Forward, behaviour, run
from tests.unit.train.test_trainer import base, make_spec, weights  # noqa: F401

WEIGHTS = (2.0, 0.5, 1.0, 3.25, 0.125, 1.0, 7.0)
TAKES = [case for case in ALL if configure(*case.values).needs.weights]  # type: ignore[arg-type]


def weigh(tree: Tree, weight: float) -> Tree:
    """The tree as the data give it: the weight stands on every sequence, and on a pair itself."""
    branches = tuple(replace(b, columns={**b.columns, "weight": weight}) for b in tree.branches)
    trunk = tree.trunk if branches else replace(tree.trunk, columns={**tree.trunk.columns, "weight": weight})
    columns = {**tree.columns, "weight": weight} if len(branches) == 2 else tree.columns
    return replace(tree, trunk=trunk, branches=branches, columns=columns)


def made(name: str, options: dict[str, Any]) -> list[Tree]:
    rng = np.random.default_rng(11)
    trees = [MAKE[configure(name, options).needs.record](rng, 3 * i + 1) for i in range(7)]
    margin = configure(name, options).needs.margin
    return [replace(t, columns={**t.columns, "margin": 0.3 * (t.id % 3) - 0.2}) if margin else t for t in trees]


@pytest.mark.parametrize(("name", "options"), TAKES)
def test_the_loss_is_each_rows_own_share_times_its_weight(name: str, options: dict[str, Any]) -> None:
    """Shares are additive, so a row's is what it gives alone under the counts of the whole; without a weight anywhere
    they add up to the loss itself. KTO's reference point is that of the unweighted rows."""
    loss = configure(name, options)
    trees = [mark_nll(tree, loss.needs.nll) for tree in made(name, options)]
    counts, forward = global_counts(trees), Forward()
    stats = {"z": torch.tensor(0.2, dtype=torch.float64)} if loss.needs.scope == "batch" else {}

    def value(some: list[Tree]) -> float:
        batch = behaviour(collate(some))
        reference = forward.reference(batch) if loss.needs.reference else None
        inputs = LossInputs(forward(batch), batch, counts, reference, None, stats)
        return loss(inputs).loss.item()

    shares = [value([tree]) for tree in trees]
    assert value(trees) == pytest.approx(sum(shares), abs=1e-9)
    weighted = [weigh(tree, weight) for tree, weight in zip(trees, WEIGHTS, strict=True)]
    assert value(weighted) == pytest.approx(float(np.dot(WEIGHTS, shares)), abs=1e-9)
    assert value([weigh(tree, 1.0) for tree in trees]) == value(trees), "a weight of 1 changes no bit"


@pytest.mark.parametrize("max_tokens", [1, 40])
@pytest.mark.parametrize(("name", "options"), TAKES)
def test_any_split_of_weighted_rows_gives_the_same_update(name: str, options: dict[str, Any], max_tokens: int) -> None:
    trees = [weigh(tree, weight) for tree, weight in zip(made(name, options), WEIGHTS, strict=True)]
    loss, gradient, metrics, _ = run(name, options, trees, 10_000)
    other, split, told, many = run(name, options, list(reversed(trees)), max_tokens)
    assert many > 1 and other == pytest.approx(loss, abs=1e-9)
    assert max(abs(gradient[key] - split[key]) for key in gradient) < 1e-9
    assert told == pytest.approx(metrics, rel=1e-6, abs=1e-7)


def test_sft_dpo_and_kto_equal_their_papers_times_the_weights() -> None:
    """By formula, sequence by sequence, in numpy."""
    rng = np.random.default_rng(3)
    told = np.array(WEIGHTS[:4])

    plain = [conversation(rng, i) for i in range(4)]
    logps = random_logps(plain, 1)
    out, batch = run_once("sft", {}, [weigh(t, w) for t, w in zip(plain, told, strict=True)], logps)
    sums = np.array([x.sum() for x in by_sequence(batch, logps)])
    assert out.loss.item() == pytest.approx(-(told * sums).sum() / batch.labels.numel(), abs=1e-9)

    pairs = [pair(rng, i) for i in range(4)]
    logps, reference = random_logps(pairs, 2), random_logps(pairs, 3, grad=False)
    out, batch = run_once(
        "dpo", {"beta": 0.2}, [weigh(t, w) for t, w in zip(pairs, told, strict=True)], logps, reference
    )
    rho = np.array([x.sum() for x in by_sequence(batch, logps - reference)])
    terms = np.log1p(np.exp(-0.2 * (rho[0::2] - rho[1::2])))
    assert out.loss.item() == pytest.approx((told * terms).mean(), abs=1e-9)

    rows = [unpaired(rng, i) for i in range(4)]
    logps, reference = random_logps(rows, 4), random_logps(rows, 5, grad=False)
    weighted = [weigh(t, w) for t, w in zip(rows, told, strict=True)]
    out, batch = run_once("kto", {"beta": 0.3}, weighted, logps, reference, {"z": torch.tensor(0.4).double()})
    rho = np.array([x.sum() for x in by_sequence(batch, logps - reference)])
    sign = np.array([-1, 1, -1, 1])
    expected = told * (1 - 1 / (1 + np.exp(-0.3 * sign * (rho - 0.4))))
    assert out.loss.item() == pytest.approx(expected.mean(), abs=1e-7)


@pytest.mark.parametrize("loss", ["sft", "dpo", "kto"])
def test_an_update_on_weighted_rows_is_the_update_on_rows_written_as_often(base: Path, loss: str) -> None:  # noqa: F811
    """Through the model, in microbatches: a row of weight 2 has the gradient of that row twice, but for denominators,
    which count rows. KTO's reference point is given, as its estimate has no weights."""
    rng = np.random.default_rng(8)
    make = {"sft": conversation, "dpo": pair, "kto": unpaired}[loss]
    trees = [make(rng, i) for i in range(4)]
    heavier = [weigh(tree, 2.0 if tree.id == 0 else 1.0) for tree in trees]
    oftener = [replace(tree, id=i) for i, tree in enumerate([trees[0], *trees])]
    spec = make_spec(base, loss, reference=None if loss == "sft" else "start", max_tokens=60)
    gradients = []
    for batch in (heavier, oftener):
        trainer, counts = PolicyTrainer(spec), global_counts(batch)
        stats = [{"z": torch.tensor(0.1)}] if loss == "kto" else [{}]
        for packed, _ in trainer.packer.microbatches(batch):
            trainer._loss(packed, counts, MetricSums(), stats).backward()
        units = {"sft": counts.nll_tokens, "dpo": counts.pairs, "kto": counts.sequences}[loss]
        gradients.append(torch.cat([units * p.grad.flatten() for p in trainer.parameters if p.grad is not None]))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=2e-5, atol=1e-6)
    assert gradients[0].abs().max() > 1e-3


def test_rows_of_weight_one_train_bit_for_bit_as_rows_without(base: Path) -> None:  # noqa: F811
    found = []
    for given in (False, True):
        rng = np.random.default_rng(2)
        trees = [conversation(rng, i) for i in range(5)]
        trainer = PolicyTrainer(make_spec(base, "sft"))
        for step in range(2):
            trainer.step([weigh(t, 1.0) for t in trees] if given else trees, step=step, progress=step / 10)
        found.append(weights(trainer))
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


@pytest.mark.parametrize("variant", ["aot", "aot_unpaired"])
def test_a_loss_that_sorts_refuses_weights_and_says_where(variant: str) -> None:
    rng = np.random.default_rng(0)
    trees = [weigh(pair(rng, i), 1.0 if i < 2 else 2.5) for i in range(4)]
    terms = (LossTerm(name="dpo", variant=variant),)
    with pytest.raises(DataError, match=rf"pairs\.jsonl:3.*weight 2\.5.*variant {variant}") as error:
        refuse_weights(trees, terms)
    assert "weights=True" in str(error.value)
    refuse_weights(trees[:2], terms)
    refuse_weights(trees, (LossTerm(name="dpo"), LossTerm(name="sft")))


def test_a_loss_of_the_users_that_says_nothing_of_weights_refuses_them(tmp_path: Path) -> None:
    own = tmp_path / "own.py"
    own.write_text(
        "from align.losses.base import LossConfig, LossOutput, Needs\n"
        "class Config(LossConfig):\n    pass\n"
        "def needs(config):\n    return Needs(record='conversation')\n"
        "def loss(inputs, config):\n    return LossOutput(-inputs.outputs.logps.sum(), {})\n"
    )
    rng = np.random.default_rng(0)
    with pytest.raises(DataError, match=r"rows\.jsonl:1.*takes no weights"):
        refuse_weights([weigh(conversation(rng, 0), 3.0)], (LossTerm(name=str(own)),))


def of_groups(name: str) -> bool:
    """There a row's weight is in the advantages."""
    return configure(name, {}).needs.record == "group"


def test_every_loss_of_ours_says_whether_it_takes_weights() -> None:
    deaf = {name for name in names() if not of_groups(name) and not configure(name, {}).needs.weights}
    assert not deaf, f"rows with weights would be refused under {deaf}"
