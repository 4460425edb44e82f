"""What the pair losses share: P pairs' sums and means, the functions of a margin, and the metrics of both sides."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import logsigmoid

from align.losses.base import LossInputs, Metric
from align.losses.reduce import mean, sequence_sums, weighted


@dataclass(frozen=True)
class PairSums:
    """Of P pairs. chosen f32[P], rejected f32[P]: sums of `values` over a side's scored tokens; chosen_length f32[P],
    rejected_length f32[P]: how many those are."""

    chosen: Tensor
    rejected: Tensor
    chosen_length: Tensor
    rejected_length: Tensor

    @property
    def means(self) -> tuple[Tensor, Tensor]:
        """The mean over the scored tokens of the chosen sides f32[P] and of the rejected ones f32[P]."""
        return self.chosen / self.chosen_length.clamp(min=1), self.rejected / self.rejected_length.clamp(min=1)


def pair_sums(values: Tensor, inputs: LossInputs) -> PairSums:
    """Sums of token values f32[N] over each side of each pair; an unscored prompt counts on neither side."""
    sums, lengths = sequence_sums(values, inputs, inputs.batch.loss_mask)
    chosen, rejected = inputs.batch.pairs[:, 0], inputs.batch.pairs[:, 1]
    return PairSums(sums[chosen], sums[rejected], lengths[chosen], lengths[rejected])


def sigmoid(z: Tensor, smoothing: float = 0.0) -> Tensor:
    """-(1-e) log s(z) - e log s(-z) for margins z f32[P]: 2305.18290 eq. 7; cDPO for e > 0."""
    return -(1 - smoothing) * logsigmoid(z) - smoothing * logsigmoid(-z)


def hinge(z: Tensor) -> Tensor:
    """max(0, 1 - z) f32[P] of margins z f32[P]: SLiC, 2309.06657."""
    return (1 - z).clamp(min=0)


def squared(delta: Tensor, beta: float) -> Tensor:
    """(delta - 1 / (2 beta))^2 f32[P] of log-ratio differences delta f32[P]: IPO, 2310.12036 eq. 17."""
    return (delta - 1 / (2 * beta)) ** 2


def side_metrics(reward_chosen: Tensor, reward_rejected: Tensor, logps: PairSums) -> dict[str, Metric]:
    """The metrics that every pair loss reports under the same names. reward_chosen f32[P], reward_rejected f32[P]:
    implicit rewards, detached."""
    return {
        "rewards/chosen": mean(reward_chosen),
        "rewards/rejected": mean(reward_rejected),
        "rewards/margins": mean(reward_chosen - reward_rejected),
        "rewards/accuracies": mean((reward_chosen > reward_rejected).float()),
        "logps/chosen": mean(logps.chosen),
        "logps/rejected": mean(logps.rejected),
    }


def chosen_nll(inputs: LossInputs) -> Tensor:
    """Mean negative log-likelihood f32[] over the update's NLL tokens (the chosen side, with or without prompt), each
    times its row's weight."""
    terms = weighted(inputs.outputs.logps, inputs, "token")
    return -(terms * inputs.batch.nll_mask).sum() / max(inputs.counts.nll_tokens, 1)


def mean_over_pairs(terms: Tensor, inputs: LossInputs) -> Tensor:
    """f32[]: this microbatch's share of the mean of `terms` f32[P] over all pairs of the update, each times its row's
    weight."""
    return weighted(terms, inputs, "pair").sum() / max(inputs.counts.pairs, 1)
