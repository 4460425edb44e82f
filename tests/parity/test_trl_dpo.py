"""Our DPO equals TRL's on the same log-probabilities, values and gradients, wherever TRL follows the papers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from trl.trainer.dpo_trainer import DPOTrainer

from align.data.packing import collate, global_counts, mark_nll
from align.losses import configure
from align.losses.base import LossInputs
from align.protocols.trees import Segment, Tree
from align.train.prepass import run_prepass
from align.types import HeadOutputs
from tests.parity.stand_in import padded, same, stand_in
from tests.unit.core.trees import pair

DIFFERENCE = ("sigmoid", "sigmoid_norm", "hinge", "ipo", "robust", "exo_pair", "discopop")
SIDES = ("nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down")
RANKS = ("aot", "aot_unpaired")
THEIRS = {  # our word -> TRL's
    "ld_alpha": lambda value: {"ld_alpha": value},
    "weighting": lambda value: {"use_weighting": value == "wpo"},
    "divergence": lambda value: {
        "f_divergence_type": {"js": "js_divergence", "alpha": "alpha_divergence"}.get(value, value)
    },
    "divergence_alpha": lambda value: {"f_alpha_divergence_coef": 1 - value},
    "discopop_tau": lambda value: {"args": SimpleNamespace(discopop_tau=value, gradient_checkpointing_kwargs=None)},
    "label_smoothing": lambda value: {"label_smoothing": value},
    "beta": lambda value: {"beta": value},
}


def trl_dpo(
    trees: list[Tree],
    logps: Tensor,
    reference: Tensor,
    variant: str | dict[str, float],
    log_sum_sq: Tensor | None = None,
    front: int = 1,
    **options: Any,
) -> Tensor:
    """TRL's loss; options are ours. variant: of one loss, or TRL's weight of each. front: prompt tokens of a row; with
    0 the first token is an unscored one of the completion."""
    batch = collate(trees)
    order = torch.cat([batch.pairs[:, 0], batch.pairs[:, 1]])  # TRL wants all chosen, then all rejected
    likely = torch.zeros_like(logps) if log_sum_sq is None else log_sum_sq
    rows = [padded(x, batch.sequence_ids, batch.sequences, 1) for x in (logps, reference, likely)]
    mask = rows[0][1][order]
    if not front:
        mask[:, 0] = 1

    def model(row: int) -> Any:
        def forward(**kwargs: Any) -> SimpleNamespace:
            values = rows[row][0][order][:, 1:]
            zeros = torch.zeros_like(values)
            return SimpleNamespace(
                log_probs=values, log_sum_sq_probs=rows[2][0][order][:, 1:],
                entropy=zeros, mean_logits=zeros, is_top1=zeros.bool(),
            )  # fmt: skip

        return forward

    weights = variant if isinstance(variant, dict) else {variant: 1.0}
    settings: dict[str, Any] = {
        "beta": 0.1, "label_smoothing": 0.0, "ld_alpha": None, "use_weighting": False,
        "f_divergence_type": "reverse_kl", "f_alpha_divergence_coef": 0.5,
    } | THEIRS["discopop_tau"](0.05)  # fmt: skip
    for key, value in options.items():
        settings |= THEIRS[key](value)
    trainer = stand_in(
        precompute_ref_logps=False, loss_types=list(weights), loss_weights=list(weights.values()),
        ref_model=model(1), _total_train_tokens=0, **settings,
    )  # fmt: skip
    trainer.model = torch.nn.Identity().eval()  # what TRL asks about adapters and checkpointing
    trainer.model.is_gradient_checkpointing = False
    inputs = {"input_ids": torch.zeros_like(mask), "attention_mask": mask, "completion_mask": mask}
    loss: Tensor = DPOTrainer._compute_loss(trainer, model(0), inputs, return_outputs=False)
    return loss


def ours(
    trees: list[Tree], logps: Tensor, reference: Tensor, name: str = "dpo", likely: Tensor | None = None, **options: Any
) -> Tensor:
    """Our loss of one batch, with the pre-pass where one is needed."""
    chosen = configure(name, options)
    trees = [mark_nll(tree, "chosen") for tree in trees]
    batch, outputs = collate(trees), HeadOutputs(logps, log_sum_sq=likely)
    stats = {}
    if chosen.needs.scope == "batch":
        stats = chosen.batch_stats(run_prepass([(batch, True)], lambda b: outputs, lambda b: reference))
    loss: Tensor = chosen(LossInputs(outputs, batch, global_counts(trees), reference, batch_stats=stats)).loss
    return loss


def some_pairs(n: int = 5) -> list[Tree]:
    return [pair(np.random.default_rng(i), i) for i in range(n)]


def tensors(trees: list[Tree], apart: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """logps with gradient, reference, log_sum_sq: f32[N]; the first two `apart` nats a token."""
    torch.manual_seed(0)
    n = collate(trees).labels.numel()
    logps = -3 * torch.rand(n)
    reference = logps + apart * (2 * torch.rand(n) - 1)
    return logps.requires_grad_(), reference, -2 * torch.rand(n)


CASES: list[dict[str, Any]] = [
    *({"variant": name} for name in (*DIFFERENCE[:5], *DIFFERENCE[6:], *SIDES, *RANKS)),
    *({"variant": name, "label_smoothing": 0.15} for name in ("robust", "exo_pair", *RANKS)),
    {"variant": "exo_pair", "label_smoothing": 1e-3},
    {"variant": "discopop", "discopop_tau": 0.5},
    *({"variant": name, "ld_alpha": alpha} for name in (*DIFFERENCE, *SIDES) for alpha in (0.0, 0.4)),
    *({"variant": name, "weighting": "wpo"} for name in (*DIFFERENCE, *SIDES) if name != "hinge"),
    *({"variant": name, "divergence": kind} for name in DIFFERENCE for kind in ("forward_kl", "js", "alpha")),
    {"divergence": "alpha", "divergence_alpha": 0.2},
    {"divergence": "alpha", "divergence_alpha": 0.9, "weighting": "wpo", "ld_alpha": 0.5},
]
for _case in CASES:  # TRL's exo_pair has no default that is finite
    if _case.get("variant") == "exo_pair":
        _case.setdefault("label_smoothing", 0.1)


@pytest.mark.parametrize("options", CASES, ids=lambda options: "-".join(map(str, options.values())))
def test_dpo_equals_trl(options: dict[str, Any]) -> None:
    """On one batch, where TRL's sorting sees what ours does."""
    variant = options.get("variant", "sigmoid")
    trees = some_pairs()
    logps, reference, likely = tensors(trees, 3.0 if variant in RANKS else 1.0)
    others = {key: value for key, value in options.items() if key != "variant"}
    mine = ours(trees, logps, reference, likely=likely, beta=0.2, **options)
    same(mine, trl_dpo(trees, logps, reference, variant, likely, beta=0.2, **others), logps)


def test_a_list_of_losses_over_one_forward_equals_trls_loss_types_and_weights() -> None:
    """MPO (2411.10442): sigmoid 0.8, bco_pair 0.2, sft 1."""
    trees = some_pairs()
    logps, reference, _ = tensors(trees)
    terms = [("dpo", 0.8, {"beta": 0.2}), ("dpo", 0.2, {"beta": 0.2, "variant": "bco_pair"}), ("sft", 1.0, {})]
    assert {configure(name, options).needs.nll for name, _, options in terms} == {"none", "chosen"}
    mine = torch.stack(
        [weight * ours(trees, logps, reference, name, **options) for name, weight, options in terms]
    ).sum()
    same(mine, trl_dpo(trees, logps, reference, {"sigmoid": 0.8, "bco_pair": 0.2, "sft": 1.0}, beta=0.2), logps)


# ------------------------------------------------------------------------------------------------- where TRL differs


def test_trl_ignores_label_smoothing_in_its_sigmoid_loss_and_ours_does_not() -> None:
    trees = some_pairs(3)
    logps, reference, _ = tensors(trees)
    plain, smoothed = (trl_dpo(trees, logps, reference, "sigmoid", label_smoothing=eps) for eps in (0.0, 0.2))
    assert plain == smoothed, "TRL has learnt label smoothing: this difference can go from the tests"
    assert abs(ours(trees, logps, reference, label_smoothing=0.2) - smoothed) > 1e-4


def test_trls_exo_pair_is_infinite_with_its_default_smoothing_and_ours_has_the_papers() -> None:
    trees = some_pairs(3)
    logps, reference, _ = tensors(trees)
    assert trl_dpo(trees, logps, reference, "exo_pair").isinf()
    mine = ours(trees, logps, reference, variant="exo_pair")
    same(mine, trl_dpo(trees, logps, reference, "exo_pair", label_smoothing=1e-3), logps)


@pytest.mark.parametrize("variant", ["ipo", "sigmoid_norm"])
def test_trl_counts_an_unscored_first_token_in_the_lengths_of_its_means_and_ours_does_not(variant: str) -> None:
    """A completion without a prompt: nothing predicts its first token, but TRL's lengths are of the unshifted mask."""

    def branch(n: int) -> Segment:
        return Segment(np.arange(n), np.arange(n) > 0)

    nothing = Segment(np.zeros(0, dtype=np.int64), np.zeros(0, dtype=bool))
    trees = [Tree(i, nothing, (branch(3 + i), branch(6 - i))) for i in range(3)]
    logps, reference, _ = tensors(trees)
    mine = ours(trees, logps, reference, variant=variant)
    same(mine, trl_dpo(trees, logps, reference, variant, front=1), logps)
    assert abs(mine - trl_dpo(trees, logps, reference, variant, front=0)) > 1e-4


def test_trls_discopop_is_nan_where_a_margin_is_far_below_zero_and_ours_is_finite() -> None:
    trees = some_pairs(1)
    logps, _, _ = tensors(trees)
    batch = collate(trees)
    reference = logps.detach() + torch.where(batch.sequence_ids == 0, 60.0, -60.0)
    theirs = trl_dpo(trees, logps, reference, "discopop", beta=1.0)
    assert not theirs.isfinite(), "TRL's discopop no longer overflows"
    mine = ours(trees, logps, reference, variant="discopop", beta=1.0)
    lengths = [len(branch) for branch in trees[0].branches]
    assert mine.item() == pytest.approx(60.0 * sum(lengths), rel=1e-5)
    assert torch.autograd.grad(mine, logps)[0].isfinite().all()


def test_trls_forward_kl_overflows_far_from_the_reference_and_ours_is_finite() -> None:
    trees = some_pairs(1)
    logps, _, _ = tensors(trees)
    reference = logps.detach() + 60.0
    theirs = trl_dpo(trees, logps, reference, "sigmoid", divergence="forward_kl")
    assert not theirs.isfinite(), "TRL's forward_kl no longer overflows"
    mine = ours(trees, logps, reference, divergence="forward_kl")
    assert mine.isfinite() and torch.autograd.grad(mine, logps)[0].isfinite().all()


@pytest.mark.parametrize("variant", RANKS)
def test_trls_aot_sorts_each_microbatch_alone_and_ours_the_whole_update(variant: str) -> None:
    trees = some_pairs(6)
    logps, reference, _ = tensors(trees, 3.0)
    first = collate(trees[:3]).labels.numel()
    halves = [
        trl_dpo(part, logps[cut], reference[cut], variant)
        for part, cut in ((trees[:3], slice(first)), (trees[3:], slice(first, None)))
    ]
    mine = ours(trees, logps, reference, variant=variant)
    same(mine, trl_dpo(trees, logps, reference, variant), logps)
    assert abs(mine - (halves[0] + halves[1]) / 2) > 1e-3


@pytest.mark.parametrize("variant", RANKS)
def test_trl_gives_a_pairs_wpo_weight_to_another_pairs_aot_term_and_we_refuse(variant: str) -> None:
    """Weights stand in order of rows, sorted terms do not: TRL's loss depends on the order of the rows."""
    trees = some_pairs(4)
    logps, reference, likely = tensors(trees, 3.0)
    turned = [tensor.split([collate([t]).labels.numel() for t in trees])[::-1] for tensor in (logps, reference, likely)]
    again = trl_dpo(trees[::-1], *map(torch.cat, turned[:2]), variant, torch.cat(turned[2]), weighting="wpo")
    assert abs(trl_dpo(trees, logps, reference, variant, likely, weighting="wpo") - again) > 1e-4
    with pytest.raises(Exception, match="different pairs"):
        configure("dpo", {"variant": variant, "weighting": "wpo"})


def test_trls_wpo_fails_beside_an_sft_term_and_ours_weighs_the_preference_alone() -> None:
    """TRL multiplies in place what it has only expanded for sft."""
    trees = some_pairs(3)
    logps, reference, likely = tensors(trees)
    with pytest.raises(RuntimeError, match="written-to tensor"):
        trl_dpo(trees, logps, reference, {"sigmoid": 1.0, "sft": 1.0}, likely, weighting="wpo")
    sft = trl_dpo(trees, logps, reference, "sft")
    mine = ours(trees, logps, reference, likely=likely, weighting="wpo") + ours(trees, logps, reference, "sft")
    same(mine, trl_dpo(trees, logps, reference, "sigmoid", likely, weighting="wpo") + sft, logps)


def test_trls_wpo_cannot_differentiate_its_hinge_and_ours_can() -> None:
    """TRL multiplies in place what relu keeps for its backward."""
    trees = some_pairs()
    logps, reference, likely = tensors(trees)
    mine = ours(trees, logps, reference, likely=likely, variant="hinge", weighting="wpo")
    theirs = trl_dpo(trees, logps, reference, "hinge", likely, weighting="wpo")
    assert mine.item() == pytest.approx(theirs.item(), rel=1e-5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(theirs, logps)
    assert torch.autograd.grad(mine, logps)[0].abs().max() > 0
