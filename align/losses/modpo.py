"""Multi-objective DPO (MODPO, 2310.03708): preferences on one objective, and what the others say of the same pair.

    -log s((beta delta - m) / w)        delta = rho_c - rho_r, rho = logp - logp_ref
    m = w_-k . (r_-k(chosen) - r_-k(rejected))

w is `preference_weight`, the weight w_k of the objective that the data prefer by; m, the pair's column "pair/margin",
is what the stage's `rewards` under `objectives.weights` give, or a column of the data. The policy that maximises
w r_k + w_-k . r_-k - beta KL has beta delta = w (r_k(c) - r_k(r)) + m, of which only r_k is learnt here. w = 1 and
m = 0 is DPO. A pair without a margin is refused before the stage begins: it is not one whose margin is 0.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from align.losses.base import LossConfig, LossInputs, LossOutput, Needs


class Config(LossConfig):
    beta: Annotated[float, Field(gt=0)] = 0.1
    preference_weight: Annotated[float, Field(gt=0)] = 1.0


def needs(config: Config) -> Needs:
    return Needs(record="pair", reference=True, scope="pair", margin=True, weights=True)


def loss(inputs: LossInputs, config: Config) -> LossOutput:
    """Loss f32[]: mean over all pairs of the update. Needs reference_logps f32[N] and column "pair/margin" f32[P];
    rewards/... are beta rho, policy/margin the mean of m."""
    from align.losses.pairs import mean_over_pairs, pair_sums, side_metrics, sigmoid
    from align.losses.reduce import mean, share_of_loss

    logps, reference = inputs.outputs.logps, inputs.reference_logps
    margin = inputs.batch.columns.get("pair/margin")
    assert reference is not None and margin is not None, "modpo needs a reference, and a margin for every pair"
    ratios = pair_sums(logps - reference, inputs)
    margin = margin.to(logps.dtype)
    z = (config.beta * (ratios.chosen - ratios.rejected) - margin) / config.preference_weight
    total = mean_over_pairs(sigmoid(z), inputs)
    rewards = [config.beta * side.detach() for side in (ratios.chosen, ratios.rejected)]
    metrics = side_metrics(rewards[0], rewards[1], pair_sums(logps.detach(), inputs))
    return LossOutput(total, metrics | {"policy/margin": mean(margin), "loss/total": share_of_loss(total)})
