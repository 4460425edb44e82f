"""The forward for models whose layers a packed row would break: one sequence a row, by the model's own attention.

Layers that carry state from token to token (linear attention, state spaces) cannot share a trunk, nor start afresh in
the middle of a row. Each sequence (trunk and branch) gets a row; rows of similar length are computed together, padded
on the right. Nothing in a causal model looks to the right, so no mask is needed and the padding changes no value.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from align.model.media.placeholders import inside_media
from align.types import TokenBatch

MAX_PADDING = 0.25  # of a row's own length


@dataclass(frozen=True)
class Block:
    """Rows that are computed together. index i64[B, L]: places in the packed row; past i64[B, L]: how far a padding
    token lies behind its row's last one, 0 for real tokens."""

    index: Tensor
    past: Tensor


def sequences_of(batch: TokenBatch) -> list[Tensor]:
    """Places in the packed row, i64[L], of each sequence: a branch behind its trunk, or a trunk without branches."""
    bounds = torch.stack([batch.query_start, batch.query_end, batch.parent_start, batch.parent_end], dim=1).tolist()
    parents = {(first, last) for _, _, first, last in bounds if first >= 0}
    rows = []
    for start, end, first, last in bounds:
        if first >= 0:
            rows.append(torch.cat([torch.arange(first, last), torch.arange(start, end)]))
        elif (start, end) not in parents:
            rows.append(torch.arange(start, end))
    return rows


def blocks_of(rows: list[Tensor], *, one_by_one: bool = False) -> tuple[list[Block], list[int]]:
    """Rows of similar length in blocks (one_by_one: each in its own), the longest first, and the order in which the
    rows stand in them."""
    order = sorted(range(len(rows)), key=lambda n: (-len(rows[n]), n))
    groups: list[list[int]] = []
    for n in order:
        if not groups or one_by_one or len(rows[groups[-1][0]]) > (1 + MAX_PADDING) * len(rows[n]):
            groups.append([])
        groups[-1].append(n)
    blocks = []
    for group in groups:
        steps = torch.arange(len(rows[group[0]]))
        ends = torch.tensor([len(rows[n]) - 1 for n in group])[:, None]
        within = torch.minimum(steps[None], ends)
        index = torch.stack([rows[n][at] for n, at in zip(group, within, strict=True)])
        blocks.append(Block(index, steps[None] - within))
    return blocks, order


Inputs = Callable[[TokenBatch, Block], dict[str, Any]]


def hidden_states(
    backbone: Any,
    batch: TokenBatch,
    at: Tensor,
    inputs: Inputs = lambda batch, block: {},
    *,
    one_by_one: Tensor | None = None,
) -> Tensor:
    """Hidden states [K, D] of the tokens at places `at` i64[K] of the packed row.

    inputs: what else the backbone takes for a block of rows: features of their media. one_by_one: i64[K], the sequence
    that each token is asked for; no row then stands beside another, whose length or padding it would see, and a token
    of a trunk is read in that very sequence.
    A token of a shared trunk is read from the trunk's first sequence: it is the same in all of them.
    """
    rows = sequences_of(batch)
    blocks, order = blocks_of(rows, one_by_one=one_by_one is not None)
    found = torch.full((batch.token_ids.shape[0],), -1)
    firsts: dict[int, int] = {}
    offset = 0
    for block in blocks:
        for row in range(block.index.shape[0]):
            firsts[order[len(firsts)]] = offset + row * block.index.shape[1]
        offset += block.index.numel()
    for n in reversed(range(len(rows))):
        found[rows[n]] = firsts[n] + torch.arange(len(rows[n]))
    spots = found[at.cpu()]
    if one_by_one is not None:
        for n, places in enumerate(rows):
            own = one_by_one.cpu() == n
            spots[own] = firsts[n] + torch.searchsorted(places, at.cpu()[own])
    flat, back = spots.sort(stable=True)
    assert flat.numel() == 0 or int(flat[0]) >= 0, "a token that no sequence holds"
    parts, offset = [], 0
    for block in blocks:
        bounds = torch.searchsorted(flat, torch.tensor([offset, offset + block.index.numel()]))
        local = flat[bounds[0] : bounds[1]] - offset
        parts.append(_run(backbone, batch, block, inputs).flatten(0, 1).index_select(0, local.to(at.device)))
        offset += block.index.numel()
    return torch.cat(parts).index_select(0, torch.argsort(back).to(at.device))


def _token_outside_media(batch: TokenBatch) -> Tensor:
    """A token of the row that stands for no medium; any, where there is no other."""
    inside = inside_media(batch.token_ids.shape[0], batch.media, batch.media_at)
    return batch.token_ids[int(inside.long().argmin())]


def _run(backbone: Any, batch: TokenBatch, block: Block, inputs: Inputs) -> Tensor:
    """Hidden states [B, L, D] of one block under the model's own forward."""
    kwargs = inputs(batch, block)
    index, past = (x.to(batch.token_ids.device) for x in (block.index, block.past))
    ids = batch.token_ids[index]
    if batch.media:
        # a padding token that repeats an image's would want features
        ids = ids.where(past == 0, _token_outside_media(batch))
    parameters = inspect.signature(backbone.forward).parameters
    if "position_ids" in parameters:
        # positions go on behind the end: transformers would take a step back for the start of another sequence
        kwargs["position_ids"] = batch.position_ids[..., index] + past
    hidden: Tensor = backbone(input_ids=ids, use_cache=False, **kwargs).last_hidden_state
    return hidden
