"""Reward model on pairs (2204.05862, after Bradley and Terry): the chosen side's score should be the higher one.

    -log sigma(s_c - s_r - margin) + centre * (s_c + s_r)^2

margin: the pair's own (2307.09288 eq. 2), column "pair/margin", 0 where the data gives none. centre pulls scores, which
the first term fixes only up to a constant, towards a mean of 0 (2312.09244 eq. 2; TRL's center_rewards_coefficient).
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from align.losses.base import LossConfig, LossInputs, LossOutput, Needs


class Config(LossConfig):
    centre: Annotated[float, Field(ge=0)] = 0.0


def needs(config: Config) -> Needs:
    return Needs(record="pair", head=("scores",), scope="pair", weights=True)


def loss(inputs: LossInputs, config: Config) -> LossOutput:
    """Loss f32[]: mean over all pairs of the update. Needs scores f32[S, 1]; rewards/... are the scores themselves."""
    from align.losses.pairs import mean_over_pairs, sigmoid
    from align.losses.reduce import mean, share_of_loss

    scores, batch = inputs.outputs.scores, inputs.batch
    assert scores is not None and scores.shape == (batch.sequences, 1), "reward_model needs one score per sequence"
    chosen, rejected = scores[:, 0][batch.pairs].unbind(1)
    difference = chosen - rejected
    margin = batch.columns.get("pair/margin")
    apart = difference if margin is None else difference - margin.nan_to_num().to(difference.dtype)
    terms = sigmoid(apart) + config.centre * (chosen + rejected) ** 2
    total = mean_over_pairs(terms, inputs)
    metrics = {
        "loss/total": share_of_loss(total),
        "rewards/chosen": mean(chosen),
        "rewards/rejected": mean(rejected),
        "rewards/margins": mean(difference),
        "rewards/accuracies": mean((difference > 0).float()),
    }
    return LossOutput(total, metrics)
