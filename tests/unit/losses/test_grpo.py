"""grpo, every option alone and together: against a float64 oracle written sequence by sequence from the papers, its
derivatives, and sums over microbatches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch

from align.data.packing import collate, global_counts
from align.losses import configure
from align.losses.base import LossInputs, LossOutput, Prepass
from align.losses.grpo import derived
from align.protocols.trees import Counts, Segment, Tree
from align.train.metrics import MetricSums
from align.types import HeadOutputs, TokenBatch
from tests.unit.core.trees import group

Row = dict[str, np.ndarray]  # one sequence's per-token values, f64[n] each

SURROGATES: dict[str, dict[str, Any]] = {
    "clip": {},
    "two-sided": {"clip_low": 0.1, "clip_high": 0.15, "clip_delta": 1.2},
    "cispo": {"surrogate": "cispo", "cispo_cap": 1.1},
    "sapo": {"surrogate": "sapo", "sapo_temperature_pos": 1.5, "sapo_temperature_neg": 3.0},
    "vespo": {"surrogate": "vespo", "vespo_k_pos": 1.5, "vespo_lambda_neg": 2.5},
    "dppo": {"surrogate": "dppo", "dppo_low": 0.003, "dppo_high": 0.004, "dppo_log_square": 0.1},
    "dppo-kl": {"surrogate": "dppo", "dppo_divergence": "kl", "dppo_low": 0.0004, "dppo_high": 0.0005},
}
TERMS: dict[str, dict[str, Any]] = {
    "alone": {},
    "k2": {"kl": 0.3, "kl_estimator": "k2"},
    "k3": {"kl": 0.3},
    "w_k3": {"kl": 0.3, "kl_estimator": "w_k3"},
    "bonus": {"entropy_bonus": 0.2},
    "top-entropy": {"top_entropy": 0.35, "entropy_bonus": 0.2},
    "off-policy": {"off_policy_threshold": 0.02},
    "off": {"correction": "off"},
    "token-truncate": {"correction": {"cap": 1.1, "floor": 0.95}},
    "token-mask": {"correction": {"mode": "mask", "cap": 1.15, "floor": 0.9}},
    "sequence-truncate": {"correction": {"level": "sequence", "cap": None, "floor": 0.8}},
    "sequence-mask": {"correction": {"level": "sequence", "mode": "mask", "cap": 1.3}},
    "all": {
        "kl": 0.3,
        "kl_estimator": "w_k3",
        "entropy_bonus": 0.2,
        "top_entropy": 0.35,
        "off_policy_threshold": 0.02,
        "correction": {"level": "sequence", "mode": "mask", "cap": 1.5, "floor": 0.7},
    },
}
TO_SAMPLER = ("vespo", "dppo", "dppo-kl")
AGGREGATIONS: tuple[dict[str, Any], ...] = (
    {"aggregation": "token"},
    {"aggregation": "sequence"},
    {"aggregation": "constant", "constant_length": 12},
    {"aggregation": "sequence_sum"},
)


def combinations(surrogate: str, terms: str) -> Iterator[dict[str, Any]]:
    ratios = ("token",) if surrogate in TO_SAMPLER else ("token", "sequence")
    for ratio, how in product(ratios, AGGREGATIONS):
        yield {**SURROGATES[surrogate], **TERMS[terms], "ratio": ratio, **how}


every_combination = pytest.mark.parametrize(
    ("surrogate", "terms"),
    [(s, t) for s, t in product(SURROGATES, TERMS) if s not in TO_SAMPLER or "correction" not in TERMS[t]],
)


@dataclass
class Case:
    """Three groups of four completions, one of them masked, and tensors f64[N] over their scored tokens."""

    trees: list[Tree]
    batch: TokenBatch
    logps: torch.Tensor
    reference: torch.Tensor
    entropy: torch.Tensor
    proximal: torch.Tensor

    @staticmethod
    def make(seed: int = 0) -> Case:
        rng = np.random.default_rng(seed)
        trees = [group(rng, i) for i in range(3)]
        first, *others = trees[1].branches
        silent = replace(first, loss_mask=np.zeros(len(first), bool))
        trees[1] = replace(trees[1], branches=(silent, *others))
        batch = in_float64(collate(trees))
        n = batch.labels.numel()

        def near(values: torch.Tensor, spread: float) -> torch.Tensor:
            return values + spread * torch.as_tensor(rng.standard_normal(n))

        logps = near(batch.behavior_logps, 0.2)
        entropy = torch.as_tensor(2 * rng.random(n))
        return Case(trees, batch, logps, near(logps, 0.3), entropy, near(logps, 0.1))

    def rows(self, logps: np.ndarray, entropy: np.ndarray, old: torch.Tensor) -> list[Row]:
        owner = self.batch.sequence_ids.numpy()
        columns = {
            "new": logps,
            "entropy": entropy,
            "old": old.numpy(),
            "sampler": self.batch.behavior_logps.numpy(),
            "ref": self.reference.numpy(),
            "adv": self.batch.advantages.numpy(),
        }
        return [{k: v[owner == s] for k, v in columns.items()} for s in range(self.batch.sequences) if s in owner]


def in_float64(batch: TokenBatch) -> TokenBatch:
    return replace(batch, advantages=batch.advantages.double(), behavior_logps=batch.behavior_logps.double())


def stats_of(module: Any, config: Any, case: Case) -> dict[str, torch.Tensor]:
    """What the pre-pass of a whole update gives this loss."""
    if config.top_entropy == 1:
        return {}
    nothing = torch.zeros(0)
    found = Prepass(nothing, nothing, nothing, nothing, case.entropy[case.batch.loss_mask].detach())
    return dict(module.batch_stats(found, config))


def run(options: dict[str, Any], case: Case, proximal: bool = False) -> LossOutput:
    loss = configure("grpo", options)
    inputs = LossInputs(
        HeadOutputs(case.logps, entropy=case.entropy),
        case.batch,
        global_counts(case.trees),
        reference_logps=case.reference if loss.needs.reference else None,
        proximal_logps=case.proximal if proximal else None,
        batch_stats=stats_of(loss.module, loss.config, case),
    )
    return loss(inputs)


def weights_of(row: Row, o: dict[str, Any]) -> np.ndarray:
    if o.get("surrogate") == "vespo":
        return np.full_like(row["new"], np.exp((row["new"] - row["sampler"]).sum()))
    log_w = row["new"] - row["sampler" if o.get("surrogate") == "dppo" else "old"]
    return np.exp(np.full_like(log_w, log_w.mean()) if o["ratio"] == "sequence" else log_w)


def surrogate_of(row: Row, o: dict[str, Any], w: np.ndarray, at: np.ndarray, held: Row) -> np.ndarray:
    """at: the weights that cispo's stop-gradient holds (w itself, but for derivatives); held: the row there."""
    adv, kind = row["adv"], o.get("surrogate", "clip")
    if kind == "cispo":
        return np.minimum(at, o["cispo_cap"]) * adv * row["new"]
    if kind == "vespo":
        k = np.where(adv >= 0, o["vespo_k_pos"], 3.0)
        steep = np.where(adv >= 0, 3.0, o["vespo_lambda_neg"])
        return np.exp(steep) * at**k * np.exp(-steep * at) * adv * row["new"]
    if kind == "dppo":
        pi, mu = np.exp(held["new"]), np.exp(held["sampler"])
        far = np.abs(pi - mu)
        if o.get("dppo_divergence") == "kl":
            far = mu * np.log(mu / pi) + (1 - mu) * np.log((1 - mu) / (1 - pi))
        out = ((adv > 0) & (pi > mu) & (far > o["dppo_high"])) | ((adv < 0) & (pi < mu) & (far > o["dppo_low"]))
        return np.where(out, 0.0, w) * adv - o.get("dppo_log_square", 1e-3) * np.log(w) ** 2
    if kind == "sapo":
        tau = np.where(adv > 0, o["sapo_temperature_pos"], o["sapo_temperature_neg"])
        return 4 / tau / (1 + np.exp(-tau * (w - 1))) * adv
    inside = np.clip(w, 1 - o.get("clip_low", 0.2), 1 + o.get("clip_high", 0.2))
    return np.minimum(np.minimum(w, o.get("clip_delta", np.inf)) * adv, inside * adv)


def correction_of(row: Row, o: dict[str, Any]) -> np.ndarray:
    """The policy at the start of the batch over the sampler, bounded; 1 where the ratio is to the sampler itself."""
    c = o.get("correction", {})
    if c == "off" or o.get("surrogate") in ("vespo", "dppo"):
        return np.ones_like(row["old"])
    log_c = row["old"] - row["sampler"]
    weight = np.exp(np.full_like(log_c, log_c.sum()) if c.get("level") == "sequence" else log_c)
    low, high = c.get("floor") or 0.0, c.get("cap", 2.0) or np.inf
    if c.get("mode") == "mask":
        return np.where((low <= weight) & (weight <= high), weight, 0.0)
    return np.clip(weight, low, high)


def kl_of(row: Row, estimator: str) -> np.ndarray:
    u = row["ref"] - row["new"]
    k3 = np.exp(u) - 1 - u
    return {"k2": u**2 / 2, "k3": k3, "w_k3": np.exp(row["new"] - row["sampler"]) * k3}[estimator]


def oracle(o: dict[str, Any], rows: list[Row], at: list[Row] | None = None) -> float:
    """The loss of one update. `at`: the point where stop-gradients and the choice of tokens are held."""
    at = at or rows
    threshold = np.quantile(np.concatenate([r["entropy"] for r in at]), 1 - o.get("top_entropy", 1.0))
    per_sequence = []
    for row, held in zip(rows, at, strict=True):
        gain = surrogate_of(row, o, weights_of(row, o), weights_of(held, o), held)
        drift = np.mean(held["sampler"] - held["new"])
        if row["adv"][0] < 0 and drift > o.get("off_policy_threshold", np.inf):
            gain = np.zeros_like(gain)
        chosen = held["entropy"] >= threshold
        gain = gain * correction_of(row, o)
        terms = -gain * chosen - o.get("entropy_bonus", 0.0) * row["entropy"] * chosen
        per_sequence.append(terms + o.get("kl", 0.0) * kl_of(row, o.get("kl_estimator", "k3")))
    if o["aggregation"] == "sequence":
        return float(np.mean([x.mean() for x in per_sequence]))
    total, tokens = sum(x.sum() for x in per_sequence), sum(len(x) for x in per_sequence)
    divisor = {"token": tokens, "sequence_sum": len(per_sequence), "constant": 12 * len(per_sequence)}
    return float(total / divisor[o["aggregation"]])


@every_combination
def test_every_combination_equals_the_papers(surrogate: str, terms: str) -> None:
    case = Case.make()
    for options, proximal in product(combinations(surrogate, terms), (False, True)):
        old = case.proximal if proximal else case.batch.behavior_logps
        rows = case.rows(case.logps.numpy(), case.entropy.numpy(), old)
        assert run(options, case, proximal).loss.item() == pytest.approx(oracle(options, rows), abs=1e-12), options


@every_combination
def test_every_gradient_equals_finite_differences_of_the_papers_formula(surrogate: str, terms: str) -> None:
    """cispo's is the gradient of its surrogate with the weight held (its stop-gradient): its value is no objective.
    With `ratio: sequence` and chosen or weighted tokens, each token has the gradient of its own log-probability
    (GSPO-token) and not of its sequence's mean, which the value's derivative would be: tested below."""
    case = Case.make(1)
    logps, entropy = case.logps.numpy(), case.entropy.numpy()
    rng, eps = np.random.default_rng(2), 1e-6
    for options, proximal in product(combinations(surrogate, terms), (False, True)):
        old = case.proximal if proximal else case.batch.behavior_logps
        weighted = proximal and options.get("correction", {}) != "off"
        by_token = weighted and options.get("correction", {}).get("level") != "sequence"
        if options["ratio"] == "sequence" and (options.get("top_entropy") or by_token) and surrogate != "cispo":
            continue
        leaves = [torch.tensor(x, requires_grad=True) for x in (logps, entropy)]
        loss = run(options, replace(case, logps=leaves[0], entropy=leaves[1]), proximal).loss
        gradients = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
        at = case.rows(logps, entropy, old)
        for _ in range(2):
            steps = [rng.standard_normal(logps.shape) for _ in leaves]
            ends = [
                oracle(options, case.rows(logps + sign * eps * steps[0], entropy + sign * eps * steps[1], old), at)
                for sign in (1, -1)
            ]
            slope = sum(float((g.numpy() * d).sum()) for g, d in zip(gradients, steps, strict=True))
            assert slope == pytest.approx((ends[0] - ends[1]) / (2 * eps), abs=1e-7), options


@pytest.mark.parametrize("name", ["dppo", "dppo-kl"])
def test_dppo_masks_on_the_side_that_the_advantage_pushes_to_and_from_the_sampler_alone(name: str) -> None:
    case = Case.make(4)
    found = [run(SURROGATES[name], case, proximal) for proximal in (False, True)]
    assert found[0].loss == found[1].loss, "the policy at the start of the batch has no part in it"
    for side in ("low", "high"):
        metric = found[0].metrics[f"policy/clip_fraction_{side}"]
        assert 0 < metric.sum < metric.count / 2
    assert configure("grpo", {"surrogate": "dppo"}).needs.ratio == "sampler"


@pytest.mark.parametrize("options", [SURROGATES["clip"], SURROGATES["two-sided"], SURROGATES["sapo"]])
@pytest.mark.parametrize("terms", ["k2", "k3", "w_k3", "bonus"])
def test_autograd_agrees_with_itself(options: dict[str, Any], terms: str) -> None:
    case = Case.make(2)
    leaves = [x.clone().requires_grad_() for x in (case.logps, case.entropy)]

    def value(logps: torch.Tensor, entropy: torch.Tensor) -> torch.Tensor:
        return run({**options, **TERMS[terms]}, replace(case, logps=logps, entropy=entropy)).loss

    assert torch.autograd.gradcheck(value, leaves, eps=1e-6, atol=1e-7)


def test_a_sequence_ratio_with_chosen_tokens_moves_only_these() -> None:
    case = Case.make(3)
    leaf = case.logps.clone().requires_grad_()
    run(
        {"ratio": "sequence", "top_entropy": 0.35, "aggregation": "sequence"}, replace(case, logps=leaf)
    ).loss.backward()
    chosen = case.entropy >= torch.quantile(case.entropy, 0.65)
    assert leaf.grad is not None and (leaf.grad[~chosen] == 0).all() and (leaf.grad[chosen] != 0).any()


@pytest.mark.parametrize("surrogate", ["clip", "sapo"])
def test_with_a_sequence_ratio_each_tokens_own_gradient_has_its_own_weight(surrogate: str) -> None:
    case = Case.make(3)
    wide = {"clip_low": 9.0, "clip_high": 9.0} if surrogate == "clip" else SURROGATES["sapo"]
    options = {**wide, "ratio": "sequence", "aggregation": "sequence"}

    def gradient(correction: Any) -> torch.Tensor:
        leaf = case.logps.clone().requires_grad_()
        run({**options, "correction": correction}, replace(case, logps=leaf), proximal=True).loss.backward()
        assert leaf.grad is not None
        return leaf.grad

    weight = (case.proximal - case.batch.behavior_logps).exp().clamp(max=1.1)
    torch.testing.assert_close(gradient({"cap": 1.1}), weight * gradient("off"), atol=1e-14, rtol=1e-10)


def parts(case: Case) -> Iterator[Case]:
    """The same update as one microbatch per sequence."""
    owner = case.batch.sequence_ids
    first = 0
    for tree in case.trees:
        for branch in tree.branches:
            mine = owner == first
            trees = [replace(tree, branches=(branch,))]
            tensors = (case.logps, case.reference, case.entropy, case.proximal)
            yield Case(trees, in_float64(collate(trees)), *(x[mine] for x in tensors))
            first += 1


@every_combination
def test_microbatches_of_one_sequence_add_up_to_the_update(surrogate: str, terms: str) -> None:
    case = Case.make(4)
    leaf = case.logps.clone().requires_grad_()
    case = replace(case, logps=leaf)
    counts: Counts = global_counts(case.trees)
    for options in combinations(surrogate, terms):
        loss = configure("grpo", options)
        stats = stats_of(loss.module, loss.config, case)
        whole, split = MetricSums(), MetricSums()
        total, gradient = torch.zeros((), dtype=torch.float64), torch.zeros_like(leaf)

        def inputs(part: Case, stats: dict[str, torch.Tensor] = stats) -> LossInputs:
            outputs = HeadOutputs(part.logps, entropy=part.entropy)
            return LossInputs(outputs, part.batch, counts, part.reference, part.proximal, stats)

        for part in parts(case):
            output = loss(inputs(part))
            total += output.loss.detach()
            if output.loss.requires_grad:
                gradient += torch.autograd.grad(output.loss, leaf)[0]
            split.add(output.metrics)
        expected = loss(inputs(case))
        whole.add(expected.metrics)
        torch.testing.assert_close(total, expected.loss.detach(), atol=1e-12, rtol=1e-10)
        torch.testing.assert_close(gradient, torch.autograd.grad(expected.loss, leaf)[0], atol=1e-12, rtol=1e-10)
        assert split.result() == pytest.approx(whole.result(), abs=1e-6), options


def silent(tree: Tree) -> Tree:
    return replace(tree, branches=tuple(replace(b, loss_mask=np.zeros(len(b), bool)) for b in tree.branches))


@every_combination
def test_an_update_whose_every_token_is_masked_is_zero_and_finite(surrogate: str, terms: str) -> None:
    trees = [silent(group(np.random.default_rng(5), 0, size=2))]
    for nll in (False, True):  # without any row, and with rows that only another loss's mask scores
        masked = [
            replace(t, branches=tuple(replace(b, nll_mask=np.full(len(b), nll)) for b in t.branches)) for t in trees
        ]
        batch = in_float64(collate(masked))
        n = batch.labels.numel()
        assert (n > 0) == nll and not batch.loss_mask.any()
        values = [torch.linspace(-3.0, -1.0, n, dtype=torch.float64) for _ in range(4)]
        leaf = values[0].clone().requires_grad_()
        for options, proximal in product(combinations(surrogate, terms), (False, True)):
            output = run(options, Case(masked, batch, leaf, *values[1:]), proximal)
            (gradient,) = torch.autograd.grad(output.loss, leaf)
            assert output.loss.item() == 0.0 and not gradient.any(), options
            sums = MetricSums()
            sums.add(output.metrics)
            assert all(np.isfinite(value) for value in sums.result().values())


@pytest.mark.parametrize("far", [-1000.0, 1000.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@every_combination
def test_a_token_far_from_sampler_and_reference_stays_finite(
    surrogate: str, terms: str, dtype: torch.dtype, far: float
) -> None:
    case = Case.make(6)
    logps = (case.batch.behavior_logps + far).to(dtype).requires_grad_()
    batch = replace(case.batch, advantages=case.batch.advantages.to(dtype))
    reference = case.batch.behavior_logps.to(dtype)
    start = (case.batch.behavior_logps - far).to(dtype)
    moved = replace(case, batch=batch, logps=logps, reference=reference, entropy=case.entropy.to(dtype), proximal=start)
    for options, proximal in product(combinations(surrogate, terms), (False, True)):
        output = run(options, moved, proximal)
        (gradient,) = torch.autograd.grad(output.loss, logps, allow_unused=True, materialize_grads=True)
        assert output.loss.isfinite() and gradient.isfinite().all(), options


def test_clip_fractions_say_on_which_side() -> None:
    case = Case.make(7)
    adv, sampler = case.batch.advantages, case.batch.behavior_logps
    w = torch.tensor([0.5, 1.0, 1.5, 5.0], dtype=torch.float64).repeat(len(adv))[: len(adv)]
    options = {"clip_low": 0.2, "clip_high": 0.3, "clip_delta": 4.0}
    sums = MetricSums()
    sums.add(run(options, replace(case, logps=sampler + w.log())).metrics)
    found = sums.result()
    low, high, delta = (w < 0.8) & (adv < 0), (w > 1.3) & (adv > 0), (w > 4) & (adv < 0)
    assert min(x.sum() for x in (low, high, delta)) > 0
    for name, tokens in (("_low", low), ("_high", high), ("_delta", delta), ("", low | high | delta)):
        assert found[f"policy/clip_fraction{name}"] == pytest.approx(float(tokens.double().mean()))
    assert found["policy/ratio"] == pytest.approx(float(w.mean()))


def test_masks_are_counted() -> None:
    case = Case.make(8)
    sums = MetricSums()
    sums.add(run({"top_entropy": 0.25, "off_policy_threshold": 0.05}, case).metrics)
    found = sums.result()
    n = case.entropy.numel()
    assert found["policy/top_entropy_tokens"] == sum(case.entropy >= np.quantile(case.entropy.numpy(), 0.75)) < n / 2
    rows = case.rows(case.logps.numpy(), case.entropy.numpy(), case.batch.behavior_logps)
    gone = [r["adv"][0] < 0 and np.mean(r["sampler"] - r["new"]) > 0.05 for r in rows]
    assert 0 < sum(gone) == found["policy/off_policy_sequences"] < len(rows)


# ------------------------------------------------------------------------------------------ sampler and trainer


def corrected(
    correction: Any, log_weights: list[list[float]], advantage: float = 1.0
) -> tuple[LossOutput, torch.Tensor]:
    """The loss of one group whose completions have these log-weights per token, and its gradient."""
    ones = [np.ones(len(row), np.float32) for row in log_weights]
    branches = tuple(
        Segment(np.arange(len(x)), np.ones(len(x), bool), advantages=advantage * x, behavior_logps=-x) for x in ones
    )
    trees = [Tree(0, Segment(np.arange(3), np.zeros(3, bool)), branches)]
    proximal = torch.tensor([w for row in log_weights for w in row], dtype=torch.float64) - 1
    leaf = proximal.clone().requires_grad_()
    batch = in_float64(collate(trees))
    loss = configure("grpo", {"correction": correction})
    output = loss(LossInputs(HeadOutputs(leaf), batch, global_counts(trees), proximal_logps=proximal))
    return output, torch.autograd.grad(output.loss, leaf)[0]


LN = {w: float(np.log(w)) for w in (0.25, 0.5, 0.8, 1.0, 1.5, 3.0, 4.0)}


@pytest.mark.parametrize(
    ("correction", "weights", "counts"),
    [
        ({"cap": 2.0}, [0.25, 4 / 2, 1.5, 0.5], {"mismatch/truncated_tokens": 1}),
        ({"cap": 2.0, "floor": 0.4}, [0.4, 2.0, 1.5, 0.5], {"mismatch/truncated_tokens": 2}),
        ({"mode": "mask"}, [0.25, 0.0, 1.5, 0.5], {"mismatch/masked_tokens": 1}),
        ({"mode": "mask", "cap": None, "floor": 0.4}, [0.0, 4.0, 1.5, 0.5], {"mismatch/masked_tokens": 1}),
        # the first completion's product is 1, the second's 0.75
        ({"level": "sequence"}, [1.0, 1.0, 0.75, 0.75], {"mismatch/truncated_sequences": 0}),
        ({"level": "sequence", "floor": 0.9}, [1.0, 1.0, 0.9, 0.9], {"mismatch/truncated_sequences": 1}),
        ({"level": "sequence", "mode": "mask", "floor": 0.9}, [1.0, 1.0, 0.0, 0.0], {"mismatch/masked_sequences": 1}),
    ],
)
def test_a_correction_weighs_each_gradient_as_computed_by_hand_and_counts_what_it_bounded(
    correction: dict[str, Any], weights: list[float], counts: dict[str, int]
) -> None:
    output, gradient = corrected(correction, [[LN[0.25], LN[4.0]], [LN[1.5], LN[0.5]]])
    assert (-4 * gradient).tolist() == pytest.approx(weights), "a mean over four tokens, whatever is masked"
    sums = MetricSums()
    sums.add(output.metrics)
    found = sums.result()
    assert {name: found[name] for name in found if "truncated" in name or "masked" in name} == counts
    assert found["mismatch/correction"] == pytest.approx(np.mean(weights))
    assert found["policy/ratio"] == 1.0 and found["policy/clip_fraction"] == 0.0


def test_the_mismatch_is_kl_by_k3_its_largest_gap_and_the_effective_sample_size_of_the_unbounded_weights() -> None:
    rows = [[LN[0.25], LN[4.0], LN[1.0]], [LN[1.5], LN[0.5]]]
    for level, w in (("token", np.array([0.25, 4, 1, 1.5, 0.5])), ("sequence", np.array([1.0, 0.75]))):
        sums = MetricSums()
        sums.add(corrected({"level": level, "cap": 1.0}, rows)[0].metrics)
        found = derived(sums.result())
        assert found["mismatch/ess"] == pytest.approx(w.sum() ** 2 / len(w) / (w**2).sum())
        assert found["mismatch/max_abs"] == pytest.approx(np.log(4))
        tokens = np.array([0.25, 4, 1, 1.5, 0.5])
        assert found["mismatch/kl"] == pytest.approx(np.mean(tokens - 1 - np.log(tokens)))
        assert not {"mismatch/weight", "mismatch/weight_sq"} & set(found)  # the sums behind the share


def test_the_kl_estimate_of_the_mismatch_is_unbiased_for_kl_of_sampler_and_trainer() -> None:
    """By enumeration of a vocabulary: each token weighted with the sampler's probability of it."""
    g = torch.Generator().manual_seed(3)
    sampler, trainer = (torch.log_softmax(torch.randn(7, generator=g, dtype=torch.float64), -1) for _ in range(2))
    terms = [corrected(None, [[w]])[0].metrics["mismatch/kl"].sum.item() for w in (trainer - sampler).tolist()]
    exact = float((sampler.exp() * (sampler - trainer)).sum())
    assert float((sampler.exp() * torch.tensor(terms, dtype=torch.float64)).sum()) == pytest.approx(exact, abs=1e-9)


def test_an_equal_sampler_has_an_effective_sample_size_of_exactly_one_and_corrects_nothing() -> None:
    rows = [[0.0] * 3, [0.0] * 5, [0.0]]
    for correction in ("off", {}, {"level": "sequence", "mode": "mask", "cap": 3.0}):
        output, gradient = corrected(correction, rows)
        sums = MetricSums()
        sums.add(output.metrics)
        found = derived(sums.result())
        assert found["mismatch/ess"] == 1.0 and found["mismatch/kl"] == found["mismatch/max_abs"] == 0.0
        assert torch.equal(gradient, corrected("off", rows)[1])


def test_a_correction_carries_no_gradient_and_leaves_kl_and_bonus_as_they_are() -> None:
    case = Case.make(11)
    silent = replace(case, batch=replace(case.batch, advantages=torch.zeros_like(case.batch.advantages)))
    options = {"kl": 0.3, "entropy_bonus": 0.2}
    for correction in ({"cap": 1.01}, {"level": "sequence", "mode": "mask", "cap": 1.0}):
        losses = [run({**options, "correction": c}, silent, proximal=True).loss for c in (correction, "off")]
        assert losses[0] == losses[1] != 0


def test_a_masked_row_counts_neither_in_a_correction_nor_in_the_mismatch() -> None:
    """A completion without a scored token (truncated, unscored) may have any sampler log-probabilities."""
    case = Case.make(12)
    options = {"correction": {"level": "sequence", "mode": "mask", "cap": 1.5, "floor": 0.7}}
    trees = [replace(tree, branches=tuple(b for b in tree.branches if b.loss_mask.any())) for tree in case.trees]
    assert sum(len(t.branches) for t in trees) == sum(len(t.branches) for t in case.trees) - 1
    without = replace(case, trees=trees, batch=in_float64(collate(trees)))
    found = []
    for each in (case, without):
        sums = MetricSums()
        output = run(options, each, proximal=True)
        sums.add(output.metrics)
        found.append((output.loss.item(), sums.result()))
    assert found[0] == found[1] and 0 < found[0][1]["mismatch/masked_sequences"] < len(trees[0].branches) * 3
