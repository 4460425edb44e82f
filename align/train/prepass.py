"""The no-grad pass before a step, for losses whose value is no sum over sequences or pairs (scope "batch")."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from align.data.prefixes import cut
from align.losses.base import Prepass
from align.protocols.trees import Tree
from align.types import HeadOutputs, TokenBatch


def within(trees: Sequence[Tree], positions: int | None) -> list[Tree]:
    """Trees that a loss made of several rows, with branches that end where the model's positions do. Each row fits by
    itself, but not a long completion behind another row's long prompt: a table of positions ends there, and beyond its
    context no model's values are worth an average."""
    if positions is None:
        return list(trees)
    return [
        replace(
            tree, branches=tuple(cut(b, 0, min(len(b), max(1, positions - len(tree.trunk)))) for b in tree.branches)
        )
        for tree in trees
    ]


@torch.no_grad()
def run_prepass(
    batches: Iterable[tuple[TokenBatch, bool]],
    forward: Callable[[TokenBatch], HeadOutputs],
    reference: Callable[[TokenBatch], Tensor | None],
    gather: Callable[[Tensor], Tensor] = lambda tensor: tensor,
) -> Prepass:
    """Summed log-probabilities of every sequence of the update, and the entropies that `forward` gives.

    batches: each with whether it counts; one that does not is computed and dropped (see
        `align.data.microbatches.Microbatch`).
    gather: joins a tensor of every rank along its first dimension (ranks may have different lengths).
    """
    rows: dict[str, list[Tensor]] = {name: [] for name in ("ids", "logps", "ratios", "lengths")}
    tokens: dict[str, list[Tensor]] = {"owner": [], "entropy": []}
    for batch, counted in batches:
        some = slice(None) if counted else slice(0)
        outputs, ref = forward(batch), reference(batch)
        mask = batch.loss_mask
        difference = torch.zeros_like(outputs.logps) if ref is None else outputs.logps - ref
        for name, values in (
            ("logps", outputs.logps),
            ("ratios", difference),
            ("lengths", torch.ones_like(difference)),
        ):
            zeros = values.new_zeros(batch.sequences)
            rows[name].append(zeros.index_add(0, batch.sequence_ids, values * mask)[some])
        rows["ids"].append(batch.group_ids[some])
        if outputs.entropy is not None:
            tokens["owner"].append(batch.group_ids[batch.sequence_ids][mask][some])
            tokens["entropy"].append(outputs.entropy[mask][some])
    found = {name: gather(torch.cat(parts)) for name, parts in rows.items()}
    order = torch.argsort(found["ids"], stable=True)
    entropy = None
    if tokens["entropy"]:
        owner, entropy = (gather(torch.cat(tokens[name])) for name in ("owner", "entropy"))
        entropy = entropy[torch.argsort(owner, stable=True)]
    return Prepass(**{name: values[order] for name, values in found.items()}, entropy=entropy)
