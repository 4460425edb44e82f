"""What dpo is composed of: weights of tokens and pairs, scores of a side, partners by rank, and the variants.

Pure functions over P pairs; `align.losses.dpo` has the formulas and their papers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from align.losses import pairs
from align.losses.base import LossInputs, Metric, Prepass
from align.losses.reduce import mean

if TYPE_CHECKING:
    from align.losses.dpo import Config

EXPONENT_LIMIT = 30.0  # e^30 is 1e13: its square, ipo's, is finite in float32, and so is its gradient


@dataclass(frozen=True)
class Sides:
    """Per pair f32[P]: the score of each side, f'(e^rho), which is rho itself under the reverse KL."""

    chosen: Tensor
    rejected: Tensor

    @property
    def delta(self) -> Tensor:
        return self.chosen - self.rejected


Partners = dict[str, Tensor]  # per pair f32[P], detached: what it meets after sorting; empty where nothing is sorted


# ------------------------------------------------------------------------------------------------- weights


def length_weights(inputs: LossInputs, alpha: float) -> Tensor:
    """Weight of each token f32[N]: alpha beyond the length of the pair's shorter side, else 1 (2409.06411)."""
    batch = inputs.batch
    scored = batch.loss_mask.long()
    lengths = scored.new_zeros(batch.sequences).index_add(0, batch.sequence_ids, scored)
    shared = lengths.clone()
    shared[batch.pairs] = lengths[batch.pairs].amin(1, keepdim=True).expand(-1, 2)
    before = lengths.cumsum(0) - lengths  # a row's sequences stand one after another
    place = scored.cumsum(0) - before[batch.sequence_ids]  # from 1
    ones = torch.ones_like(inputs.outputs.logps.detach())
    return torch.where(place <= shared[batch.sequence_ids], ones, alpha * ones)


def wpo_weights(inputs: LossInputs) -> Tensor:
    """Weight of each pair f32[P], detached: the product over both sides of exp(mean(logp - log sum_v p_v^2)).

    2406.11827 eq. 2 with its alignment: the sum of squares is what a token sampled from the policy has on average.
    """
    likely = inputs.outputs.log_sum_sq
    assert likely is not None, "wpo needs log_sum_sq of every scored token"
    chosen, rejected = pairs.pair_sums((inputs.outputs.logps - likely).detach(), inputs).means
    return (chosen + rejected).exp()


# ------------------------------------------------------------------------------------------------- scores


def _power(rho: Tensor, alpha: float) -> Tensor:
    """(1 - t^-alpha) / alpha with t = e^rho; the exponent is clamped, and `clamped` counts where."""
    return -torch.expm1((-alpha * rho).clamp(max=EXPONENT_LIMIT)) / alpha


# f'(t) of 2309.16240 for log t = rho f32[P]; constants are chosen so that f'(1) = 0
DIVERGENCES: dict[str, Callable[[Tensor, Config], Tensor]] = {
    "reverse_kl": lambda rho, config: rho,
    "forward_kl": lambda rho, config: _power(rho, 1.0),
    "js": lambda rho, config: math.log(2) + logsigmoid(rho),
    "alpha": lambda rho, config: _power(rho, config.divergence_alpha),
}
_EXPONENTS: dict[str, Callable[[Config], float]] = {
    "forward_kl": lambda config: 1.0,
    "alpha": lambda config: config.divergence_alpha,
}


def sides(ratios: pairs.PairSums, config: Config, *, over_tokens: bool) -> Sides:
    """Scores of both sides from the sums of their log-ratios; over_tokens: divided by their lengths."""
    score = DIVERGENCES[config.divergence]
    chosen, rejected = score(ratios.chosen, config), score(ratios.rejected, config)
    if over_tokens:
        chosen, rejected = chosen / ratios.chosen_length.clamp(min=1), rejected / ratios.rejected_length.clamp(min=1)
    return Sides(chosen, rejected)


def clamped(ratios: pairs.PairSums, config: Config) -> dict[str, Metric]:
    """rewards/clamped: share of pairs with a side whose exponent was clamped, for divergences that have one."""
    if config.divergence not in _EXPONENTS:
        return {}
    lowest = torch.minimum(ratios.chosen, ratios.rejected).detach()
    return {"rewards/clamped": mean((-_EXPONENTS[config.divergence](config) * lowest > EXPONENT_LIMIT).float())}


# ------------------------------------------------------------------------------------------------- partners by rank


def at_rank(values: Tensor, others: Tensor) -> Tensor:
    """f32[P]: for each of `values`, that of `others` which has its rank. Ties stand in order of position."""
    found = torch.empty_like(others)
    found[values.argsort(stable=True)] = others.sort(stable=True).values
    return found


def _match_margins(found: Prepass) -> Partners:
    """aot: how far the reference's log-ratio of the pair's own rank lies below the reference's of the pair itself."""
    logps, ratios = found.logps.reshape(-1, 2), found.ratios.reshape(-1, 2)
    policy = logps[:, 0] - logps[:, 1]
    reference = policy - (ratios[:, 0] - ratios[:, 1])
    return {"shift": reference - at_rank(policy, reference)}


def _match_sides(found: Prepass) -> Partners:
    """aot_unpaired: the rejected rho that a pair's chosen one meets, and the chosen rho that its rejected one meets."""
    chosen, rejected = found.ratios.reshape(-1, 2).unbind(1)
    return {"rejected": at_rank(chosen, rejected), "chosen": at_rank(rejected, chosen)}


MATCHES: dict[str, Callable[[Prepass], Partners]] = {"aot": _match_margins, "aot_unpaired": _match_sides}


def partners(inputs: LossInputs) -> Partners:
    """Of this microbatch's pairs, out of those of the whole update (`align.losses.dpo.batch_stats`)."""
    stats, batch = inputs.batch_stats, inputs.batch
    at = torch.searchsorted(stats["ids"], batch.group_ids[batch.pairs[:, 0]])
    return {name: values[at].detach() for name, values in stats.items() if name != "ids"}


# ------------------------------------------------------------------------------------------------- variants


def sigmoid(sides: Sides, partners: Partners, config: Config) -> Tensor:
    return pairs.sigmoid(config.beta * sides.delta, config.label_smoothing)


def hinge(sides: Sides, partners: Partners, config: Config) -> Tensor:
    return pairs.hinge(config.beta * sides.delta)


def ipo(sides: Sides, partners: Partners, config: Config) -> Tensor:
    return pairs.squared(sides.delta, config.beta)


def robust(sides: Sides, partners: Partners, config: Config) -> Tensor:
    """((1-e) L(delta) - e L(-delta)) / (1 - 2e)."""
    z, e = config.beta * sides.delta, config.label_smoothing
    return (-(1 - e) * logsigmoid(z) + e * logsigmoid(-z)) / (1 - 2 * e)


def exo_pair(sides: Sides, partners: Partners, config: Config) -> Tensor:
    z, e = config.beta * sides.delta, config.label_smoothing
    chosen = torch.sigmoid(z) * (logsigmoid(z) - math.log1p(-e))
    return chosen + torch.sigmoid(-z) * (logsigmoid(-z) - math.log(e))


def discopop(sides: Sides, partners: Partners, config: Config) -> Tensor:
    """(1 - m) (-log s(z)) + m e^-z with m = s(z / tau). m e^-z is one exponential: e^-z alone overflows at -z = 89,
    where m is 0."""
    z = config.beta * sides.delta
    exponential = (logsigmoid(z / config.discopop_tau) - z).clamp(max=EXPONENT_LIMIT).exp()
    return -torch.sigmoid(-z / config.discopop_tau) * logsigmoid(z) + exponential


def nca_pair(sides: Sides, partners: Partners, config: Config) -> Tensor:
    chosen, rejected = config.beta * sides.chosen, config.beta * sides.rejected
    return -logsigmoid(chosen) - 0.5 * logsigmoid(-chosen) - 0.5 * logsigmoid(-rejected)


def bco_pair(sides: Sides, partners: Partners, config: Config) -> Tensor:
    return -logsigmoid(config.beta * sides.chosen) - logsigmoid(-config.beta * sides.rejected)


def sppo_hard(sides: Sides, partners: Partners, config: Config) -> Tensor:
    return pairs.squared(sides.chosen, config.beta) + pairs.squared(-sides.rejected, config.beta)


def apo_zero(sides: Sides, partners: Partners, config: Config) -> Tensor:
    return torch.sigmoid(-config.beta * sides.chosen) + torch.sigmoid(config.beta * sides.rejected)


def apo_down(sides: Sides, partners: Partners, config: Config) -> Tensor:
    return torch.sigmoid(config.beta * sides.chosen) + torch.sigmoid(-config.beta * sides.delta)


def aot(sides: Sides, partners: Partners, config: Config) -> Tensor:
    """delta + shift is the pair's own logp_c - logp_r minus the reference's of the same rank."""
    return pairs.sigmoid(config.beta * (sides.delta + partners["shift"]), config.label_smoothing)


def aot_unpaired(sides: Sides, partners: Partners, config: Config) -> Tensor:
    """The chosen side's term has the value and its own gradient; that of the rejected side, which meets another pair's
    chosen one, adds its gradient and no value: there the same term counts already."""
    chosen = pairs.sigmoid(config.beta * (sides.chosen - partners["rejected"]), config.label_smoothing)
    rejected = pairs.sigmoid(config.beta * (partners["chosen"] - sides.rejected), config.label_smoothing)
    return chosen + rejected - rejected.detach()


PAIR_LOSSES: dict[str, Callable[[Sides, Partners, Config], Tensor]] = {
    "sigmoid": sigmoid,
    "sigmoid_norm": sigmoid,
    "hinge": hinge,
    "ipo": ipo,
    "robust": robust,
    "exo_pair": exo_pair,
    "discopop": discopop,
    "nca_pair": nca_pair,
    "bco_pair": bco_pair,
    "sppo_hard": sppo_hard,
    "apo_zero": apo_zero,
    "apo_down": apo_down,
    "aot": aot,
    "aot_unpaired": aot_unpaired,
}
