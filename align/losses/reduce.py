"""Small pure functions that losses are composed of: per-sequence sums, masked metrics, aggregation."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from align.losses.base import LossInputs, Metric

Aggregation = Literal["token", "sequence", "constant", "sequence_sum"]


def sequence_sums(values: Tensor, inputs: LossInputs, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of `values` f32[N] over each sequence's tokens under `mask` bool[N], and their number; f32[S] both."""
    batch = inputs.batch
    weights = mask.to(values.dtype)
    zeros = values.new_zeros(batch.sequences)
    sums = zeros.index_add(0, batch.sequence_ids, values * weights)
    lengths = zeros.index_add(0, batch.sequence_ids, weights)
    return sums, lengths


Unit = Literal["token", "sequence", "pair"]


def weighted(terms: Tensor, inputs: LossInputs, unit: Unit) -> Tensor:
    """`terms`, by `unit` f32[N], f32[S] or f32[P], each times the weight that its data row has (column `weight`); a
    token has its sequence's. Denominators stay counts: a row of weight 2 adds as much as two such rows in a batch of as
    many rows."""
    columns = inputs.batch.columns
    weights = columns.get("pair/weight" if unit == "pair" else "sequence/weight")
    if weights is None:  # no row has another weight than 1
        return terms
    weights = weights.nan_to_num(1.0).to(terms.dtype)
    return terms * (weights[inputs.batch.sequence_ids] if unit == "token" else weights)


def masked_mean(values: Tensor, mask: Tensor) -> Metric:
    """Mean of `values` f32[N] where `mask` bool[N], as a metric that joins over microbatches."""
    weights = mask.to(values.dtype)
    return Metric((values.detach() * weights).sum(), weights.sum())


def mean(values: Tensor) -> Metric:
    """Mean of all `values`, of any shape, as a metric that joins over microbatches."""
    return Metric(values.detach().sum(), float(values.numel()))


def largest(values: Tensor, mask: Tensor) -> Metric:
    """Largest of `values` f32[N] where `mask` bool[N] (0 where nothing is)."""
    masked = torch.where(mask, values.detach(), torch.zeros_like(values))
    return Metric(masked.max() if masked.numel() else values.new_zeros(()), reduce="max")


def share_of_loss(loss: Tensor) -> Metric:
    """loss/total from loss f32[]: shares add up over microbatches, so its count is the update, not the microbatch."""
    return Metric(loss.detach(), 1.0, reduce="sum")


def aggregate(token_losses: Tensor, inputs: LossInputs, how: Aggregation, constant: int | None = None) -> Tensor:
    """One number f32[] from `token_losses` f32[N], with global denominators.

    token: sum / all scored tokens (DAPO, 2503.14476); sequence: mean over sequences of their token means (GRPO,
    2402.03300); constant: sum / (sequences * constant), Dr. GRPO's length-unbiased form (2503.20783); sequence_sum:
    mean over sequences of their token sums (LUSPO, 2602.05261).
    """
    mask = inputs.batch.loss_mask
    if how == "sequence":
        sums, lengths = sequence_sums(token_losses, inputs, mask)
        return (sums / lengths.clamp(min=1)).sum() / max(inputs.counts.sequences, 1)
    total = (token_losses * mask).sum()
    if how == "token":
        return total / max(inputs.counts.tokens, 1)
    if how == "sequence_sum":
        return total / max(inputs.counts.sequences, 1)
    assert constant, "constant aggregation divides by a number of tokens"
    return total / (max(inputs.counts.sequences, 1) * constant)
