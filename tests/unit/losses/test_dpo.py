"""DPO's variants and options against a float64 oracle written pair by pair from the papers, values computed by hand,
finite differences, and any split into microbatches."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from align.data.packing import collate, global_counts
from align.losses import configure
from align.losses.base import LossInputs, LossOutput, Prepass
from align.losses.dpo_terms import PAIR_LOSSES, at_rank
from align.protocols.trees import Tree
from align.train.prepass import run_prepass
from align.types import HeadOutputs
from tests.unit.core.trees import pair
from tests.unit.losses.test_oracles import by_sequence, random_logps, sequences_of

DIFFERENCE = ("sigmoid", "sigmoid_norm", "hinge", "ipo", "robust", "exo_pair", "discopop")
SIDES = ("nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down")
RANKS = ("aot", "aot_unpaired")
SMOOTHED = ("sigmoid", "robust", "exo_pair", "aot", "aot_unpaired")
DIVERGENCES: tuple[dict[str, Any], ...] = (
    {"divergence": "forward_kl"},
    {"divergence": "js"},
    {"divergence": "alpha", "divergence_alpha": 0.3},
)
PLAIN: list[dict[str, Any]] = [{"variant": name} for name in (*DIFFERENCE, *SIDES, *RANKS)]
CASES: list[dict[str, Any]] = [
    *PLAIN,
    *({"variant": name, "label_smoothing": 0.2} for name in SMOOTHED),
    *({"variant": name, "weighting": "wpo"} for name in (*DIFFERENCE, *SIDES)),
    *({"variant": name, "ld_alpha": 0.3} for name in (*DIFFERENCE, *SIDES)),
    *({"variant": name} | divergence for name in DIFFERENCE for divergence in DIVERGENCES),
    {"weighting": "wpo", "ld_alpha": 0.0, "label_smoothing": 0.1, **DIVERGENCES[2]},
    {"variant": "discopop", "discopop_tau": 1.5},
]


def named(options: dict[str, Any]) -> str:
    return "-".join(str(value) for value in options.values())


def evaluate(
    options: dict[str, Any],
    trees: list[Tree],
    logps: Tensor,
    reference: Tensor,
    log_sum_sq: Tensor | None = None,
    *,
    split: bool = False,
) -> tuple[Tensor, list[LossOutput]]:
    """Loss f64[] of one update as the trainer computes it: the pre-pass where one is needed, then one microbatch of
    all trees or one of each. The tensors are those of `collate(trees)`."""
    loss = configure("dpo", {"beta": 0.3} | options)
    batches = [collate([tree]) for tree in trees] if split else [collate(trees)]
    sizes = [batch.labels.numel() for batch in batches]
    columns = {"logps": logps, "reference": reference, "log_sum_sq": log_sum_sq}
    parts = {name: [None] * len(sizes) if x is None else x.split(sizes) for name, x in columns.items()}
    outputs = [
        HeadOutputs(x, log_sum_sq=y if "log_sum_sq" in loss.needs.head else None)
        for x, y in zip(parts["logps"], parts["log_sum_sq"], strict=True)
    ]
    stats: dict[str, Tensor] = {}
    if loss.needs.scope == "batch":
        by_batch = {id(b): n for n, b in enumerate(batches)}
        found = run_prepass(
            ((batch, True) for batch in reversed(batches)),
            lambda batch: outputs[by_batch[id(batch)]],
            lambda batch: parts["reference"][by_batch[id(batch)]],
        )
        stats = loss.batch_stats(found)
    results = [
        loss(LossInputs(made, batch, global_counts(trees), reference_logps=ref, batch_stats=stats))
        for made, batch, ref in zip(outputs, batches, parts["reference"], strict=True)
    ]
    return torch.stack([result.loss for result in results]).sum(), results


def tensors(trees: list[Tree], seed: int = 1, variant: str = "sigmoid") -> tuple[Tensor, Tensor, Tensor]:
    """logps with gradient, reference, log_sum_sq: f64[N] each. The reference is near, but for variants that sort: there
    pairs must not meet themselves."""
    logps = random_logps(trees, seed)
    noise = (3.0 if variant in RANKS else 0.5) * (random_logps(trees, seed + 1, grad=False) + 2.0)
    return logps, logps.detach() + noise, 0.5 * random_logps(trees, seed + 2, grad=False)


def some_pairs(n: int, seed: int = 0) -> list[Tree]:
    rng = np.random.default_rng(seed)
    return [pair(rng, 2 * i + 1) for i in range(n)]


# ------------------------------------------------------------------------------------------------- oracle


def s(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def logistic(z: float, e: float = 0.0) -> float:
    return -(1 - e) * math.log(s(z)) - e * math.log(s(-z))


# rewards of the chosen and the rejected completion, beta, smoothing, tau -> loss of a pair
ORACLES: dict[str, Callable[[float, float, float, float, float], float]] = {
    "sigmoid": lambda c, r, b, e, t: logistic(b * (c - r), e),
    "sigmoid_norm": lambda c, r, b, e, t: logistic(b * (c - r)),
    "hinge": lambda c, r, b, e, t: max(0.0, 1 - b * (c - r)),
    "ipo": lambda c, r, b, e, t: (c - r - 1 / (2 * b)) ** 2,
    "robust": lambda c, r, b, e, t: ((1 - e) * logistic(b * (c - r)) - e * logistic(b * (r - c))) / (1 - 2 * e),
    "exo_pair": lambda c, r, b, e, t: sum(
        p * math.log(p / q) for p, q in ((s(b * (c - r)), 1 - e), (s(b * (r - c)), e))
    ),
    "discopop": lambda c, r, b, e, t: (
        (1 - s(b * (c - r) / t)) * logistic(b * (c - r)) + s(b * (c - r) / t) * math.exp(-b * (c - r))
    ),
    "nca_pair": lambda c, r, b, e, t: logistic(b * c) + 0.5 * logistic(-b * c) + 0.5 * logistic(-b * r),
    "bco_pair": lambda c, r, b, e, t: logistic(b * c) + logistic(-b * r),
    "sppo_hard": lambda c, r, b, e, t: (c - 0.5 / b) ** 2 + (r + 0.5 / b) ** 2,
    "apo_zero": lambda c, r, b, e, t: (1 - s(b * c)) + s(b * r),
    "apo_down": lambda c, r, b, e, t: s(b * c) + (1 - s(b * (c - r))),
}


def oracle(options: dict[str, Any], rows: list[tuple[np.ndarray, ...]]) -> float:
    """rows: per pair (chosen, rejected) of the policy, the reference, and log_sum_sq."""
    variant, beta, e = options.get("variant", "sigmoid"), 0.3, options.get("label_smoothing", 0.0)
    e = options.get("label_smoothing", 1e-3) if variant == "exo_pair" else e
    if variant in RANKS:
        policy = [(c.sum(), r.sum()) for c, r, *_ in rows]
        reference = [(c.sum(), r.sum()) for _, _, c, r, *_ in rows]
        if variant == "aot":  # 2406.05882: quantiles of the policy's log-ratios against those of the reference's
            above, below = [c - r for c, r in policy], [c - r for c, r in reference]
        else:
            above, below = ([p[k] - q[k] for p, q in zip(policy, reference, strict=True)] for k in (0, 1))
        ranks = zip(sorted(above), sorted(below), strict=True)
        return float(np.mean([logistic(beta * (a - b), e) for a, b in ranks]))
    alpha = options.get("divergence_alpha")
    reward = {
        "reverse_kl": math.log,
        "forward_kl": lambda t: 1 - 1 / t,  # a constant is free, but where sides are divided by their lengths
        "js": lambda t: math.log(2 * t / (1 + t)),
        "alpha": lambda t: (1 - t**-alpha) / alpha,
    }[options.get("divergence", "reverse_kl")]
    losses = []
    for c, r, ref_c, ref_r, sq_c, sq_r in rows:
        shared, ld = min(len(c), len(r)), options.get("ld_alpha", 1.0)
        sides = []
        for x, ref in ((c, ref_c), (r, ref_r)):
            ratio = math.exp((x - ref)[:shared].sum() + ld * (x - ref)[shared:].sum())
            sides.append(reward(ratio) / (len(x) if variant in ("ipo", "sigmoid_norm") else 1))
        weight = 1.0
        if options.get("weighting") == "wpo":  # geometric means of p(y_t) / sum_v p(v)^2
            weight = float(np.prod(np.exp(c - sq_c)) ** (1 / len(c)) * np.prod(np.exp(r - sq_r)) ** (1 / len(r)))
        losses.append(weight * ORACLES[variant](sides[0], sides[1], beta, e, options.get("discopop_tau", 0.05)))
    return float(np.mean(losses))


@pytest.mark.parametrize("options", CASES, ids=named)
def test_every_variant_and_option_equals_the_paper(options: dict[str, Any]) -> None:
    trees = some_pairs(6)
    logps, reference, log_sum_sq = tensors(trees, variant=options.get("variant", "sigmoid"))
    mine, theirs, squares = (by_sequence(collate(trees), x) for x in (logps, reference, log_sum_sq))
    rows = [
        (mine[i], mine[i + 1], theirs[i], theirs[i + 1], squares[i], squares[i + 1]) for i in range(0, len(mine), 2)
    ]
    assert any(len(row[0]) != len(row[1]) for row in rows)
    loss, _ = evaluate(options, trees, logps, reference, log_sum_sq)
    assert loss.item() == pytest.approx(oracle(options, rows), rel=1e-10, abs=1e-10)


def test_every_variant_has_a_case() -> None:
    assert {options.get("variant", "sigmoid") for options in CASES} == set(PAIR_LOSSES)


# Log-ratios: chosen +1 over 2 tokens, rejected -0.5 - 0.5 - 1 = -2 over 3. So delta = 3, and of means 1/2 + 2/3 = 7/6.
BY_HAND: list[tuple[dict[str, Any], float]] = [
    ({}, 0.201413278),  # ln(1 + e^-1.5)
    ({"label_smoothing": 0.1}, 0.351413278),  # + 0.1 * 1.5
    ({"variant": "sigmoid_norm"}, 0.443425506),  # ln(1 + e^(-7/12))
    ({"variant": "hinge", "beta": 0.25}, 0.25),  # 1 - 3/4
    ({"variant": "ipo"}, 1 / 36),  # (7/6 - 1)^2
    ({"variant": "robust", "label_smoothing": 0.1}, 0.013913278),  # (0.9 * 0.201413278 - 0.1 * 1.701413278) / 0.8
    ({"variant": "exo_pair", "label_smoothing": 0.25}, 0.013045431),  # p = s(1.5) = 0.817574: p ln(p/.75) + q ln(q/.25)
    ({"variant": "discopop", "discopop_tau": 1.0}, 0.219168447),  # 0.182426 * 0.201413 + 0.817574 * 0.223130
    ({"variant": "nca_pair"}, 1.117746320),  # 0.474076984 + 0.974076984 / 2 + 0.313261688 / 2
    ({"variant": "bco_pair"}, 0.787338672),  # ln(1 + e^-0.5) + ln(1 + e^-1)
    ({"variant": "sppo_hard"}, 1.0),  # (1 - 1)^2 + (-2 + 1)^2
    ({"variant": "apo_zero"}, 0.646482090),  # 0.377540669 + 0.268941421
    ({"variant": "apo_down"}, 0.804884855),  # s(0.5) + s(-1.5) = 0.622459331 + 0.182425524
    ({"variant": "aot"}, 0.201413278),  # one pair: its own partner
    ({"variant": "aot_unpaired"}, 0.201413278),
    ({"divergence": "forward_kl"}, 0.029441640),  # z = (e^2 - e^-1) / 2
    ({"divergence": "js"}, 0.339183539),  # z = (log s(1) - log s(-2)) / 2 = (2.126928 - 0.313262) / 2
    ({"divergence": "alpha", "divergence_alpha": 0.5}, 0.114244198),  # z = e - e^-0.5
    ({"ld_alpha": 0.5}, 0.251929081),  # the third rejected token counts half: ln(1 + e^-1.25)
    ({"weighting": "wpo"}, 0.080565311),  # 0.5 * 0.8 * ln(1 + e^-1.5)
]


@pytest.mark.parametrize(("options", "expected"), BY_HAND, ids=[named(options) for options, _ in BY_HAND])
def test_values_computed_by_hand(options: dict[str, Any], expected: float) -> None:
    logps = torch.tensor([-0.5, -1.5, -2.0, -2.0, -2.0], dtype=torch.float64)
    reference = torch.tensor([-1.0, -2.0, -1.5, -1.5, -1.0], dtype=torch.float64)
    likely = logps - torch.tensor([0.5, 0.5, 0.8, 0.8, 0.8], dtype=torch.float64).log()
    loss, _ = evaluate({"beta": 0.5} | options, [sequences_of(2, 3)], logps, reference, likely)
    assert loss.item() == pytest.approx(expected, abs=1e-8)


@pytest.mark.parametrize("variant", RANKS)
@pytest.mark.parametrize("split", [False, True])
def test_two_pairs_sorted_by_hand(variant: str, split: bool) -> None:
    """Sorted, (1, 3) meets (2, 5): margins -1 and -2, (ln(1 + e^0.5) + ln(1 + e^1)) / 2."""
    trees = [Tree(i, t.trunk, t.branches) for i, t in enumerate([sequences_of(1, 1), sequences_of(1, 1)])]
    if variant == "aot":  # log-ratios of the policy 3 and 1, of the reference 2 and 5
        logps, reference = torch.tensor([-1.0, -4.0, -1.0, -2.0]), torch.tensor([-1.0, -3.0, -1.0, -6.0])
    else:  # log-ratios to the reference: chosen 3 and 1, rejected 2 and 5
        logps, reference = torch.tensor([-1.0, -1.0, -1.0, -1.0]), torch.tensor([-4.0, -3.0, -2.0, -6.0])
    loss, _ = evaluate({"variant": variant, "beta": 0.5}, trees, logps.double(), reference.double(), split=split)
    assert loss.item() == pytest.approx(1.143669336, abs=1e-8)


# ------------------------------------------------------------------------------------------------- gradients and splits


@pytest.mark.parametrize("options", CASES, ids=named)
def test_gradients_equal_finite_differences(options: dict[str, Any]) -> None:
    """wpo's weights are frozen, as they are in a step; what aot's pairs meet moves with the tokens."""
    trees = some_pairs(3, seed=4)
    logps, reference, log_sum_sq = tensors(trees, 7, options.get("variant", "sigmoid"))
    alignment = log_sum_sq - logps.detach()
    assert torch.autograd.gradcheck(
        lambda x: evaluate(options, trees, x, reference, x.detach() + alignment)[0],
        (logps,),
        eps=1e-6,
        atol=1e-7,
        rtol=1e-5,
    )


def test_wpos_weight_scales_a_pairs_gradient_and_has_none_of_its_own() -> None:
    trees = some_pairs(3)
    logps, reference, log_sum_sq = tensors(trees)
    log_sum_sq.requires_grad_()
    plain, _ = evaluate({}, trees, logps, reference)
    loss, (result,) = evaluate({"weighting": "wpo"}, trees, logps, reference, log_sum_sq)
    (gradient,), (before,) = (torch.autograd.grad(x, logps) for x in (loss, plain))
    assert not torch.autograd.grad(loss + 0 * log_sum_sq.sum(), log_sum_sq)[0].any()
    batch, weights = collate(trees), []
    aligned = [x.mean() for x in by_sequence(batch, logps.detach() - log_sum_sq.detach())]
    for chosen, rejected in batch.pairs.tolist():
        weights.append(math.exp(aligned[chosen] + aligned[rejected]))
        own = (batch.sequence_ids == chosen) | (batch.sequence_ids == rejected)
        torch.testing.assert_close(gradient[own], weights[-1] * before[own], atol=1e-14, rtol=1e-12)
    metric = result.metrics["policy/wpo_weight"]
    assert float(metric.sum) / float(metric.count) == pytest.approx(np.mean(weights), rel=1e-12)


@pytest.mark.parametrize("options", CASES, ids=named)
def test_a_microbatch_per_pair_adds_up_to_the_whole(options: dict[str, Any]) -> None:
    trees = some_pairs(6)
    logps, reference, log_sum_sq = tensors(trees, 3, options.get("variant", "sigmoid"))
    values = [evaluate(options, trees, logps, reference, log_sum_sq, split=split)[0] for split in (False, True)]
    whole, split = (torch.autograd.grad(value, logps)[0] for value in values)
    assert values[0].item() == pytest.approx(values[1].item(), rel=1e-12)
    torch.testing.assert_close(whole, split, atol=1e-13, rtol=1e-10)
    assert whole.abs().max() > 1e-3


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("variant", RANKS)
def test_sorting_over_microbatches_equals_sorting_one_batch_under_autograd(variant: str, split: bool) -> None:
    trees = some_pairs(7, seed=2)
    logps, reference, _ = tensors(trees, 5, variant)
    batch = collate(trees)

    def sums(values: Tensor) -> tuple[Tensor, Tensor]:
        found = values.new_zeros(batch.sequences).index_add(0, batch.sequence_ids, values)
        return found[batch.pairs[:, 0]], found[batch.pairs[:, 1]]

    if variant == "aot":
        (c, r), (ref_c, ref_r) = sums(logps), sums(reference)
        above, below = c - r, ref_c - ref_r
    else:
        above, below = sums(logps - reference)
    order = above.argsort(), below.argsort()
    assert order[0].tolist() != order[1].tolist(), "these pairs would meet themselves"
    expected = -logsigmoid(0.3 * (above.sort().values - below.sort().values)).mean()
    mine, _ = evaluate({"variant": variant}, trees, logps, reference, split=split)
    assert mine.item() == pytest.approx(expected.item(), rel=1e-12)
    gradients = [torch.autograd.grad(value, logps)[0] for value in (mine, expected)]
    torch.testing.assert_close(*gradients, atol=1e-13, rtol=1e-10)


def test_ties_meet_in_order_of_tree_id_whatever_the_order_of_arrival() -> None:
    values, others = torch.tensor([1.0, 0.0, 1.0, 0.0]), torch.tensor([5.0, 7.0, 6.0, 6.0])
    assert at_rank(values, others).tolist() == [6.0, 5.0, 7.0, 6.0]
    trees = [Tree(i, t.trunk, t.branches) for i, t in enumerate([sequences_of(1, 1)] * 4)]
    logps = torch.tensor([-1.0, -2.0] * 4, dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([-1.0, -3.0, -1.0, -2.0, -1.0, -3.0, -2.0, -1.5], dtype=torch.float64)
    for variant in RANKS:
        loss, _ = evaluate({"variant": variant}, trees, logps, reference)
        (gradient,) = torch.autograd.grad(loss, logps)
        turned, _ = evaluate(
            {"variant": variant},
            trees[::-1],
            logps.reshape(-1, 2).flip(0).reshape(-1),
            reference.reshape(-1, 2).flip(0).reshape(-1),
        )
        assert turned.item() == loss.item()
        assert torch.equal(torch.autograd.grad(turned, logps)[0], gradient)


def test_a_tree_twice_in_an_update_is_not_sorted_silently() -> None:
    loss = configure("dpo", {"variant": "aot"})
    zeros = torch.zeros(4)
    with pytest.raises(AssertionError, match="each tree once"):
        loss.batch_stats(Prepass(torch.tensor([3, 3, 3, 3]), zeros, zeros, zeros))
