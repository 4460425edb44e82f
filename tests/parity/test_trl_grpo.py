"""Our GRPO equals TRL's on the same log-probabilities, values and gradients, wherever TRL follows the papers; where it
goes another way the test's name says which."""

from __future__ import annotations

import inspect
import math
import textwrap
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer

from align.data.packing import collate, global_counts
from align.losses import configure
from align.losses.base import LossInputs, LossOutput, Prepass
from align.losses.grpo import Config
from align.protocols.trees import Tree
from align.recipe.peers import translate
from align.recipe.stages import OnlineStage
from align.types import HeadOutputs, TokenBatch
from tests.parity.stand_in import padded, same, stand_in
from tests.unit.core.trees import group

# TRL's loss_type and importance_sampling_level -> our options
TYPES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "grpo": ("grpo", "token", {"aggregation": "sequence"}),
    "dapo": ("dapo", "token", {"aggregation": "token"}),
    "dr_grpo": ("dr_grpo", "token", {"aggregation": "constant", "constant_length": 16}),
    "gspo": ("grpo", "sequence", {"aggregation": "sequence", "ratio": "sequence"}),
    "luspo": ("luspo", "sequence", {"aggregation": "sequence_sum", "ratio": "sequence"}),
    "cispo": ("cispo", "token", {"surrogate": "cispo", "aggregation": "token"}),
    "sapo": ("sapo", "token", {"surrogate": "sapo", "aggregation": "sequence"}),
    "vespo": ("vespo", "token", {"surrogate": "vespo", "aggregation": "token"}),
}
# our options beside them -> TRL's
TERMS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "alone": ({}, {}),
    "kl": ({"kl": 0.3}, {"beta": 0.3}),
    "off-policy": ({"off_policy_threshold": 0.02}, {"off_policy_mask_threshold": 0.02}),
    "top-entropy": ({"top_entropy": 0.23}, {"top_entropy_quantile": 0.23}),
    "all": (
        {"kl": 0.3, "off_policy_threshold": 0.02, "top_entropy": 0.23},
        {"beta": 0.3, "off_policy_mask_threshold": 0.02, "top_entropy_quantile": 0.23},
    ),
}
BOUNDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "clip": ({"clip_low": 0.1, "clip_high": 0.15}, {"epsilon_low": 0.1, "epsilon_high": 0.15}),
    "cispo": ({"cispo_cap": 1.1}, {"epsilon_high": 1.1}),
    "sapo": ({}, {}),  # TRL's default temperatures are ours
    "vespo": ({}, {}),  # and its shapes of phi
}
# but for the gradient of a sequence's ratio under chosen tokens: its own test below
EQUAL = [(n, t) for n in TYPES for t in TERMS if TYPES[n][1] == "token" or "top_entropy" not in TERMS[t][0]]


@dataclass
class Case:
    """Groups with advantages, and tensors f32[N] over their scored tokens."""

    trees: list[Tree]
    batch: TokenBatch
    logps: torch.Tensor
    reference: torch.Tensor
    entropy: torch.Tensor
    proximal: torch.Tensor | None = None

    @staticmethod
    def make(seed: int = 1) -> Case:
        trees = [group(np.random.default_rng(i + 10 * seed), i) for i in range(3)]
        batch = collate(trees)
        g = torch.Generator().manual_seed(seed)
        n = batch.labels.numel()
        logps = (batch.behavior_logps + 0.2 * torch.randn(n, generator=g)).requires_grad_()
        reference = logps.detach() + 0.3 * torch.randn(n, generator=g)
        return Case(trees, batch, logps, reference, torch.rand(n, generator=g).requires_grad_())


def ours(case: Case, **options: Any) -> LossOutput:
    """Uncorrected where `options` ask for no correction, as `trls` is."""
    loss = configure("grpo", {"correction": "off", **options})
    stats = {}
    if loss.needs.scope == "batch":
        nothing = torch.zeros(0)
        found = Prepass(nothing, nothing, nothing, nothing, case.entropy.detach()[case.batch.loss_mask])
        stats = loss.batch_stats(found)
    inputs = LossInputs(
        HeadOutputs(case.logps, entropy=case.entropy),
        case.batch,
        global_counts(case.trees),
        reference_logps=case.reference if loss.config.kl else None,
        proximal_logps=case.proximal,
        batch_stats=stats,
    )
    return loss(inputs)


def trls(case: Case, loss_type: str, level: str = "token", **settings: Any) -> tuple[torch.Tensor, dict[str, float]]:
    """TRL's loss of one batch, and its metrics."""
    batch, owner, s = case.batch, case.batch.sequence_ids, case.batch.sequences
    new, mask = padded(case.logps, owner, s, 0)
    sampler, _ = padded(batch.behavior_logps, owner, s, 0)
    old = sampler if case.proximal is None else padded(case.proximal, owner, s, 0)[0]
    entropy, _ = padded(case.entropy, owner, s, 0)
    args = {"delta": None, "use_bias_correction_kl": False}
    args |= {name: settings.pop(name) for name in list(settings) if name in args}
    args |= {f"{name}_{sign}": GRPOConfig.__dataclass_fields__[f"{name}_{sign}"].default
             for name in ("sapo_temperature", "vespo_k", "vespo_lambda") for sign in ("pos", "neg")}  # fmt: skip
    attributes = {
        "top_entropy_quantile": 1.0, "off_policy_mask_threshold": None, "beta": 0.0, "entropy_coef": 0.0,
        "epsilon_low": 0.2, "epsilon_high": 0.2, **settings,
    }  # fmt: skip
    weights = attributes.pop("weights", None)  # importance_sampling_ratio, as TRL computes it when it has generated
    trainer = stand_in(
        _get_per_token_logps_and_entropies=lambda *a, **k: (new, entropy, None),
        get_off_policy_mask=GRPOTrainer.get_off_policy_mask, vllm_importance_sampling_correction=weights is not None,
        importance_sampling_level=level, loss_type=loss_type, use_vllm=weights is not None, use_adaptive_entropy=False,
        _entropy_bonus_enabled=attributes["entropy_coef"] != 0, max_completion_length=16,
        args=SimpleNamespace(**args), **attributes,
    )  # fmt: skip
    trainer.accelerator.pad_across_processes = lambda tensor, dim, pad_index: tensor
    trainer.get_gamma_weights = GRPOTrainer.get_gamma_weights
    trainer.get_high_entropy_mask = lambda *a: GRPOTrainer.get_high_entropy_mask(trainer, *a)
    inputs = {
        "prompt_ids": torch.zeros(s, 2, dtype=torch.long), "prompt_mask": torch.ones(s, 2, dtype=torch.long),
        "completion_ids": torch.zeros_like(mask), "completion_mask": mask, "old_per_token_logps": old,
        "sampling_per_token_logps": sampler, "num_items_in_batch": mask.sum(),
        "advantages": torch.stack([batch.advantages[owner == k].sum() / max(int((owner == k).sum()), 1)
                                   for k in range(s)]),
        "ref_per_token_logps": padded(case.reference, owner, s, 0)[0], "importance_sampling_ratio": weights,
    }  # fmt: skip
    loss = GRPOTrainer._compute_loss(trainer, None, inputs)
    return loss, {name: values[-1] for name, values in trainer._metrics["eval"].items()}


@pytest.mark.parametrize("proximal", [False, True], ids=["sampler", "proximal"])
@pytest.mark.parametrize(("name", "terms"), EQUAL)
def test_grpo_equals_trl(name: str, terms: str, proximal: bool) -> None:
    loss_type, level, options = TYPES[name]
    case = Case.make()
    trls_case = case
    if proximal:  # vespo's ratio is to the sampler, whatever it was at the start of the batch
        case = replace(case, proximal=case.logps.detach() + 0.2 * torch.randn_like(case.logps))
    own, peer = BOUNDS[options.get("surrogate", "clip")]
    mine = ours(case, **options, **own, **TERMS[terms][0])
    theirs, _ = trls(trls_case if name == "vespo" else case, loss_type, level, **peer, **TERMS[terms][1])
    same(mine.loss, theirs, case.logps)
    if "off_policy_threshold" in TERMS[terms][0]:
        assert 0 < mine.metrics["policy/off_policy_sequences"].sum < case.batch.sequences


@pytest.mark.parametrize("name", ["grpo", "dapo", "dr_grpo", "gspo", "luspo"])
def test_two_sided_clipping_equals_trls_delta(name: str) -> None:
    loss_type, level, options = TYPES[name]
    case = Case.make(2)
    found = [ours(case, **options, clip_high=0.05, **delta) for delta in ({"clip_delta": 1.1}, {})]
    same(found[0].loss, trls(case, loss_type, level, epsilon_high=0.05, delta=1.1)[0], case.logps)
    assert found[0].loss != found[1].loss, "the bound was met"


def test_the_clip_fractions_are_trls() -> None:
    case = Case.make(3)
    metrics = ours(case, clip_low=0.1, clip_high=0.15, kl=0.3, kl_estimator="w_k3").metrics
    _, theirs = trls(case, "dapo", epsilon_low=0.1, epsilon_high=0.15, beta=0.3, use_bias_correction_kl=True)
    for mine, other in (
        ("policy/clip_fraction", "clip_ratio/region_mean"),
        ("policy/clip_fraction_low", "clip_ratio/low_mean"),
        ("policy/clip_fraction_high", "clip_ratio/high_mean"),
        ("policy/kl", "kl"),
        ("policy/entropy", "entropy"),
    ):
        assert float(metrics[mine].sum / metrics[mine].count) == pytest.approx(theirs[other], rel=1e-5) != 0


@pytest.mark.parametrize("name", ["grpo", "dapo", "dr_grpo", "cispo", "sapo"])
def test_the_importance_weighted_k3_equals_trls_bias_corrected_kl(name: str) -> None:
    loss_type, _, options = TYPES[name]
    case = Case.make(4)
    own, peer = BOUNDS[options.get("surrogate", "clip")]
    mine = ours(case, **options, **own, kl=0.3, kl_estimator="w_k3").loss
    same(mine, trls(case, loss_type, beta=0.3, use_bias_correction_kl=True, **peer)[0], case.logps)


def test_with_a_sequence_ratio_trl_weights_k3_by_the_sequence_and_is_biased() -> None:
    """Ours is the token's own weight whatever the ratio: TRL's policy term plus TRL's KL term at token level."""
    case = Case.make(5)
    _, level, options = TYPES["gspo"]
    mine = ours(case, **options, kl=0.3, kl_estimator="w_k3").loss
    kl = {"beta": 0.3, "use_bias_correction_kl": True}
    policy, _ = trls(case, "grpo", level)
    token = trls(case, "grpo", **kl)[0] - trls(case, "grpo")[0]
    same(mine, policy + token, case.logps)
    theirs, _ = trls(case, "grpo", level, **kl)
    assert (mine - theirs).detach().abs() > 1e-4


def test_the_entropy_bonus_equals_trls_under_token_aggregation() -> None:
    case = Case.make(6)
    for name in ("dapo", "cispo"):
        loss_type, level, options = TYPES[name]
        own, peer = BOUNDS[options.get("surrogate", "clip")]
        mine, theirs = (
            ours(case, **options, **own, entropy_bonus=0.2).loss,
            trls(case, loss_type, level, **peer, entropy_coef=0.2)[0],
        )
        same(mine, theirs, case.logps)
        same(mine, theirs, case.entropy)


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "gspo", "luspo", "sapo"])
def test_trls_entropy_bonus_is_a_token_mean_whatever_the_aggregation_and_ours_is_aggregated_as_the_surrogate(
    name: str,
) -> None:
    case = Case.make(7)
    loss_type, level, options = TYPES[name]
    own, peer = BOUNDS[options.get("surrogate", "clip")]
    bonus = -0.2 * case.entropy.mean()
    theirs = trls(case, loss_type, level, **peer, entropy_coef=0.2)[0]
    same(theirs - bonus, trls(case, loss_type, level, **peer)[0], case.logps)
    owner, s = case.batch.sequence_ids, case.batch.sequences
    sums = torch.zeros(s).index_add(0, owner, case.entropy)
    lengths = torch.bincount(owner).float()
    aggregated = {"grpo": sums / lengths, "gspo": sums / lengths, "sapo": sums / lengths, "dr_grpo": sums / 16}
    expected = theirs - bonus - 0.2 * aggregated.get(name, sums).mean()
    mine = ours(case, **options, **own, entropy_bonus=0.2).loss
    same(mine, expected, case.logps)
    same(mine, expected, case.entropy)


def test_trls_bonus_on_the_top_entropy_tokens_is_their_own_mean_and_ours_keeps_the_updates_denominator() -> None:
    case = Case.make(8)
    options, settings = {"top_entropy": 0.23}, {"top_entropy_quantile": 0.23}
    kept = ours(case, **options).metrics["policy/top_entropy_tokens"].sum
    n = case.logps.numel()
    assert 0 < kept < n / 3
    mine = ours(case, **options, entropy_bonus=0.2).loss
    theirs = trls(case, "dapo", **settings, entropy_coef=0.2 * float(kept) / n)[0]
    same(mine, theirs, case.logps)
    same(mine, theirs, case.entropy)


@pytest.mark.parametrize("name", ["gspo", "luspo"])
def test_with_a_sequence_ratio_trls_top_entropy_moves_every_token_and_ours_only_the_chosen(name: str) -> None:
    """The values are equal; TRL spreads the gradient of a sequence's mean over all its tokens."""
    loss_type, level, options = TYPES[name]
    case = Case.make(9)
    losses = (
        ours(case, **options, top_entropy=0.23).loss,
        trls(case, loss_type, level, top_entropy_quantile=0.23)[0],
    )
    torch.testing.assert_close(*losses, atol=1e-5, rtol=1e-5)
    mine, theirs = (torch.autograd.grad(loss, case.logps)[0] for loss in losses)
    chosen = case.entropy >= torch.quantile(case.entropy, 1 - 0.23)
    assert not mine[~chosen].any() and mine[chosen].any() and theirs[~chosen].any()
    owner, s = case.batch.sequence_ids, case.batch.sequences
    sums = [torch.zeros(s).index_add(0, owner, g) for g in (mine, theirs)]
    torch.testing.assert_close(*sums, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "gspo", "luspo", "sapo"])
def test_trl_counts_masked_completions_in_the_mean_over_sequences_and_ours_leave_it(name: str) -> None:
    """TRL's mask_truncated_completions leaves a row of zeros, which its mean still divides by."""
    loss_type, level, options = TYPES[name]
    case = Case.make(10)
    own, peer = BOUNDS[options.get("surrogate", "clip")]
    first, *others = case.trees[0].branches
    silent = replace(first, loss_mask=np.zeros(len(first), bool))
    trees = [replace(case.trees[0], branches=(silent, *others)), *case.trees[1:]]
    left = case.batch.sequence_ids != 0
    logps = case.logps.detach()[left].requires_grad_()
    batch = collate(trees)
    assert batch.labels.numel() == logps.numel()
    masked = Case(trees, batch, logps, case.reference[left], case.entropy.detach()[left])
    theirs = trls(masked, loss_type, level, **peer)[0]
    s = batch.sequences
    same(ours(masked, **options, **own).loss, theirs * s / (s - 1), logps)


MODES = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
CORRECTION_BOUNDS = {"cap": (1.15, None), "floor": (None, 0.9), "both": (1.15, 0.9)}


def trls_weights(case: Case, mode: str, cap: float | None, floor: float | None) -> torch.Tensor:
    """TRL's importance_sampling_ratio of this batch: the lines of its `_generate_and_score_completions` that make it,
    run on our tensors."""
    lines = inspect.getsource(GRPOTrainer._generate_and_score_completions).splitlines()
    first = next(n for n, line in enumerate(lines) if line.strip().startswith("mask = completion_mask if tool_mask"))
    last = next(n for n, line in enumerate(lines) if line.strip().startswith("# Compute the per-token log prob"))
    block = textwrap.dedent("\n".join(lines[first:last]))
    assert case.proximal is not None
    owner, s = case.batch.sequence_ids, case.batch.sequences
    old, mask = padded(case.proximal, owner, s, 0)
    names = {
        "torch": torch, "math": math, "tool_mask": None, "completion_mask": mask, "old_per_token_logps": old,
        "sampling_per_token_logps": padded(case.batch.behavior_logps, owner, s, 0)[0],
        "self": SimpleNamespace(
            vllm_importance_sampling_mode=mode, vllm_importance_sampling_clip_max=cap,
            vllm_importance_sampling_clip_min=floor,
        ),
    }  # fmt: skip
    exec(block, names)
    weights: torch.Tensor = names["vllm_importance_sampling_ratio"]  # type: ignore[assignment]
    return weights


def corrected_case(seed: int) -> Case:
    case = Case.make(seed)
    g = torch.Generator().manual_seed(seed)
    return replace(case, proximal=case.batch.behavior_logps + 0.2 * torch.randn(case.logps.shape, generator=g))


@pytest.mark.parametrize("bounds", CORRECTION_BOUNDS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", [name for name in TYPES if name != "vespo"])  # it corrects nothing
def test_the_correction_equals_trls_vllm_importance_sampling(name: str, mode: str, bounds: str) -> None:
    loss_type, level, options = TYPES[name]
    own, peer = BOUNDS[options.get("surrogate", "clip")]
    (cap, floor), (corrected, how) = CORRECTION_BOUNDS[bounds], mode.split("_")
    case = corrected_case(11)
    weights = trls_weights(case, mode, cap, floor)
    correction = {"level": corrected, "mode": how, "cap": cap, "floor": floor}
    mine = ours(case, **options, **own, kl=0.3, correction=correction)
    theirs, _ = trls(case, loss_type, level, **peer, beta=0.3, weights=weights)
    if level == "sequence" and corrected == "token":
        torch.testing.assert_close(mine.loss, theirs, atol=1e-5, rtol=1e-5)  # the gradient: below
    else:
        same(mine.loss, theirs, case.logps)
    assert mine.loss != ours(case, **options, **own, kl=0.3).loss
    done = {"truncate": "truncated", "mask": "masked"}[how]
    assert 0 < mine.metrics[f"mismatch/{done}_{corrected}s"].sum < getattr(global_counts(case.trees), f"{corrected}s")


def test_with_a_sequence_ratio_trl_spreads_a_tokens_weight_over_its_sequence_and_ours_weighs_the_token() -> None:
    """The values are equal, and the sums over each sequence: only where within it the gradient falls differs."""
    loss_type, level, options = TYPES["gspo"]
    case = corrected_case(12)
    wide = ({"clip_low": 9.0, "clip_high": 9.0}, {"epsilon_low": 9.0, "epsilon_high": 9.0})
    weights = trls_weights(case, "token_truncate", 1.15, None)
    losses = (
        ours(case, **options, **wide[0], correction={"cap": 1.15}).loss,
        trls(case, loss_type, level, **wide[1], weights=weights)[0],
    )
    torch.testing.assert_close(*losses, atol=1e-5, rtol=1e-5)
    mine, theirs = (torch.autograd.grad(loss, case.logps)[0] for loss in losses)
    owner, s = case.batch.sequence_ids, case.batch.sequences
    sums = [torch.zeros(s).index_add(0, owner, g) for g in (mine, theirs)]
    torch.testing.assert_close(*sums, atol=1e-5, rtol=1e-5)
    assert (mine - theirs).abs().max() > 1e-4
    assert all(theirs[owner == k].std() < 1e-6 for k in range(s) if (owner == k).sum() > 1)


def test_off_takes_the_ratio_to_the_sampler_and_bounds_of_one_are_trls_uncorrected_ratio() -> None:
    """TRL's switch leaves the ratio to the policy at the start of the batch, and the mismatch uncorrected."""
    case = corrected_case(13)
    sampler = replace(case, proximal=None)
    same(ours(sampler, correction="off").loss, trls(sampler, "dapo")[0], case.logps)
    limits = {"correction": {"cap": 1.0, "floor": 1.0}}  # every weight is 1
    same(ours(case, **limits).loss, trls(case, "dapo")[0], case.logps)


KEYS = {  # what TRL's GRPOConfig has about the loss -> what the answer must name
    "loss_type": ("aggregation", "surrogate", "ratio", "constant_length"),
    "beta": ("kl",),
    "epsilon": ("clip_low",),
    "epsilon_high": ("clip_high", "cispo_cap"),
    "delta": ("clip_delta",),
    "importance_sampling_level": ("ratio",),
    "top_entropy_quantile": ("top_entropy",),
    "entropy_coef": ("entropy_bonus",),
    "off_policy_mask_threshold": ("off_policy_threshold",),
    "use_bias_correction_kl": ("kl_estimator",),
    "sapo_temperature_pos": ("sapo_temperature_pos",),
    "sapo_temperature_neg": ("sapo_temperature_neg",),
    **{f"vespo_{shape}_{sign}": (f"vespo_{shape}_{sign}",) for shape in ("k", "lambda") for sign in ("pos", "neg")},
    "vllm_importance_sampling_correction": ("correction",),
    "vllm_importance_sampling_mode": ("correction",),
    "vllm_importance_sampling_clip_max": ("correction",),
    "vllm_importance_sampling_clip_min": ("correction",),
}


def test_every_key_of_trls_about_the_loss_is_answered_with_ours() -> None:
    fields = GRPOConfig.__dataclass_fields__
    for key, options in KEYS.items():
        assert key in fields and set(options) <= set(Config.model_fields), key
        assert all(option in (translate(key) or "") for option in options), key
    assert "use_adaptive_entropy" in fields and "not" in (translate("use_adaptive_entropy") or "")
    for key, own in (("num_iterations", "updates_per_batch"), ("steps_per_generation", "minibatches")):
        assert key in fields and own in OnlineStage.model_fields and own in (translate(key) or ""), key
    assert "rollout.truncated" in (translate("mask_truncated_completions") or "")


def test_every_loss_type_of_trls_is_answered() -> None:
    answer = translate("loss_type") or ""
    for loss_type in ("grpo", "dr_grpo", "dapo", "bnpo", "cispo", "sapo", "luspo", "vespo", "gspo"):
        assert loss_type in answer.split("grpo}`:")[1]
    for loss_type, _, options in TYPES.values():
        for option, value in options.items():
            assert f"{option}: {value}" in answer or option == "constant_length" or value == "token", loss_type
