"""Loss x split on tensors: however an update is cut into microbatches, its shares of the loss add up to the same value,
gradient and metrics. Every option of every loss is in a case: a new one without a case fails here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal, get_args, get_origin

import numpy as np
import pytest
import torch
from torch import Tensor

from align.data.microbatches import plan_microbatches
from align.data.packing import collate, global_counts, mark_nll, observed
from align.losses import configure, load, names
from align.losses.base import LossInputs
from align.protocols.trees import Counts, Medium, Segment, Tree
from align.train.metrics import MetricSums
from align.train.prepass import run_prepass
from align.types import HeadOutputs, TokenBatch
from tests.unit.core.trees import conversation, group, labelled, pair, unpaired

MAKE = {
    "conversation": conversation,
    "pair": pair,
    "unpaired": unpaired,
    "labelled": labelled,
    "group": group,
}

CASES: dict[str, list[dict[str, Any]]] = {
    "sft": [{}, {"variant": "dft"}],
    "dpo": [
        {"beta": 0.3},
        {"variant": "hinge"},
        {"variant": "ipo"},
        {"variant": "robust", "label_smoothing": 0.1},
        {"variant": "sigmoid_norm", "divergence": "js"},
        {"variant": "exo_pair", "divergence": "forward_kl"},
        {"variant": "discopop", "discopop_tau": 0.1},
        {"divergence": "alpha", "divergence_alpha": 0.3},
        *({"variant": name} for name in ("nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down")),
        {"variant": "aot"},
        {"variant": "aot_unpaired", "label_smoothing": 0.1},
        {"weighting": "wpo"},
        {"ld_alpha": 0.3},
    ],
    "kto": [{"beta": 0.4, "desirable_weight": 1.5, "undesirable_weight": 0.7}, {"variant": "apo_zero_unpaired"}],
    "orpo": [{"lambda": 0.3}, {"nll": "response"}],
    "simpo": [
        {"beta": 1.5, "gamma": 0.7},
        {"alpha": 0.25, "label_smoothing": 0.1},
        {"nll_weight": 0.8},
    ],
    "cpo": [
        {"beta": 0.3, "label_smoothing": 0.1},
        {"nll_weight": 0.0},
        {"variant": "hinge"},
        {"variant": "ipo"},
    ],
    "reward_model": [{}, {"centre": 0.1}],
    "classify": [{}, {"label_smoothing": 0.1}, {"class_weights": [0.5, 2.0, 1.5]}],
    "modpo": [{}, {"beta": 0.3, "preference_weight": 0.4}],
    "echo": [{}],
    "grpo": [
        {},
        {"clip_low": 0.1, "clip_high": 0.15, "clip_delta": 1.25, "log_entropy": False},
        {"surrogate": "cispo", "cispo_cap": 1.1},
        {"surrogate": "sapo", "sapo_temperature_pos": 0.9, "sapo_temperature_neg": 1.2, "aggregation": "sequence"},
        {
            "surrogate": "vespo",
            "vespo_k_pos": 1.5,
            "vespo_lambda_pos": 2.5,
            "vespo_k_neg": 2.0,
            "vespo_lambda_neg": 1.5,
        },
        {"surrogate": "dppo", "dppo_low": 0.004, "dppo_high": 0.003, "dppo_log_square": 0.1},
        {"surrogate": "dppo", "dppo_divergence": "kl", "dppo_low": 0.0005},
        {"ratio": "sequence", "aggregation": "sequence_sum"},
        {"top_entropy": 0.3, "entropy_bonus": 0.02},
        {"off_policy_threshold": 0.02},
        {"correction": "off"},
        {"correction": {"cap": 1.1, "floor": 0.95}},
        {"correction": {"mode": "mask", "cap": 1.1, "floor": 0.9}},
        {"correction": {"level": "sequence", "cap": 1.3}},
        {"correction": {"level": "sequence", "mode": "mask", "cap": 1.5}, "aggregation": "sequence"},
        {"kl": 0.1},
        {"kl": 0.1, "kl_estimator": "k2"},
        {"kl": 0.1, "kl_estimator": "w_k3"},
        {"aggregation": "sequence", "entropy_bonus": 0.01},
        {"aggregation": "constant", "constant_length": 16, "ratio": "sequence"},
    ],
}
ALL = [pytest.param(name, options, id=f"{name}-{options}") for name, cases in CASES.items() for options in cases]


# ------------------------------------------------------------------------------------------------- a forward of tensors


def noise(batch: TokenBatch, salt: float) -> Tensor:
    """f64[N] in (0, 1) that depends on a scored token, its position and its sequence's tree alone, never on packing."""
    trees = batch.group_ids[batch.sequence_ids].double()
    seed = 12.9898 * batch.labels + 78.233 * batch.position_ids[batch.predict_at] + 37.719 * trees + salt
    return (43758.5453 * torch.sin(seed)).frac().abs()


@dataclass
class Forward:
    """What a model would give for packed trees, as leaves, so that gradients are per scored token (or score)."""

    leaves: dict[int, dict[str, Tensor]] = field(default_factory=dict)

    def __call__(self, batch: TokenBatch) -> HeadOutputs:
        made = {
            "logps": -3 * noise(batch, 1.0) - 0.05,
            "entropy": 2 * noise(batch, 2.0) + 0.1,
            "log_sum_sq": -2 * noise(batch, 3.0) - 0.1,
        }
        made["scores"] = (
            4 * (noise(batch, 6.0)[last_tokens(batch)][:, None] if len(batch.labels) else of_tree(batch)) - 2
        )
        for leaf in made.values():
            leaf.requires_grad_()
        self.leaves[id(batch)] = made
        return HeadOutputs(**made)

    @staticmethod
    def proximal(batch: TokenBatch) -> Tensor:
        return -3 * noise(batch, 1.0) - 0.05 + 0.3 * (noise(batch, 7.0) - 0.5)

    @staticmethod
    def reference(batch: TokenBatch) -> Tensor:
        return -3 * noise(batch, 1.0) - 0.05 + 0.8 * (noise(batch, 4.0) - 0.4)


def of_tree(batch: TokenBatch) -> Tensor:
    """f64[S, 3] in (0, 1) that depends on a sequence's tree alone, where no token is scored."""
    return (43758.5453 * torch.sin(37.719 * batch.group_ids.double()[:, None] + torch.arange(3.0))).frac().abs()


def last_tokens(batch: TokenBatch) -> Tensor:
    """i64[S]: the last scored token of each sequence."""
    last = torch.full((batch.sequences,), -1)
    return last.scatter_reduce(0, batch.sequence_ids, torch.arange(batch.labels.numel()), "amax")


def behaviour(batch: TokenBatch) -> TokenBatch:
    """Sampler log-probabilities near the forward's, so that ratios fall inside and outside the clip range."""
    batch.behavior_logps = -3 * noise(batch, 1.0) - 0.05 + 0.6 * (noise(batch, 5.0) - 0.5)
    batch.advantages = batch.advantages.double()
    return batch


def gradient_by_token(batch: TokenBatch, leaves: dict[str, Tensor]) -> dict[tuple[Any, ...], float]:
    """Gradient of each leaf's entry, by what the entry belongs to: tree, token, position."""
    found: dict[tuple[Any, ...], float] = {}
    owner = batch.group_ids[batch.sequence_ids].tolist()
    keys = list(zip(owner, batch.labels.tolist(), batch.position_ids[batch.predict_at].tolist(), strict=True))
    for name, leaf in leaves.items():
        if leaf.grad is None:
            continue
        rows = (
            keys if name != "scores" else [keys[at] for at in last_tokens(batch)] if keys else batch.group_ids.tolist()
        )
        grad = leaf.grad.reshape(len(rows), -1)
        grad = grad * torch.arange(1.0, 1 + grad.shape[1])  # a softmax's own gradients add up to 0
        for key, value in zip(rows, grad.sum(1).tolist(), strict=True):
            found[(name, key)] = found.get((name, key), 0.0) + value
    return found


def run(name: str, options: dict[str, Any], trees: Sequence[Tree], max_tokens: int) -> tuple[float, Any, Any, int]:
    """Loss, gradients by token, metrics and number of microbatches of one update, computed as the trainer does."""
    loss = configure(name, options)
    trees = [mark_nll(tree, loss.needs.nll) for tree in trees]
    if loss.needs.margin:
        trees = [replace(tree, columns={**tree.columns, "margin": 0.4 * (tree.id % 4) - 0.5}) for tree in trees]
    counts, sums, forward = global_counts(trees), MetricSums(), Forward()
    together = loss.needs.record == "pair"

    def packed(what: Sequence[Tree]) -> list[TokenBatch]:
        return [behaviour(collate(part)) for part in plan_microbatches(what, max_tokens, keep_together=together)]

    def outputs(batch: TokenBatch) -> HeadOutputs:
        made = forward(batch)
        unasked = {key: None for key in ("entropy", "log_sum_sq", "scores") if key not in loss.needs.head}
        return replace(made, **unasked)

    stats = {}
    if loss.needs.scope == "batch":
        seen = loss.seen_before(trees)
        reference = forward.reference if loss.needs.reference else lambda batch: None
        stats = loss.batch_stats(run_prepass([(batch, True) for batch in packed(seen)], outputs, reference))
    total, gradients = 0.0, dict[tuple[Any, ...], float]()
    batches = packed(trees)
    for batch in batches:
        made = outputs(batch)
        inputs = LossInputs(
            made,
            batch,
            counts,
            reference_logps=forward.reference(batch) if loss.needs.reference else None,
            proximal_logps=forward.proximal(batch) if loss.needs.ratio == "proximal" else None,
            batch_stats=stats,
        )
        result = loss(inputs)
        if result.loss.requires_grad:
            result.loss.backward()
        total += result.loss.item()
        sums.add(result.metrics)
        for key, value in gradient_by_token(batch, forward.leaves[id(batch)]).items():
            gradients[key] = gradients.get(key, 0.0) + value
    return total, gradients, sums.result(), len(batches)


def episode(branch: Segment) -> Segment:
    """The branch as an episode's: every third token from the second on is an environment's."""
    added = np.arange(len(branch)) % 3 == 1
    versions = np.where(added, -1, 0).astype(np.int32)
    return replace(branch, loss_mask=branch.loss_mask & ~added, versions=versions)


def test_echo_is_the_mean_likelihood_of_what_an_environment_added_and_leaves_grpo_as_it_is() -> None:
    rng = np.random.default_rng(6)
    trees = [MAKE["group"](rng, 3 * i + 1) for i in range(4)]
    trees = [replace(tree, branches=tuple(map(episode, tree.branches))) for tree in trees]
    lost = replace(trees[0].branches[0], loss_mask=np.zeros(len(trees[0].branches[0]), bool))
    trees[0] = replace(trees[0], branches=(lost, *trees[0].branches[1:]))
    loss, gradient, metrics, _ = run("echo", {}, trees, 10_000)
    marked = [mark_nll(tree, "observed") for tree in trees]
    batch = collate(marked)
    own = Forward()(batch).logps.detach()[batch.nll_mask]
    count = sum(int((np.asarray(b.versions) < 0).sum()) for tree in trees for b in tree.branches)
    assert len(own) == count == global_counts(marked).nll_tokens > 20
    assert loss == pytest.approx(-own.mean().item()) == metrics["loss/observed"]
    pulled = {key for key, value in gradient.items() if value}
    assert len(pulled) == count and all(gradient[key] == pytest.approx(-1 / count) for key in pulled)
    together = run("grpo", {}, marked, 10_000)
    assert together[0] == pytest.approx(run("grpo", {}, trees, 10_000)[0]), "tokens that are only observed have no part"
    sampled_late = replace(lost, versions=np.where(np.arange(len(lost)) < 1, -1, lost.versions))
    long = Segment(np.arange(12), np.zeros(12, bool), versions=np.array([0, *[-1] * 11], np.int32))
    pictured = replace(long, media=(Medium("image", "k", "", 3, 4, 1),))
    assert np.flatnonzero(observed(long)).tolist() == [*range(1, 12)]
    assert np.flatnonzero(observed(pictured)).tolist() == [1, 2, *range(7, 12)], "no picture is foreseen"
    assert not observed(sampled_late)[0], "what stands before the first sampled token is the prompt's"


@pytest.mark.parametrize("max_tokens", [1, 40])
@pytest.mark.parametrize(("name", "options"), ALL)
def test_any_split_gives_the_same_loss_gradient_and_metrics(
    name: str, options: dict[str, Any], max_tokens: int
) -> None:
    rng = np.random.default_rng(5)
    trees = [MAKE[configure(name, options).needs.record](rng, 3 * i + 1) for i in range(7)]
    if configure(name, options).needs.nll == "observed":
        trees = [replace(tree, branches=tuple(map(episode, tree.branches))) for tree in trees]
    loss, gradient, metrics, one = run(name, options, trees, 10_000)
    split_loss, split_gradient, split_metrics, many = run(name, options, list(reversed(trees)), max_tokens)
    assert one == 1 and many > 1
    assert split_loss == pytest.approx(loss, abs=1e-9)
    assert split_gradient.keys() == gradient.keys()
    assert max(abs(value) for value in gradient.values()) > 1e-4
    assert max(abs(gradient[key] - split_gradient[key]) for key in gradient) < 1e-9
    assert split_metrics == pytest.approx(metrics, rel=1e-6, abs=1e-7)


def test_a_loss_that_divides_by_its_own_microbatch_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    cpo = load("cpo")
    right = cpo.loss

    def local(inputs: LossInputs, config: Any) -> Any:
        batch = inputs.batch
        own = Counts(batch.labels.numel(), int(batch.nll_mask.sum()), batch.sequences, len(batch.pairs))
        return right(replace(inputs, counts=own), config)

    monkeypatch.setattr(cpo, "loss", local)
    with pytest.raises(AssertionError):
        test_any_split_gives_the_same_loss_gradient_and_metrics("cpo", {}, 40)


# ------------------------------------------------------------------------------------------------- completeness


def choices(annotation: Any) -> list[Any]:
    """Every value of the Literals anywhere within a field's annotation."""
    if get_origin(annotation) is Literal:
        return list(get_args(annotation))
    inside = get_args(annotation)[:1] if get_origin(annotation) is Annotated else get_args(annotation)
    return [value for part in inside for value in choices(part)]


@pytest.mark.parametrize("name", names())
def test_every_choice_and_every_option_of_every_loss_has_a_case(name: str) -> None:
    config = load(name).Config
    given = [config(**options) for options in CASES.get(name, [])]
    for key, info in config.model_fields.items():
        values = [getattr(one, key) for one in given]
        flat = {item for value in values for item in (value if isinstance(value, tuple | list) else [value])}
        missing = [choice for choice in choices(info.annotation) if choice not in flat]
        assert not missing, f"{name}.{key}: no case in CASES has {missing}"
        assert any(value != info.default for value in values), f"{name}.{key}: no case in CASES sets it"
