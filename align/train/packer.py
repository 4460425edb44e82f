"""From the trees of a call to this rank's microbatches, and from their results back to sequences."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from align.data.microbatches import Microbatch, plan_ranks
from align.data.packing import collate, text_positions
from align.data.prefixes import placed, share_prefixes
from align.losses import Losses
from align.losses.base import Metric
from align.model.media.placeholders import positions_of
from align.model.policy_module import PolicyModule
from align.protocols.trees import Tree
from align.train.ranks import Ranks
from align.types import TokenBatch


class Packer:
    """For `module` on `device`, of which `ranks` compute a share each.

    max_tokens, max_patches: what a microbatch holds, of tokens as they are packed and of patches (None: any number).
    Another budget changes how an update is computed, and none of its results.
    keep_together: losses over pairs; no pair is split. may_share: rows that begin alike may be computed as one tree,
    where a row is one sequence.
    """

    def __init__(
        self,
        module: PolicyModule,
        losses: Losses,
        ranks: Ranks,
        device: torch.device,
        *,
        max_tokens: int,
        max_patches: int | None,
    ):
        self.module, self.ranks, self.device = module, ranks, device
        self.max_tokens, self.max_patches = max_tokens, max_patches
        self.positions = positions_of(module.model, text_positions)
        self.keep_together = "pair" in losses.records
        self.may_share = {"conversation", "labelled", "unpaired"}.issuperset(losses.records)

    @property
    def shares_prefixes(self) -> bool:
        """Whether rows that begin alike are computed as one tree: trunks must be shared too."""
        return self.may_share and self.module.layout == "shared"

    def microbatches(self, trees: Sequence[Tree]) -> list[tuple[TokenBatch, bool]]:
        """This rank's share, packed, and whether each counts (see `align.data.microbatches.Microbatch`)."""
        return [(self.packed(part), part.counted) for part in self.planned(trees)]

    def planned(self, trees: Sequence[Tree]) -> list[Microbatch]:
        """This rank's share of the trees."""
        if self.shares_prefixes:
            trees = share_prefixes(trees)
        planned = plan_ranks(
            trees,
            self.budget(trees),
            keep_together=self.keep_together,
            ranks=self.ranks.size,
            max_patches=self.max_patches,
        )
        return planned[self.ranks.rank]

    def packed(self, part: Microbatch) -> TokenBatch:
        """On the device."""
        batch = collate(part.trees, self.positions)
        batch.idle_media = part.idle_media
        return batch.to(self.device)

    def budget(self, trees: Sequence[Tree]) -> int:
        """Packed tokens of a microbatch; so many fewer where trunks are repeated, that as many are computed."""
        if self.module.layout == "shared":
            return self.max_tokens
        repeated = sum(len(tree.trunk) * (len(tree.sequences) - 1) for tree in trees)
        packed = sum(tree.tokens for tree in trees)
        return max(1, self.max_tokens * packed // max(1, packed + repeated))

    def by_sequence(
        self, trees: Sequence[Tree], of: Callable[[TokenBatch], list[np.ndarray]]
    ) -> list[list[np.ndarray]]:
        """What `of` gives for each sequence of a batch, per tree, gathered from all ranks."""
        assert len({tree.id for tree in trees}) == len(trees), "trees of one call have different ids"
        found: dict[tuple[int, int] | None, np.ndarray] = {}
        for part in self.planned([placed(tree) for tree in trees]):
            values = of(self.packed(part))
            if part.counted:
                # by place: rows may be joined to one tree, and a group cut between its branches
                places = [sequence.place for tree in part.trees for sequence in tree.sequences]
                found |= dict(zip(places, values, strict=True))
        found = {at: value for own in self.ranks.objects(found) for at, value in own.items()}
        return [[found[tree.id, k] for k in range(len(tree.sequences))] for tree in trees]


def work_of(batches: Sequence[tuple[TokenBatch, bool]]) -> dict[str, Metric]:
    """Tokens computed and microbatches, over all ranks; those that do not count are left out."""
    sizes = [batch.token_ids.numel() for batch, counted in batches if counted]
    found = {"tokens/trained": sum(sizes), "train/microbatches": len(sizes)}
    return {name: Metric(torch.tensor(float(n), dtype=torch.float64), reduce="sum") for name, n in found.items()}
