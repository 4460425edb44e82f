"""The tensors of one microbatch and what a forward returns for it. Dimension letters: T tokens, M segments,
N scored tokens, S sequences, P pairs, K scores."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from align.protocols.trees import Medium


@dataclass
class TokenBatch:
    """Trees laid end to end in one row of T tokens; a trunk stands once, its branches attend to it.

    token_ids i64[T]; position_ids i64[T] (or i64[3, T] for M-RoPE): a branch continues its trunk's positions.
    query_start, query_end, parent_start, parent_end i32[M]: segment m's tokens are [query_start, query_end) and it
        attends, besides causally to itself, to all of [parent_start, parent_end); parent_start is -1 for a trunk.
    predict_at i64[N]: index of the hidden state that predicts scored token n (for a branch's first token, the
        trunk's last); labels i64[N]: its token id; sequence_ids i64[N]: its sequence, 0..S-1.
    row_ids i64[N], row_owners i64[R]: where an episode has several branches, which are one sequence, the row (a branch
        behind its trunk) of each scored token, and the sequence of each row. None: rows are sequences.
    loss_mask, nll_mask bool[N]; advantages, behavior_logps f32[N]; versions i32[N] (zeros where a stage has none).
    reference_logps, proximal_logps f32[N] or None: log-probabilities under the reference, and under the policy at the
        start of the batch, where the trees carry them.
    pairs i64[P, 2]: sequence numbers of (chosen, rejected); group_ids i64[S]: tree of each sequence, its own where
        rows are computed as one tree;
    score_at i64[S]: index in the row of each sequence's last token, which a score head reads.
    columns: per sequence f32[S] ("sequence/<name>") and per pair f32[P] ("pair/<name>").
    media: what stands in the row, references in the order of their tokens; media_at: the first token of each.
    twins: i64[S], a number for each sequence, the same for equal ones (`align.data.packing.twins`).
    idle_media: what towers that learn compute beside it, for nothing, because other ranks have media now.
    """

    token_ids: Tensor
    position_ids: Tensor
    query_start: Tensor
    query_end: Tensor
    parent_start: Tensor
    parent_end: Tensor
    predict_at: Tensor
    labels: Tensor
    sequence_ids: Tensor
    loss_mask: Tensor
    nll_mask: Tensor
    advantages: Tensor
    behavior_logps: Tensor
    versions: Tensor
    pairs: Tensor
    group_ids: Tensor
    score_at: Tensor
    columns: dict[str, Tensor] = field(default_factory=dict)
    media: tuple[Medium, ...] = ()
    media_at: tuple[int, ...] = ()
    idle_media: tuple[Medium, ...] = ()
    reference_logps: Tensor | None = None
    proximal_logps: Tensor | None = None
    twins: Tensor | None = None
    row_ids: Tensor | None = None
    row_owners: Tensor | None = None

    @property
    def sequences(self) -> int:
        """S."""
        return int(self.group_ids.shape[0])

    @property
    def rows(self) -> int:
        """R: branches behind their trunks, and trunks alone."""
        return self.sequences if self.row_owners is None else int(self.row_owners.shape[0])

    @property
    def rows_of_tokens(self) -> Tensor:
        """i64[N]: the row in which each scored token stands, 0..R-1."""
        return self.sequence_ids if self.row_ids is None else self.row_ids

    def to(self, device: torch.device | str) -> TokenBatch:
        """The same with every tensor on `device`; media stay references."""
        moved: dict[str, Any] = {}
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, Tensor):
                moved[f.name] = value.to(device)
            elif isinstance(value, dict):
                moved[f.name] = {k: v.to(device) for k, v in value.items()}
            else:
                moved[f.name] = value
        return TokenBatch(**moved)


@dataclass
class HeadOutputs:
    """What a loss may ask the forward for; never logits. None where it was not asked.

    logps f32[N]: log-probability of each scored token at the batch's temperature; entropy f32[N], with gradient;
    log_sum_sq f32[N]: log of the sum of squared probabilities; scores f32[S, K], and logps then f32[0]: a model with a
    score head has no language model head.
    """

    logps: Tensor
    entropy: Tensor | None = None
    log_sum_sq: Tensor | None = None
    scores: Tensor | None = None
