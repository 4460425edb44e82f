"""Our SFT, KTO, ORPO, SimPO and CPO equal TRL's on the same log-probabilities, values and gradients, wherever TRL
follows the papers; where it does not, the test's name says so."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch import Tensor
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer
from trl.experimental.orpo.orpo_trainer import log1mexp as trl_log1mexp
from trl.trainer.kto_trainer import KTOTrainer
from trl.trainer.sft_trainer import SFTTrainer

from align.data.packing import collate, global_counts, mark_nll
from align.losses import configure, kto, orpo
from align.losses.base import LossInputs, LossOutput
from align.protocols.trees import Segment, Tree
from align.types import HeadOutputs, TokenBatch
from tests.parity.stand_in import padded, same, stand_in
from tests.unit.core.trees import conversation, pair, unpaired


def ours(name: str, options: dict[str, Any], trees: list[Tree], logps: Tensor, **more: Any) -> LossOutput:
    loss = configure(name, options)
    trees = [mark_nll(tree, loss.needs.nll) for tree in trees]
    return loss(LossInputs(HeadOutputs(logps), collate(trees), global_counts(trees), **more))


def made(make: Callable[..., Tree], count: int, nll: str = "none") -> tuple[list[Tree], TokenBatch, Tensor]:
    """Random trees, their batch, and log-probabilities f32[N] to differentiate."""
    trees = [make(np.random.default_rng(i), i) for i in range(count)]
    batch = collate([mark_nll(tree, nll) for tree in trees])
    g = torch.Generator().manual_seed(count)
    return trees, batch, (-3 * torch.rand(batch.labels.numel(), generator=g) - 0.01).requires_grad_()


# ------------------------------------------------------------------------------------------------- SFT


@pytest.mark.parametrize("variant", ["nll", "dft"])
def test_sft_equals_trl(variant: str) -> None:
    trees, batch, logps = made(conversation, 4)
    rows, mask = padded(logps, batch.sequence_ids, batch.sequences, 0)
    zeros = torch.zeros_like(rows)
    outputs = SimpleNamespace(log_probs=rows, label_mask=mask.bool(), entropy=zeros, is_top1=zeros.bool())
    trainer = stand_in(
        compute_loss_func=None, label_smoother=None, _total_train_tokens=0, _tp_size=1,
        args=SimpleNamespace(loss_type=variant, average_tokens_across_devices=False),
    )  # fmt: skip
    trainer.accelerator.parallelism_config = None
    theirs = SFTTrainer.compute_loss(trainer, lambda **kwargs: outputs, {"attention_mask": mask})
    same(ours("sft", {"variant": variant}, trees, logps).loss, theirs, logps)


# ------------------------------------------------------------------------------------------------- KTO


def trl_kto(
    batch: TokenBatch, logps: Tensor, reference: Tensor, ratios: list[Tensor], variant: str = "kto", **options: Any
) -> Tensor:
    """TRL's loss of a batch; ratios: of the mismatched pairs, f32[B] per rank (this process is the first)."""
    mine, mask = padded(logps, batch.sequence_ids, batch.sequences, 1)
    theirs, _ = padded(reference, batch.sequence_ids, batch.sequences, 1)
    zeros = torch.zeros_like(mine[:, 1:])

    def model(**kwargs: Any) -> SimpleNamespace:
        return SimpleNamespace(log_probs=mine[:, 1:], entropy=zeros, mean_logits=zeros)

    trainer = stand_in(
        loss_type=variant, calculate_KL=variant == "kto", precompute_ref_logps=True, _total_train_tokens=0, _tp_size=1,
        _compute_kl_logps=lambda model, inputs: ratios[0], **options,
    )  # fmt: skip
    others = [ratio.mean() for ratio in ratios[1:]]
    gathered: list[int] = []

    def gather(value: Tensor) -> Tensor:
        """The first that is gathered is the mean over this rank's mismatched pairs."""
        gathered.append(1)
        return torch.stack([value, *others]) if variant == "kto" and len(gathered) == 1 else value

    trainer.accelerator.gather_for_metrics = gather
    inputs = {
        "input_ids": torch.zeros_like(mask), "attention_mask": mask, "completion_mask": mask,
        "label": batch.columns["sequence/desirable"] > 0.5, "ref_logps": theirs.sum(1),
        "ref_KL_logps": torch.zeros_like(ratios[0]),
    }  # fmt: skip
    return KTOTrainer._compute_loss(trainer, model, inputs, return_outputs=False)


@pytest.mark.parametrize("ratios", [[0.9, -0.2, 0.4], [-0.9, 0.2, -0.4]], ids=["z above 0", "z clamped at 0"])
@pytest.mark.parametrize("variant", ["kto", "apo_zero_unpaired"])
def test_kto_equals_trl_where_one_rank_has_the_whole_batch(variant: str, ratios: list[float]) -> None:
    trees, batch, logps = made(unpaired, 6)
    reference = logps.detach() + 0.3 * torch.randn(logps.shape, generator=torch.Generator().manual_seed(0))
    weights = {"beta": 0.3, "desirable_weight": 1.4, "undesirable_weight": 0.6}
    stats = {"z": torch.tensor(ratios).mean().clamp(min=0)}
    mine = ours("kto", {**weights, "variant": variant}, trees, logps, reference_logps=reference, batch_stats=stats)
    same(mine.loss, trl_kto(batch, logps, reference, [torch.tensor(ratios)], variant, **weights), logps)


def test_trl_averages_ktos_reference_point_over_uneven_ranks_and_ours_over_all_mismatched_pairs() -> None:
    _, batch, logps = made(unpaired, 4)
    reference = logps.detach().clone()
    ranks = [torch.tensor([1.0, 1.0, 1.0]), torch.tensor([0.2])]
    weights = {"beta": 1.0, "desirable_weight": 1.0, "undesirable_weight": 0.0}
    # rho is 0 everywhere, half of the rows are desirable: the loss is s(z) / 2
    share = 2 * trl_kto(batch, logps, reference, ranks, **weights).item()
    z_of_trl = math.log(share / (1 - share))
    assert z_of_trl == pytest.approx(0.6, abs=1e-4), "TRL weighs ranks by their pairs now: expect equality"
    every = torch.cat(ranks)
    found = kto.Prepass(torch.arange(4), every, every, torch.ones(4))
    assert kto.batch_stats(found, kto.Config())["z"].item() == pytest.approx(0.8)


def trl_mismatches(prompts: list[int], completions: list[int], batch_size: int) -> list[tuple[int, int]]:
    """TRL's own data preparation: (prompt, completion) of the pairs its reference point is estimated from."""
    rows = {"prompt": [str(p) for p in prompts], "completion": [str(c) for c in completions], "label": [True, False]}
    rows["label"] = [i % 2 == 0 for i in range(len(prompts))]

    def tokenizer(text: str, **kwargs: Any) -> dict[str, list[int]]:
        return {"input_ids": [int(part) for part in text.split()]}

    dataset = Dataset.from_dict({**rows, "completion": [f" {c}" for c in completions]})
    trainer = SimpleNamespace(
        _tokenizer=SimpleNamespace(eos_token=""), calculate_KL=True, desirable_weight=1.0, undesirable_weight=1.0
    )
    args = SimpleNamespace(dataset_num_proc=None, max_length=None, per_device_train_batch_size=batch_size)
    done = KTOTrainer._prepare_dataset(trainer, dataset, tokenizer, args, "train")
    return [(row["prompt_ids"][0], row["KL_completion_ids"][0]) for row in done]


def rows_of(prompts: list[int], completions: list[int]) -> list[Tree]:
    return [
        Tree(i, Segment(np.array([p]), np.zeros(1, bool)), (Segment(np.array([c]), np.ones(1, bool)),))
        for i, (p, c) in enumerate(zip(prompts, completions, strict=True))
    ]


def our_mismatches(prompts: list[int], completions: list[int]) -> list[tuple[int, int]]:
    made = kto.auxiliary(rows_of(prompts, completions), kto.Config())
    return [(int(tree.trunk.token_ids[0]), int(tree.branches[0].token_ids[0])) for tree in made]


def test_trl_pairs_the_last_row_of_an_epoch_with_itself_and_ours_never_does() -> None:
    prompts, completions = [1, 2, 3, 4, 5], [11, 12, 13, 14, 15]
    theirs = trl_mismatches(prompts, completions, batch_size=2)
    assert theirs[:4] == [(1, 12), (2, 11), (3, 14), (4, 13)]
    assert theirs[4] == (5, 15), "TRL no longer pairs the last row with itself: this difference can go from the tests"
    assert all(c - p != 10 for p, c in our_mismatches(prompts, completions))


def test_trl_pairs_a_repeated_prompt_with_its_own_completions_and_ours_never_does() -> None:
    prompts, completions = [1, 1, 2, 2], [11, 12, 23, 24]
    assert (1, 11) in trl_mismatches(prompts, completions, batch_size=4)
    assert all(c // 10 != p for p, c in our_mismatches(prompts, completions))


# ------------------------------------------------------------------------------------------------- ORPO, SimPO, CPO


def two_token_logits(logps: Tensor) -> Tensor:
    """[..., 2] whose log-softmax at token 0 is `logps`, so that TRL's own forward gives our log-probabilities."""
    return torch.stack([logps, torch.log(-torch.expm1(logps))], dim=-1)


def trl_pairs(trainer_class: Any, batch: TokenBatch, logps: Tensor, **options: Any) -> Tensor:
    """TRL's loss on pairs through its own concatenated forward. A side's row is a first token, the prompt's scored
    tokens (chosen side only: TRL's likelihood sees no other's) and the completion."""
    prompts = ~batch.loss_mask
    before = [int((prompts & (batch.sequence_ids == c)).sum()) for c in batch.pairs[:, 0].tolist()]
    rows: dict[str, list[Tensor]] = {"values": [], "labels": [], "mask": []}
    for side in (0, 1):
        for pair_number, s in enumerate(batch.pairs[:, side].tolist()):
            values = logps[batch.sequence_ids == s]
            missing = before[pair_number] if side else 0
            values = torch.cat([values.new_full((1 + missing,), -1.0), values])
            labels = torch.zeros(len(values), dtype=torch.long)
            labels[: 1 + before[pair_number]] = -100
            rows["values"].append(values)
            rows["labels"].append(labels)
            rows["mask"].append(torch.ones(len(values), dtype=torch.long))
    pads = {"values": -1.0, "labels": -100, "mask": 0}
    full = {k: torch.nn.utils.rnn.pad_sequence(v, batch_first=True, padding_value=pads[k]) for k, v in rows.items()}
    sides = {k: v.chunk(2) for k, v in full.items()}
    inputs = {}
    for n, name in enumerate(("chosen", "rejected")):
        inputs[f"{name}_labels"] = sides["labels"][n]
        inputs[f"{name}_input_ids"] = torch.zeros_like(sides["labels"][n])
        inputs[f"{name}_attention_mask"] = sides["mask"][n]
    values = torch.cat([full["values"][:, 1:], full["values"][:, :1]], dim=1)  # position t predicts token t + 1
    logits = two_token_logits(values)
    trainer = stand_in(is_encoder_decoder=False, padding_value=0, pad_token_id=0, **options)
    for method in ("concatenated_inputs", "get_batch_logps"):
        setattr(trainer, method, getattr(trainer_class, method))
    for method in ("cpo_loss", "odds_ratio_loss", "concatenated_forward"):
        if hasattr(trainer_class, method):
            setattr(trainer, method, getattr(trainer_class, method).__get__(trainer))
    loss, _ = trainer_class.get_batch_loss_metrics(trainer, lambda *a, **k: SimpleNamespace(logits=logits), inputs)
    return loss


@pytest.mark.parametrize("lambda_", [0.1, 1.0])
def test_orpo_equals_trl_whose_likelihood_also_covers_prompt_and_response(lambda_: float) -> None:
    trees, batch, logps = made(pair, 4, nll="prompt_and_chosen")
    mine = ours("orpo", {"lambda": lambda_}, trees, logps).loss
    same(mine, trl_pairs(ORPOTrainer, batch, logps, beta=lambda_), logps)


def test_trl_has_no_response_only_likelihood_in_orpo_and_ours_has() -> None:
    trees, batch, logps = made(pair, 4, nll="prompt_and_chosen")
    whole = trl_pairs(ORPOTrainer, batch, logps, beta=0.1)
    scored = batch.loss_mask
    without = logps.detach()[scored]
    mine = ours("orpo", {"nll": "response"}, trees, without).loss
    nll = -logps.detach()[batch.nll_mask].mean()
    response = -logps.detach()[batch.nll_mask & scored].mean()
    assert abs(nll - response) > 1e-3
    torch.testing.assert_close(mine, whole.detach() - nll + response, atol=1e-5, rtol=1e-5)


def test_trls_log1mexp_gives_nan_gradients_at_probability_one_and_ours_is_finite() -> None:
    for value in (0.0, -1e-12):
        gradients = []
        for function in (orpo.log1mexp, trl_log1mexp):
            x = torch.tensor([value], requires_grad=True)
            gradients.append(torch.autograd.grad(function(x).sum(), x)[0])
        assert bool(gradients[0].isfinite().all())
        assert value < 0 or not bool(gradients[1].isfinite().all()), "TRL's log1mexp is finite now"
    x = -torch.logspace(-3, 2, 50, dtype=torch.float64)
    torch.testing.assert_close(orpo.log1mexp(x), trl_log1mexp(x), atol=1e-12, rtol=1e-9)


def test_trls_orpo_is_not_finite_for_a_completion_of_probability_one_and_ours_is() -> None:
    trees, batch, logps = made(pair, 1, nll="prompt_and_chosen")
    sure = logps.detach().clone()
    sure[batch.loss_mask & (batch.sequence_ids == 0)] = 0.0
    sure.requires_grad_()
    mine = ours("orpo", {}, trees, sure).loss
    assert bool(torch.autograd.grad(mine, sure)[0].isfinite().all())
    trainer = stand_in(beta=0.1)
    chosen, rejected = sure[batch.loss_mask & (batch.sequence_ids == 0)].mean(), sure[batch.sequence_ids == 1].mean()
    theirs = -ORPOTrainer.odds_ratio_loss(trainer, chosen[None], rejected[None])[0].mean()
    gradient = torch.autograd.grad(theirs, sure)[0]
    assert not bool(gradient.isfinite().all()), "TRL's ORPO is finite now: this difference can go from the tests"


SIMPO = [
    {"beta": 2.0, "gamma": 0.5},
    {"beta": 2.5, "gamma": 1.4, "label_smoothing": 0.1},
    {"beta": 1.5, "gamma": 0.3, "nll_weight": 0.7},
    {"beta": 1.5, "gamma": 0.3, "alpha": 0.25, "nll_weight": 1.0},
    {"beta": 1.5, "gamma": 0.3, "alpha": -0.4},
]


@pytest.mark.parametrize("options", SIMPO)
def test_simpo_equals_trl_whose_gamma_is_the_margin_too(options: dict[str, Any]) -> None:
    trees, batch, logps = made(pair, 4)
    theirs = trl_pairs(
        CPOTrainer, batch, logps, loss_type="simpo", beta=options["beta"], simpo_gamma=options["gamma"],
        label_smoothing=options.get("label_smoothing", 0.0), alpha=options.get("alpha", 0.0),
        cpo_alpha=options.get("nll_weight", 0.0),
    )  # fmt: skip
    same(ours("simpo", options, trees, logps).loss, theirs, logps)


CPO = [
    {"beta": 0.1},
    {"beta": 0.3, "label_smoothing": 0.2, "nll_weight": 0.5},
    {"beta": 0.05, "variant": "hinge", "nll_weight": 0.0},
    {"beta": 0.4, "variant": "ipo"},
]


@pytest.mark.parametrize("options", CPO)
def test_cpo_equals_trl(options: dict[str, Any]) -> None:
    trees, batch, logps = made(pair, 4)
    theirs = trl_pairs(
        CPOTrainer, batch, logps, loss_type=options.get("variant", "sigmoid"), beta=options["beta"], alpha=0.0,
        label_smoothing=options.get("label_smoothing", 0.0), cpo_alpha=options.get("nll_weight", 1.0),
    )  # fmt: skip
    same(ours("cpo", options, trees, logps).loss, theirs, logps)


def test_trls_alphapo_is_nan_where_a_mean_probability_underflows_and_ours_is_finite() -> None:
    trees, _, logps = made(pair, 1)
    improbable = torch.full_like(logps, -1000.0).requires_grad_()
    mine = ours("simpo", {"alpha": 0.25}, trees, improbable)
    assert math.isfinite(mine.loss.item())
    assert bool(torch.autograd.grad(mine.loss, improbable)[0].isfinite().all())
    assert mine.metrics["rewards/clamped"].sum == 1.0
    trainer = stand_in(alpha=0.25, loss_type="simpo", simpo_gamma=0.5, beta=2.0, label_smoothing=0.0)
    side = torch.tensor([-1000.0])
    theirs = CPOTrainer.cpo_loss(trainer, side, side)[0]
    assert not bool(theirs.isfinite().all()), "TRL's AlphaPO is finite now: this difference can go from the tests"
