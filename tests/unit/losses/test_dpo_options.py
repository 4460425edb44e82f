"""DPO at its edges: nothing scored, one pair, extreme ratios; which options go together; names of metrics."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from align.data.packing import collate
from align.errors import RecipeError
from align.losses import configure
from align.losses.dpo import Config
from align.protocols.trees import Segment, Tree
from align.recipe.parts import LossTerm
from align.recipe.peers import translate
from align.train.trainer import PolicyTrainer
from tests.unit.core.trees import pair
from tests.unit.losses.test_dpo import CASES, DIVERGENCES, RANKS, SIDES, evaluate, named, some_pairs, tensors
from tests.unit.losses.test_oracles import by_sequence, sequences_of, unscored
from tests.unit.train.test_trainer import base, make_spec  # noqa: F401


@pytest.mark.parametrize("options", CASES, ids=named)
def test_pairs_without_a_scored_token_give_a_finite_loss_and_no_gradient(options: dict[str, Any]) -> None:
    trees = [unscored(tree) for tree in some_pairs(2)]
    empty = torch.zeros(0, dtype=torch.float64)
    logps = empty.clone().requires_grad_()
    loss, (result,) = evaluate(options, trees, logps, empty, empty)
    assert math.isfinite(loss.item())
    assert all(math.isfinite(float(metric.sum)) for metric in result.metrics.values())
    beside = [*some_pairs(3, seed=1), unscored(pair(np.random.default_rng(9), 50))]
    logps, reference, log_sum_sq = tensors(beside)
    loss, _ = evaluate(options, beside, logps, reference, log_sum_sq)
    (gradient,) = torch.autograd.grad(loss, logps)
    assert math.isfinite(loss.item()) and bool(gradient.isfinite().all()) and gradient.abs().max() > 0


@pytest.mark.parametrize("variant", RANKS)
def test_a_single_pair_meets_itself(variant: str) -> None:
    trees = some_pairs(1)
    logps, reference, _ = tensors(trees)
    values = [evaluate({"variant": name}, trees, logps, reference)[0] for name in (variant, "sigmoid")]
    gradients = [torch.autograd.grad(value, logps)[0] for value in values]
    assert values[0].item() == pytest.approx(values[1].item(), rel=1e-12)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("ratios", [(-1e3, 1e3), (1e3, -1e3), (-1e3, -1e3), (1e3, 1e3), (-35.0, 0.0), (0.0, -90.0)])
@pytest.mark.parametrize("options", CASES, ids=named)
def test_extreme_ratios_stay_finite_in_float32(options: dict[str, Any], ratios: tuple[float, float]) -> None:
    logps = torch.tensor([-1.0, -1.0], requires_grad=True)
    reference = torch.tensor([-1.0 - ratios[0], -1.0 - ratios[1]])
    loss, (result,) = evaluate(options, [sequences_of(1, 1)], logps, reference, torch.tensor([-0.5, -0.5]))
    (gradient,) = torch.autograd.grad(loss, logps)
    assert math.isfinite(loss.item()) and bool(gradient.isfinite().all())
    if options.get("divergence") == "forward_kl":
        assert float(result.metrics["rewards/clamped"].sum) == float(min(ratios) < -30)
    elif "divergence" not in options:
        assert "rewards/clamped" not in result.metrics


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=named)
def test_every_divergence_starts_where_dpo_starts_with_its_gradient(divergence: dict[str, Any]) -> None:
    """f'(e^rho) has value 0 at rho = 0; its slope there is f''(1): 1, but 1/2 for Jensen-Shannon."""
    trees = some_pairs(3)
    logps, _, _ = tensors(trees)
    values = [evaluate(options, trees, logps, logps.detach())[0] for options in (divergence, {})]
    gradient, plain = (torch.autograd.grad(value, logps)[0] for value in values)
    assert values[0].item() == pytest.approx(math.log(2), abs=1e-12)
    torch.testing.assert_close(gradient, plain * (0.5 if divergence["divergence"] == "js" else 1.0))


def test_ld_alpha_of_one_is_plain_dpo_and_of_zero_drops_what_is_beyond_the_shorter_side() -> None:
    tree = sequences_of(2, 5)
    logps, reference, _ = tensors([tree])
    plain, same, cut = (evaluate(o, [tree], logps, reference)[0] for o in ({}, {"ld_alpha": 1.0}, {"ld_alpha": 0.0}))
    assert plain.item() == same.item() != cut.item()
    (gradient,) = torch.autograd.grad(cut, logps)
    assert not gradient[4:].any() and bool(gradient[:4].abs().min() > 0)


def test_ld_alpha_counts_scored_tokens_alone() -> None:
    """A token of the shorter side that is not scored makes it shorter still."""
    masks = np.array([True, False, True]), np.array([False, True, True, True])
    branches = tuple(Segment(np.arange(len(mask)), mask) for mask in masks)
    tree = Tree(0, Segment(np.arange(2), np.zeros(2, bool)), branches)
    logps, reference, _ = tensors([tree])
    assert logps.numel() == 5
    (gradient,) = torch.autograd.grad(evaluate({"ld_alpha": 0.0}, [tree], logps, reference)[0], logps)
    assert gradient[:4].abs().min() > 0 and gradient[4] == 0


# ------------------------------------------------------------------------------------------------- options


REFUSED: list[tuple[dict[str, Any], str]] = [
    *(({"variant": v, "label_smoothing": 0.1}, "no label smoothing; use sigmoid, robust") for v in ("hinge", *SIDES)),
    ({"variant": "sigmoid_norm", "label_smoothing": 0.1}, "no label smoothing"),
    ({"variant": "discopop", "label_smoothing": 0.1}, "no label smoothing"),
    ({"variant": "exo_pair", "label_smoothing": 0.0}, "is infinite.*leave it out for 1e-3"),
    *(({"variant": v, "divergence": "js"}, "no `divergence: js`.*discopop, or drop") for v in (*SIDES, *RANKS)),
    ({"divergence_alpha": 0.3}, "goes with `divergence: alpha`; it is reverse_kl"),
    ({"divergence": "alpha", "divergence_alpha": 1.0}, "less than 1"),
    ({"discopop_tau": 0.1}, "goes with `variant: discopop`; it is sigmoid"),
    *(({"variant": v, "weighting": "wpo"}, "no `weighting`.*different pairs.*drop one") for v in RANKS),
    *(({"variant": v, "ld_alpha": 0.5}, "no `ld_alpha`.*drop one") for v in RANKS),
    ({"ld_alpha": 1.5}, "less than or equal to 1"),
    ({"variant": ["sigmoid", "bco_pair"]}, "variant: Input should be 'sigmoid'"),
]


@pytest.mark.parametrize(("options", "said"), REFUSED, ids=[named(options) for options, _ in REFUSED])
def test_options_that_mean_nothing_together_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        configure("dpo", options)


def test_exo_pair_has_the_papers_smoothing_where_none_is_given() -> None:
    assert Config(variant="exo_pair").label_smoothing == 1e-3
    assert Config(variant="exo_pair", label_smoothing=0.2).label_smoothing == 0.2
    assert Config(variant="robust").label_smoothing == 0.0
    resolved = Config(variant="exo_pair").model_dump()
    assert Config(**{k: v for k, v in resolved.items() if k in ("variant", "label_smoothing")}).label_smoothing == 1e-3


@pytest.mark.parametrize("options", CASES, ids=named)
def test_needs_are_what_the_loss_reads(options: dict[str, Any]) -> None:
    loss = configure("dpo", options)
    assert (loss.needs.record, loss.needs.reference, loss.needs.nll) == ("pair", True, "none")
    assert loss.needs.head == (("log_sum_sq",) if "weighting" in options else ())
    assert loss.needs.scope == ("batch" if options.get("variant") in RANKS else "pair")


@pytest.mark.parametrize("options", CASES, ids=named)
def test_metrics_have_the_same_names_in_every_variant(options: dict[str, Any]) -> None:
    trees = some_pairs(4)
    logps, reference, log_sum_sq = tensors(trees)
    loss, (result,) = evaluate(options, trees, logps, reference, log_sum_sq)
    names = {f"rewards/{name}" for name in ("chosen", "rejected", "margins", "accuracies")}
    extra = {"policy/wpo_weight"} if "weighting" in options else set()
    extra |= {"rewards/clamped"} if options.get("divergence") in ("forward_kl", "alpha") else set()
    assert result.metrics.keys() == names | extra | {"loss/total", "logps/chosen", "logps/rejected"}
    found = {name: float(metric.sum) / float(metric.count) for name, metric in result.metrics.items()}
    sums = np.array([x.sum() for x in by_sequence(collate(trees), logps)]).reshape(-1, 2)
    assert found["logps/chosen"] == pytest.approx(sums[:, 0].mean())
    assert found["rewards/margins"] == pytest.approx(found["rewards/chosen"] - found["rewards/rejected"])
    assert found["loss/total"] == pytest.approx(loss.item())


@pytest.mark.parametrize(
    ("word", "answer"),
    [
        ("f_divergence_type", "`loss.divergence`"),
        ("f_alpha_divergence_coef", "1 - `loss.divergence_alpha`"),
        ("use_weighting", "weighting: wpo"),
        ("loss_weights", "{name: dpo, variant: bco_pair, weight: 0.2}"),
        ("ld_alpha", "`loss.ld_alpha`"),
        ("discopop_tau", "`loss.discopop_tau`"),
        ("dpo_label_smoothing", "`loss.label_smoothing`"),
        ("pref_ftx", "{name: sft, weight: ...}"),
        ("sync_ref_model", "not offered"),
    ],
)
def test_words_of_peers_about_dpo_are_answered_with_ours(word: str, answer: str) -> None:
    assert answer in (translate(word) or "")


@pytest.mark.parametrize(
    "terms",
    [
        [{"name": "dpo", "variant": "aot_unpaired", "beta": 1.0}],
        [
            {"name": "dpo", "weight": 0.8, "weighting": "wpo", "ld_alpha": 0.5},
            {"name": "dpo", "weight": 0.2, "variant": "bco_pair"},
            {"name": "dpo", "weight": 0.5, "variant": "aot"},
            {"name": "sft"},
        ],
    ],
    ids=["aot_unpaired", "list"],
)
def test_a_trainers_steps_are_the_same_whatever_its_microbatches(
    base: Path,  # noqa: F811
    terms: list[dict[str, Any]],
) -> None:
    spec = make_spec(base, "dpo", reference="start")
    losses = tuple(LossTerm(**term) for term in terms)
    whole, split = (PolicyTrainer(replace(spec, losses=losses, max_tokens=n)) for n in (10_000, 1))
    for step in range(3):
        trees = some_pairs(5, seed=step)
        a, b = (trainer.step(trees, step=step, progress=step / 10) for trainer in (whole, split))
        assert (a["train/microbatches"], b["train/microbatches"]) == (1, 5)
        for name in {"loss/total", "optim/grad_norm", "rewards/margins", "policy/wpo_weight", "loss/dpo-2"} & a.keys():
            assert a[name] == pytest.approx(b[name], rel=2e-4, abs=1e-6), name
    assert ("policy/wpo_weight" in a) == ("loss/dpo-3" in a) == (len(terms) > 1)
    assert abs(a["rewards/margins"]) > 1e-3
