"""The one interface of all losses. A loss module exports `Config`, `needs(config)` and `loss(inputs, config)`.

`Config` and `needs` load without torch, because `align check` imports none. Losses are pure: no collective, no
`.item()`, no logging. They divide by `counts`, the global numbers of the whole update, never by a local mean, so that
any split into microbatches and ranks gives the same gradient.

A loss of scope "batch", whose value is no sum over sequences or pairs, also exports `batch_stats(found, config)`: it
turns what a no-grad pass over the whole update found (`Prepass`) into the tensors that `loss` sees in
`inputs.batch_stats`. With `auxiliary(trees, config)` it has that pass run over other trees than the update's own; where
it answers none there is no pass, and `found` is None. `lacking(trees, config) -> str | None` then says what an update
over these trees does without: `align check` counts such batches. No batch may end a run.

`remarks(config) -> tuple[str, ...]` is optional: what the plan says about the options, where one is easily misread.
`derived(metrics) -> dict` is optional too: numbers that are no sums (F1, a correlation) from the joined metrics, in
place of the sums behind them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, get_args

from pydantic import BaseModel, ConfigDict

from align.errors import PluginError
from align.protocols.trees import Counts

__all__ = ["Counts", "LossConfig", "LossInputs", "LossOutput", "Metric", "Needs", "Nll", "Prepass", "Record"]

Record = Literal["conversation", "pair", "unpaired", "labelled", "group"]
Nll = Literal["none", "scored", "chosen", "prompt_and_chosen", "observed"]
Scope = Literal["sequence", "pair", "batch"]
Ratio = Literal["none", "sampler", "proximal"]
HEAD = ("entropy", "log_sum_sq", "scores")
"""What of HeadOutputs a loss may ask for beside logps."""

if TYPE_CHECKING:
    from torch import Tensor

    from align.types import HeadOutputs, TokenBatch


class LossConfig(BaseModel):
    """Base of every loss's options: strict, so that a typo is an error and not a default."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True, allow_inf_nan=False)


@dataclass(frozen=True)
class Needs:
    """What the step must have ready. record: kind of tree; reference: log-probabilities under one;
    head: names of HeadOutputs beside logps ("entropy", "log_sum_sq"; what is not named is not computed);
    scope "batch": the step first runs a no-grad pass over all microbatches and hands back `batch_stats`;
    ratio: the policy that the loss's importance ratio is to. "sampler": batch.behavior_logps; "proximal": that at the
    start of the batch, whose log-probabilities the loss is given; "none": it has no ratio, and is right only where a
    batch makes one update;
    nll: which tokens the negative log-likelihood term covers: all scored ones, the chosen side's, those and the
    prompt's, or what an environment added to an episode; the trainer marks them before packing;
    margin: every pair must have one, from its row or from the stage's rewards;
    weights: it multiplies each row's terms by the row's `weight` (`align.losses.reduce.weighted`); rows with another
    than 1 are refused where it does not. On groups a prompt's weight is in the advantages, whatever this says."""

    record: Record
    reference: bool = False
    head: tuple[str, ...] = ()
    scope: Scope = "sequence"
    nll: Nll = "none"
    ratio: Ratio = "none"
    margin: bool = False
    weights: bool = False

    def __post_init__(self) -> None:
        """A word that nothing here knows would have no effect. Raises PluginError."""
        for key, words in (("record", Record), ("nll", Nll), ("scope", Scope), ("ratio", Ratio)):
            _known(key, getattr(self, key), get_args(words))
        if not isinstance(self.head, tuple):
            raise PluginError(
                f"`Needs.head` is a tuple of names, not {self.head!r}", remedy=f"names: {', '.join(HEAD)}"
            )
        for name in self.head:
            _known("head", name, HEAD)


def _known(key: str, value: object, words: tuple[str, ...]) -> None:
    if value not in words:
        raise PluginError(f"`Needs.{key}` is {value!r}, which means nothing here", remedy=f"use {' or '.join(words)}")


@dataclass(frozen=True)
class Metric:
    """A number that joins over microbatches and ranks, from sum f32[] and count f32[] of each: by `reduce`, sum / count
    ("mean"), the largest sum ("max"), or the sum of all ("sum")."""

    sum: Tensor
    count: Tensor | float = 1.0
    reduce: Literal["mean", "max", "sum"] = "mean"


@dataclass(frozen=True)
class Prepass:
    """What the no-grad pass before a step found, over all microbatches and ranks of the update.

    Per sequence, in order of tree id and a pair's chosen side first: ids i64[S], the tree's id; logps f32[S], the sum
    over its scored tokens; ratios f32[S], the same of logp - logp_ref (zeros without a reference); lengths f32[S].
    entropy: f32[N] of all scored tokens, in that order too, where the loss needs it, else None.
    """

    ids: Tensor
    logps: Tensor
    ratios: Tensor
    lengths: Tensor
    entropy: Tensor | None = None


@dataclass
class LossInputs:
    """What a loss sees of one microbatch.

    outputs: of the forward, with gradient. batch: the tokens that they are of. counts: of the whole update.
    reference_logps f32[N]: under the reference, where the loss needs one; proximal_logps f32[N]: under the policy at
        the start of the batch, where `Needs.ratio` is "proximal".
    batch_stats: what the loss's own `batch_stats` answered, by name: numbers f32[], or values of all pairs of the
        update f32[P]; {} where it has none.
    """

    outputs: HeadOutputs
    batch: TokenBatch
    counts: Counts
    reference_logps: Tensor | None = None
    proximal_logps: Tensor | None = None
    batch_stats: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class LossOutput:
    """loss f32[]: this microbatch's share of the global loss (shares add up); metrics by flat name."""

    loss: Tensor
    metrics: dict[str, Metric]
