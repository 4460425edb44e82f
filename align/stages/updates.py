"""The optimizer updates of one turn: whole groups in minibatches, several times over, against the policy at its start.

A turn of `passes` and `minibatches` makes passes * minibatches updates and one publish. Which groups share a minibatch
is arithmetic of (seed, turn), the same in every pass, so that each is packed as its proximal log-probabilities were and
the ratio is exactly 1 until the first update. Nothing here outlives a turn: a checkpoint needs nothing of it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from align.data.order import epoch_order
from align.losses import Losses
from align.protocols.trainer import Metrics, Trainer
from align.protocols.trees import Segment, Tree
from align.recipe.capabilities import SamplingStage

_SUMMED = ("time/", "tokens/", "train/", "comm/")
_COUNTED = ("_tokens", "_sequences")


@dataclass(frozen=True)
class UpdatePlan:
    """passes: how often every group of a turn is trained on; minibatches: parts of a turn, an update each; seed: of
    which groups share a part; proximal: the loss's ratio is to the policy at the start of the turn."""

    passes: int = 1
    minibatches: int = 1
    seed: int = 0
    proximal: bool = False

    @classmethod
    def of(cls, stage: SamplingStage, seed: int) -> UpdatePlan:
        return cls(stage.updates_per_batch, stage.minibatches, seed, Losses.of(stage.loss).needs_proximal)

    @property
    def per_turn(self) -> int:
        return self.passes * self.minibatches


class Updates:
    """A turn's updates by `trainer`, as `plan` says."""

    def __init__(self, trainer: Trainer, plan: UpdatePlan):
        self.trainer, self.plan = trainer, plan

    async def train(self, trees: Sequence[Tree], *, step: int, total: int) -> Metrics:
        """Train on the groups of turn `step` (from 0) of `total`; metrics as `merged` joins them.

        One update is `Trainer.step` over all trees; without a tree there is none. Where there are fewer groups than
        minibatches (the others were dropped) there are fewer updates, each at the learning rate of its place.
        """
        if not trees:  # every completion is empty: no update, and the turn says so
            return {"train/updates": 0.0, "train/idle": 0.0}
        parts = self.parts(trees, step)
        begun = time.perf_counter()
        parts = await self._with_proximal(parts)
        waited = time.perf_counter() - begun
        found = []
        for done in range(self.plan.per_turn):
            part = done % self.plan.minibatches
            if part < len(parts):
                progress = (step * self.plan.per_turn + done) / (total * self.plan.per_turn)
                found.append(await self.trainer.step(parts[part], step=step, progress=progress))
        metrics = merged(found)
        return metrics | {"time/proximal": waited} if self.plan.per_turn > 1 and self.plan.proximal else metrics

    def parts(self, trees: Sequence[Tree], step: int) -> list[list[Tree]]:
        """The turn's minibatches, none empty: sizes differ by one at most, trees stand as they were given."""
        if self.plan.minibatches == 1:
            return [list(trees)]
        shuffled = epoch_order(len(trees), self.plan.seed, step)
        shares = np.array_split(shuffled, min(self.plan.minibatches, len(trees)))
        return [[trees[i] for i in sorted(share.tolist())] for share in shares]

    async def _with_proximal(self, parts: list[list[Tree]]) -> list[list[Tree]]:
        """`parts` with the log-probabilities of the policy as it is now, where an update comes before their use. The
        first part of a single pass has none: its own forward is that policy's."""
        first = 1 if self.plan.passes == 1 else 0
        if not self.plan.proximal or self.plan.per_turn == 1:
            return parts
        computed = [
            [carrying(t, v) for t, v in zip(p, await self.trainer.logps(p), strict=True)] for p in parts[first:]
        ]
        return parts[:first] + computed


def carrying(tree: Tree, logps: Sequence[np.ndarray]) -> Tree:
    """The group with `proximal_logps` in every branch. logps: per branch, f32[k] of its k scored tokens."""

    def known(branch: Segment, values: np.ndarray) -> Segment:
        whole = np.zeros(len(branch), dtype=np.float32)
        whole[branch.loss_mask] = values
        return replace(branch, proximal_logps=whole)

    return replace(tree, branches=tuple(known(b, v) for b, v in zip(tree.branches, logps, strict=True)))


def merged(found: Sequence[Metrics]) -> Metrics:
    """The metrics of a turn from those of its updates: sums of times, tokens, bytes and counts (time/, tokens/, comm/,
    train/, *_tokens, *_sequences), the largest of every max_abs, the mean of all others over the updates that have
    them. Every update counts once, however many tokens it had. train/updates: their number."""
    out: Metrics = {"train/updates": float(len(found))}
    for name in dict.fromkeys(name for metrics in found for name in metrics):
        values = [metrics[name] for metrics in found if name in metrics]
        if name.endswith("/max_abs"):
            out[name] = float(np.max(values))  # NaN where any is
        elif name.startswith(_SUMMED) or name.endswith(_COUNTED):
            out[name] = sum(values)
        else:
            out[name] = sum(values) / len(values)
    return out
