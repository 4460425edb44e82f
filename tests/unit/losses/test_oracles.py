"""sft, orpo, simpo and cpo against float64 oracles written sequence by sequence from their papers, values computed by
hand, and finite differences (kto's too). dpo, kto and grpo have files of their own."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from align.data.packing import collate, global_counts, mark_nll
from align.errors import PluginError, RecipeError
from align.losses import configure, names
from align.losses.base import LossInputs, LossOutput
from align.protocols.trees import Segment, Tree
from align.types import HeadOutputs, TokenBatch
from tests.unit.core.trees import conversation, pair, unpaired


def run(
    name: str,
    options: dict[str, Any],
    trees: list[Tree],
    logps: torch.Tensor,
    reference: torch.Tensor | None = None,
    stats: dict[str, torch.Tensor] | None = None,
) -> tuple[LossOutput, TokenBatch]:
    loss = configure(name, options)
    trees = [mark_nll(tree, loss.needs.nll) for tree in trees]
    batch = collate(trees)
    inputs = LossInputs(
        HeadOutputs(logps), batch, global_counts(trees), reference_logps=reference, batch_stats=stats or {}
    )
    return loss(inputs), batch


def random_logps(trees: list[Tree], seed: int, grad: bool = True) -> torch.Tensor:
    n = collate(trees).labels.numel()
    g = torch.Generator().manual_seed(seed)
    return (-4 * torch.rand(n, generator=g, dtype=torch.float64) - 0.05).requires_grad_(grad)


def by_sequence(batch: TokenBatch, values: torch.Tensor) -> list[np.ndarray]:
    owner = batch.sequence_ids.numpy()
    return [values.detach().double().numpy()[owner == s] for s in range(batch.sequences)]


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize("variant", ["nll", "dft"])
def test_sft_is_the_mean_over_all_scored_tokens(variant: str) -> None:
    rng = np.random.default_rng(0)
    trees = [conversation(rng, i) for i in range(4)]
    logps = random_logps(trees, 0)
    out, _ = run("sft", {"variant": variant}, trees, logps)
    x = logps.detach().numpy()
    expected = np.mean(-x) if variant == "nll" else np.mean(-np.exp(x) * x)
    assert out.loss.item() == pytest.approx(expected, abs=1e-9)


def reference_free_oracle(name: str, options: dict[str, Any], chosen: np.ndarray, rejected: np.ndarray) -> float:
    """One pair's preference term, from the paper's formula."""
    beta, eps = options.get("beta", 2.0 if name == "simpo" else 0.1), options.get("label_smoothing", 0.0)
    if name == "orpo":  # 2403.07691 eqs. 4, 6, 7: odds(y) = p / (1 - p) with p the geometric mean probability
        odds = [math.exp(x.mean()) / (1 - math.exp(x.mean())) for x in (chosen, rejected)]
        return -float(options.get("lambda", 0.1)) * math.log(sigmoid(math.log(odds[0] / odds[1])))
    if name == "simpo":  # 2405.14734 eq. 6; AlphaPO's reward is from 2501.03884
        alpha = options.get("alpha", 0.0)
        r = [x.mean() if not alpha else (1 - math.exp(x.mean()) ** -alpha) / alpha for x in (chosen, rejected)]
        z = beta * (r[0] - r[1]) - options.get("gamma", 0.5)
    else:
        z = beta * (chosen.sum() - rejected.sum())  # 2401.08417 eq. 3
    if options.get("variant") == "hinge":
        return max(0.0, 1 - z)
    if options.get("variant") == "ipo":
        return float((chosen.mean() - rejected.mean() - 1 / (2 * beta)) ** 2)
    return -(1 - eps) * math.log(sigmoid(z)) - eps * math.log(sigmoid(-z))


REFERENCE_FREE = [
    ("orpo", {}),
    ("orpo", {"lambda": 0.5, "nll": "response"}),
    ("simpo", {}),
    ("simpo", {"nll_weight": 0.7, "label_smoothing": 0.1}),
    ("simpo", {"alpha": 0.25, "gamma": 1.0}),
    ("simpo", {"alpha": -0.5, "gamma": 0.0, "label_smoothing": 0.3, "nll_weight": 0.2}),
    ("cpo", {}),
    ("cpo", {"nll_weight": 0.0, "label_smoothing": 0.2}),
    ("cpo", {"variant": "hinge"}),
    ("cpo", {"variant": "hinge", "nll_weight": 0.0, "beta": 0.02}),
    ("cpo", {"variant": "ipo", "beta": 0.3}),
]


@pytest.mark.parametrize(("name", "options"), REFERENCE_FREE)
def test_reference_free_pair_losses_equal_the_paper(name: str, options: dict[str, Any]) -> None:
    rng = np.random.default_rng(8)
    trees = [pair(rng, i) for i in range(4)]
    loss = configure(name, options)
    logps = random_logps([mark_nll(tree, loss.needs.nll) for tree in trees], 9)
    out, batch = run(name, options, trees, logps)
    terms, likelihood = [], []
    for p, (tree, rows) in enumerate(zip(trees, by_tree(batch, logps), strict=True)):
        prompt, chosen, rejected = rows
        assert len(prompt) == (len(tree.trunk) - 1 if loss.needs.nll == "prompt_and_chosen" else 0), p
        assert [len(chosen), len(rejected)] == [len(branch) for branch in tree.branches]
        terms.append(reference_free_oracle(name, options, chosen, rejected))
        likelihood.append(np.concatenate([prompt, chosen]))
    weight = {"orpo": 1.0, "simpo": options.get("nll_weight", 0.0), "cpo": options.get("nll_weight", 1.0)}[name]
    expected = np.mean(terms) - weight * np.concatenate(likelihood).mean()
    assert out.loss.item() == pytest.approx(expected, abs=1e-9)


def by_tree(batch: TokenBatch, values: torch.Tensor) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Per pair: the values of its prompt's scored tokens (before its chosen side's), its chosen and its rejected."""
    found, mask = values.detach().numpy(), batch.loss_mask.numpy()
    owner = batch.sequence_ids.numpy()
    return [
        (found[~mask & (owner == c)], found[mask & (owner == c)], found[mask & (owner == r)])
        for c, r in batch.pairs.tolist()
    ]


def sequences_of(*lengths: int, trunk: int = 1) -> Tree:
    """A tree whose branches have these lengths, all scored."""
    branches = tuple(Segment(np.arange(n), np.ones(n, bool)) for n in lengths)
    return Tree(0, Segment(np.arange(trunk), np.zeros(trunk, bool)), branches)


HALF, QUARTER = math.log(0.5), math.log(0.25)
BY_HAND = [
    ("simpo", {"beta": 2.0, "gamma": 0.5}, 0.201413278),  # z = 2 (-1 + 2) - 0.5 = 1.5; ln(1 + e^-1.5)
    ("simpo", {"beta": 2.0, "gamma": 0.5, "nll_weight": 0.5}, 0.701413278),  # the chosen side's mean NLL is 1
    ("simpo", {"beta": 2.0, "gamma": 0.5, "label_smoothing": 0.2}, 0.501413278),  # + 0.2 * 1.5
    ("simpo", {"beta": 0.5, "gamma": 0.25, "alpha": 1.0}, 0.117124157),  # r = 1 - e and 1 - e^2; z = 2.085387
    ("cpo", {"beta": 0.25}, 1.313261688),  # z = 0.25 (-2 + 6) = 1; ln(1 + e^-1) + 1
    ("cpo", {"beta": 0.25, "label_smoothing": 0.1, "nll_weight": 0.0}, 0.413261688),  # ln(1 + e^-1) + 0.1
    ("cpo", {"beta": 0.1, "variant": "hinge", "nll_weight": 0.0}, 0.6),  # 1 - 0.1 * 4
    ("cpo", {"beta": 0.25, "variant": "ipo", "nll_weight": 2.0}, 3.0),  # (1 - 2)^2 + 2 * 1
]


@pytest.mark.parametrize(("name", "options", "expected"), BY_HAND)
def test_pair_losses_equal_values_computed_by_hand(name: str, options: dict[str, Any], expected: float) -> None:
    logps = torch.tensor([-0.5, -1.5, -2.0, -2.0, -2.0], dtype=torch.float64)
    out, _ = run(name, options, [sequences_of(2, 3)], logps)
    assert out.loss.item() == pytest.approx(expected, abs=1e-8)


def test_orpo_equals_a_value_computed_by_hand() -> None:
    """Probabilities 1/2 and 1/4 have odds 1 and 1/3; s(ln 3) = 3/4. The prompt's one scored token has 1/4."""
    logps = torch.tensor([HALF, HALF, QUARTER], dtype=torch.float64)
    out, _ = run("orpo", {"lambda": 1.0, "nll": "response"}, [sequences_of(2, 1, trunk=2)], logps)
    assert out.loss.item() == pytest.approx(-HALF - math.log(0.75), abs=1e-12)
    logps = torch.tensor([QUARTER, HALF, HALF, QUARTER], dtype=torch.float64)
    out, _ = run("orpo", {"lambda": 1.0}, [sequences_of(2, 1, trunk=2)], logps)
    assert out.loss.item() == pytest.approx(-(QUARTER + 2 * HALF) / 3 - math.log(0.75), abs=1e-12)


@pytest.mark.parametrize(("variant", "expected"), [("nll", 2.0), ("dft", 0.258620323)])
def test_sft_equals_a_value_computed_by_hand(variant: str, expected: float) -> None:
    """dft: (e^-1 * 1 + e^-3 * 3) / 2."""
    tree = Tree(0, Segment(np.arange(4), np.array([False, True, False, True])))
    out, _ = run("sft", {"variant": variant}, [tree], torch.tensor([-1.0, -3.0], dtype=torch.float64))
    assert out.loss.item() == pytest.approx(expected, abs=1e-8)


@pytest.mark.parametrize("mean_logp", [0.0, -1e-12, -200.0, -1000.0])
@pytest.mark.parametrize(("name", "options"), [("orpo", {}), ("simpo", {"alpha": 0.5}), ("simpo", {})])
def test_extreme_probabilities_stay_finite(name: str, options: dict[str, Any], mean_logp: float) -> None:
    trees = [pair(np.random.default_rng(9), 0)]
    loss = configure(name, options)
    n = collate([mark_nll(trees[0], loss.needs.nll)]).labels.numel()
    logps = torch.full((n,), mean_logp, requires_grad=True)
    out, _ = run(name, options, trees, logps)
    out.loss.backward()
    assert math.isfinite(out.loss.item()) and logps.grad is not None and bool(logps.grad.isfinite().all())


def test_pure_simpo_has_no_nll_gradient() -> None:
    """With both sides' margin saturated nothing is left but an NLL term; there must be none."""
    trees = [pair(np.random.default_rng(10), 0)]
    batch = collate(trees)
    logps = torch.where(batch.sequence_ids == 0, -0.01, -300.0).double().requires_grad_()
    out, _ = run("simpo", {"beta": 10.0, "gamma": 0.0}, trees, logps)
    (gradient,) = torch.autograd.grad(out.loss, logps)
    assert gradient.abs().max() == 0.0


def test_sft_beside_a_preference_loss_covers_the_chosen_side_only() -> None:
    trees = [pair(np.random.default_rng(11), i) for i in range(2)]
    logps = random_logps(trees, 12)
    out, batch = run("sft", {}, trees, logps)
    chosen = np.concatenate([by_sequence(batch, logps)[0], by_sequence(batch, logps)[2]])
    assert out.loss.item() == pytest.approx(-chosen.mean(), abs=1e-12)


DIFFERENTIABLE = [
    ("sft", {}, conversation),
    ("kto", {"beta": 0.4, "desirable_weight": 1.5}, unpaired),
    ("kto", {"beta": 0.4, "variant": "apo_zero_unpaired"}, unpaired),
    *((name, options, pair) for name, options in REFERENCE_FREE),
]


@pytest.mark.parametrize(("name", "options", "make"), DIFFERENTIABLE)
def test_gradients_equal_finite_differences(name: str, options: dict[str, Any], make: Any) -> None:
    """kto's reference point is frozen, as it is in a step."""
    rng = np.random.default_rng(4)
    trees = [make(rng, i) for i in range(3)]
    marked = [mark_nll(tree, configure(name, options).needs.nll) for tree in trees]
    reference = random_logps(marked, 5, grad=False)
    logps = random_logps(marked, 6)
    stats = {"z": torch.tensor(0.3, dtype=torch.float64)}
    assert torch.autograd.gradcheck(
        lambda x: run(name, options, trees, x, reference, stats=stats)[0].loss, (logps,), eps=1e-6, atol=1e-6, rtol=1e-5
    )


def test_dft_weighs_each_tokens_gradient_with_its_own_probability_and_not_through_it() -> None:
    """2508.05629: the weight is detached, so finite differences of the value would be another gradient."""
    trees = [conversation(np.random.default_rng(4), i) for i in range(2)]
    logps = random_logps(trees, 6)
    (gradient,) = torch.autograd.grad(run("sft", {"variant": "dft"}, trees, logps)[0].loss, logps)
    torch.testing.assert_close(gradient, -logps.detach().exp() / logps.numel(), atol=1e-15, rtol=1e-12)


UNSCORED = [("sft", {}, conversation), ("sft", {"variant": "dft"}, conversation), *DIFFERENTIABLE[1:]]


@pytest.mark.parametrize(("name", "options", "make"), UNSCORED)
def test_trees_without_a_scored_token_give_a_finite_loss_and_no_gradient(
    name: str, options: dict[str, Any], make: Any
) -> None:
    loss = configure(name, options)
    rng = np.random.default_rng(5)
    silent = [unscored(make(rng, i)) for i in range(2)]
    logps = random_logps([mark_nll(tree, loss.needs.nll) for tree in silent], 7)
    stats = {"z": torch.tensor(0.3, dtype=torch.float64)}
    out, batch = run(name, options, silent, logps, logps.detach(), stats=stats)
    (gradient,) = torch.autograd.grad(out.loss, logps)
    assert math.isfinite(out.loss.item())
    prompt = batch.nll_mask & ~batch.loss_mask  # ORPO's likelihood of the prompt is all that is left
    assert not gradient[~prompt].any() and bool(gradient[prompt].isfinite().all())
    if make is not pair:
        assert out.loss.item() == 0.0


def unscored(tree: Tree) -> Tree:
    def silent(segment: Segment) -> Segment:
        return replace(segment, loss_mask=np.zeros(len(segment), bool))

    return replace(tree, trunk=silent(tree.trunk), branches=tuple(silent(branch) for branch in tree.branches))


def test_an_unscored_row_leaves_ktos_mean_as_it_is() -> None:
    rng = np.random.default_rng(5)
    trees = [unpaired(rng, i) for i in range(3)]
    logps, stats = random_logps(trees, 7), {"z": torch.tensor(0.3, dtype=torch.float64)}
    alone = run("kto", {}, trees, logps, 0.9 * logps.detach(), stats=stats)[0]
    more = run("kto", {}, [*trees, unscored(unpaired(rng, 3))], logps, 0.9 * logps.detach(), stats=stats)[0]
    assert alone.loss.item() == more.loss.item()
    for name in ("rewards/accuracies", "rewards/chosen", "logps/rejected"):
        assert float(alone.metrics[name].count) == float(more.metrics[name].count)


def test_an_unknown_loss_or_option_lists_the_choices() -> None:
    with pytest.raises(PluginError, match=", ".join(names())):
        configure("dop", {})
    with pytest.raises(RecipeError, match="beta, variant, label_smoothing, nll_weight"):
        configure("cpo", {"bta": 0.1})
