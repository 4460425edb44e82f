"""Kahneman-Tversky optimisation (2402.01306) on single completions that are desirable or not.

With rho = logp - logp_ref of a completion:

    desirable    desirable_weight   * (1 - s(beta (rho - z)))
    undesirable  undesirable_weight * (1 - s(beta (z - rho)))

z = max(0, mean of rho over mismatched prompt-completion pairs) is the reference point: an estimate of the KL to the
reference, detached. The mean runs over all mismatched pairs of the whole update, whatever the number of ranks and
microbatches; they exist only in the no-grad pass before the step (`auxiliary`). A prompt is never matched with a
completion of its own, duplicate prompts included. A batch whose rows all have one prompt (or that is one row) has no
such pair: its z is 0, the value at which z is bounded and begins (the policy is then the reference), and what
apo_zero_unpaired has throughout; `policy/without_reference_point` is 1. Authors' and TRL's code pair a prompt with an
answer to itself there, which estimates something else. z takes no weights: it is an estimate, not a term.

Variant `apo_zero_unpaired` (2408.06266) has no reference point: 1 - s(beta rho), and s(beta rho).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from align.losses.base import LossConfig, LossInputs, LossOutput, Metric, Needs, Prepass
from align.protocols.trees import Tree

if TYPE_CHECKING:
    from torch import Tensor


class Config(LossConfig):
    beta: Annotated[float, Field(gt=0)] = 0.1
    desirable_weight: Annotated[float, Field(ge=0)] = 1.0
    undesirable_weight: Annotated[float, Field(ge=0)] = 1.0
    variant: Literal["kto", "apo_zero_unpaired"] = "kto"


def needs(config: Config) -> Needs:
    scope: Literal["batch", "sequence"] = "batch" if config.variant == "kto" else "sequence"
    return Needs(record="unpaired", reference=True, scope=scope, weights=True)


def auxiliary(trees: Sequence[Tree], config: Config) -> list[Tree]:
    """Each prompt with the completion of the next row (by id, cyclic) that has another prompt.

    Empty where there is none: a batch of one row, or of one prompt.
    """
    ordered = sorted(trees, key=lambda tree: tree.id)
    mismatched = []
    for i, tree in enumerate(ordered):
        others = (ordered[(i + k) % len(ordered)] for k in range(1, len(ordered)))
        partner = next((o for o in others if not o.trunk.same_input(tree.trunk)), None)
        if partner is None:
            return []
        mismatched.append(replace(tree, branches=partner.branches, origin=f"{tree.origin} x {partner.origin}"))
    return mismatched


def lacking(trees: Sequence[Tree], config: Config) -> str | None:
    """What an update over these trees has to do without."""
    if config.variant != "kto" or auxiliary(trees, config):
        return None
    return "rows of one prompt alone: no estimate of the KL, so the reference point is 0 there"


def batch_stats(found: Prepass | None, config: Config) -> dict[str, Tensor]:
    """z f32[], the mean of the mismatched pairs' log-ratios: never negative, never a gradient. Empty without pairs."""
    return {} if found is None else {"z": found.ratios.mean().clamp(min=0).detach()}


def loss(inputs: LossInputs, config: Config) -> LossOutput:
    """Loss f32[]: mean over the update's sequences. Needs reference_logps f32[N] and, for `kto`, batch_stats["z"] where
    the batch has an estimate."""
    import torch

    from align.losses.reduce import masked_mean, sequence_sums, share_of_loss, weighted

    logps, reference, batch = inputs.outputs.logps, inputs.reference_logps, inputs.batch
    assert reference is not None, "kto needs reference log-probabilities"
    rho, lengths = sequence_sums(logps - reference, inputs, batch.loss_mask)
    scored = lengths > 0  # what has no scored token is in no count either
    sums, _ = sequence_sums(logps.detach(), inputs, batch.loss_mask)
    desirable = batch.columns["sequence/desirable"] > 0.5
    estimate = inputs.batch_stats.get("z") if config.variant == "kto" else None
    z = rho.new_zeros(()) if estimate is None else estimate
    side = desirable.to(rho.dtype)
    sign = 2 * side - 1
    weight = side * config.desirable_weight + (1 - side) * config.undesirable_weight
    terms = scored * weight * torch.sigmoid(-config.beta * sign * (rho - z))  # 1 - s(x) = s(-x)
    total = weighted(terms, inputs, "sequence").sum() / max(inputs.counts.sequences, 1)
    reward = config.beta * rho.detach()
    right = ((reward > config.beta * z) == desirable).float()
    metrics: dict[str, Metric] = {
        "loss/total": share_of_loss(total),
        "rewards/chosen": masked_mean(reward, scored & desirable),
        "rewards/rejected": masked_mean(reward, scored & ~desirable),
        "rewards/accuracies": masked_mean(right, scored),
        "logps/chosen": masked_mean(sums, scored & desirable),
        "logps/rejected": masked_mean(sums, scored & ~desirable),
    }
    if config.variant == "kto":
        metrics["policy/reference_point"] = Metric(z, reduce="max")
        missing = rho.new_full((), float(estimate is None))
        metrics["policy/without_reference_point"] = Metric(missing, reduce="max")
    return LossOutput(total, metrics)
