"""The trees of a microbatch (see `align.data.microbatches`) -> TokenBatch.

Trees are laid end to end in one row of tokens. A trunk stands once and its branches follow it; a branch attends to
its trunk and causally to itself, so a prompt and its images are computed once however many completions it has.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

import numpy as np
import torch

from align.errors import DataError
from align.protocols.trees import Counts, Medium, Segment, Tree
from align.types import TokenBatch

# Positions i64[n], or i64[3, n] under M-RoPE, of a tree's trunk and of each of its branches
PositionFn = Callable[[Tree], tuple[np.ndarray, list[np.ndarray]]]


def text_positions(tree: Tree) -> tuple[np.ndarray, list[np.ndarray]]:
    """Positions i64[n] of the trunk, and of each branch, which continues where the trunk ends."""
    n = len(tree.trunk)
    return np.arange(n), [np.arange(n, n + len(b)) for b in tree.branches]


def global_counts(trees: Sequence[Tree]) -> Counts:
    """Tokens, NLL tokens, sequences and pairs of a whole update, the denominators of every loss."""
    tokens = nll_tokens = sequences = pairs = 0
    for tree in trees:
        for segment in (tree.trunk, *tree.branches):
            tokens += int(segment.loss_mask.sum())
            nll_tokens += int((segment.loss_mask if segment.nll_mask is None else segment.nll_mask).sum())
        owners = zip(tree.sequences, tree.owners, strict=True)
        sequences += len({owner for s, owner in owners if s.loss_mask.any() or s.labelled})
        pairs += len(tree.units) == 2
    return Counts(tokens=tokens, nll_tokens=nll_tokens, sequences=sequences, pairs=pairs)


def observed(branch: Segment) -> np.ndarray:
    """bool[n]: the tokens of an episode that nobody sampled, behind the first that the policy did; none of an answer.
    They have version -1. Those of media are not among them: all pictures have the same; nor is what a branch repeats of
    the one that it follows."""
    if branch.versions is None:
        return np.zeros(len(branch), dtype=bool)
    versions = np.asarray(branch.versions)
    found = np.asarray((versions == -1) & (np.cumsum(versions != -1) > 0))
    for medium in branch.media:
        found[medium.start : medium.start + medium.length] = False
    return found


def mark_nll(tree: Tree, which: str) -> Tree:
    """Set the tokens of the negative log-likelihood term (`Needs.nll`): the chosen side is the first sequence.

    "none" and "scored" leave the masks as they are: the loss mask serves.
    """
    if which in ("none", "scored") or not tree.branches:
        return tree
    if which == "observed":
        silent_trunk = replace(tree.trunk, nll_mask=np.zeros(len(tree.trunk), dtype=bool))
        branches = tuple(replace(branch, nll_mask=observed(branch)) for branch in tree.branches)
        return replace(tree, trunk=silent_trunk, branches=branches)
    prompt = np.zeros(len(tree.trunk), dtype=bool)
    if which == "prompt_and_chosen":
        prompt[1:] = True  # nothing predicts the first token
    chosen, *others = tree.branches
    silent = [replace(b, nll_mask=np.zeros(len(b), dtype=bool)) for b in others]
    return replace(
        tree,
        trunk=replace(tree.trunk, nll_mask=prompt),
        branches=(replace(chosen, nll_mask=chosen.loss_mask), *silent),
    )


SCORED_DTYPES = {
    "predict_at": torch.int64,
    "labels": torch.int64,
    "sequence_ids": torch.int64,
    "loss_mask": torch.bool,
    "nll_mask": torch.bool,
    "advantages": torch.float32,
    "behavior_logps": torch.float32,
    "versions": torch.int32,
}


CARRIED = ("reference_logps", "proximal_logps")  # f32 per scored token, where every tree has them


class _Layout:
    """Collects the columns of a TokenBatch while trees are laid down one after another."""

    def __init__(self) -> None:
        self.offset = 0
        self.tokens: list[np.ndarray] = []
        self.positions: list[np.ndarray] = []
        self.segments: list[tuple[int, int, int, int]] = []
        self.scored: dict[str, list[np.ndarray]] = {name: [] for name in SCORED_DTYPES}
        self.carried: dict[str, list[np.ndarray]] = {name: [] for name in CARRIED}
        self.media: list[tuple[Medium, int]] = []
        self.group_ids: list[int] = []
        self.row_ids: list[np.ndarray] = []
        self.row_owners: list[int] = []
        self.score_at: list[int] = []
        self.pairs: list[tuple[int, int]] = []
        self.sequence_columns: list[dict[str, float]] = []
        self.pair_columns: list[dict[str, float]] = []

    def lay(self, segment: Segment, positions: np.ndarray, parent: tuple[int, int] | None) -> tuple[int, int]:
        start, end = self.offset, self.offset + len(segment)
        self.tokens.append(segment.token_ids)
        self.positions.append(positions)
        if end > start:
            self.segments.append((start, end, *(parent or (-1, -1))))
        self.media += [(medium, start + medium.start) for medium in segment.media]
        self.offset = end
        return start, end

    def score(self, segment: Segment, start: int, before: int, row: int, sequence: int, origin: str) -> None:
        """Add the scored tokens of a segment that begins at `start`; `before` predicts its first token (-1: none)."""
        nll_mask = segment.loss_mask if segment.nll_mask is None else segment.nll_mask
        local = np.flatnonzero(segment.loss_mask | nll_mask)
        for name, parts in self.carried.items():
            values = getattr(segment, name)
            if values is not None:
                parts.append(values[local])
        if local.size == 0:
            return
        predict_at = start + local - 1
        if local[0] == 0:
            if before < 0:
                raise DataError(
                    "the first token of a sequence cannot be scored: nothing comes before it",
                    where=origin or None,
                    remedy="give the row a prompt, or use a template or tokenizer that begins with a BOS token",
                )
            predict_at[0] = before
        zeros = np.zeros(local.size, dtype=np.float32)
        columns = self.scored
        columns["predict_at"].append(predict_at)
        columns["labels"].append(segment.token_ids[local])
        columns["sequence_ids"].append(np.full(local.size, sequence))
        self.row_ids.append(np.full(local.size, row))
        columns["loss_mask"].append(segment.loss_mask[local])
        columns["nll_mask"].append(nll_mask[local])
        columns["advantages"].append(zeros if segment.advantages is None else segment.advantages[local])
        columns["behavior_logps"].append(zeros if segment.behavior_logps is None else segment.behavior_logps[local])
        columns["versions"].append(zeros if segment.versions is None else segment.versions[local])

    def add_tree(self, tree: Tree, position_fn: PositionFn) -> None:
        trunk_positions, branch_positions = position_fn(tree)
        first, row = len(self.group_ids), len(self.row_owners)
        owners = [first + n for n in tree.owners]
        self.row_owners += owners
        trunk = self.lay(tree.trunk, trunk_positions, None)
        # Scored trunk tokens belong to the tree's first sequence: a conversation's own, or a pair's chosen one
        # (ORPO's negative log-likelihood of the prompt).
        self.score(tree.trunk, trunk[0], -1, row, first, tree.origin)
        has_trunk = trunk[1] > trunk[0]
        ends = {} if tree.branches else {first: trunk[1]}  # of each sequence
        for n, (branch, positions) in enumerate(zip(tree.branches, branch_positions, strict=True)):
            start, end = self.lay(branch, positions, trunk if has_trunk else None)
            ends[owners[n]] = end if end > start else trunk[1]
            self.score(branch, start, trunk[1] - 1 if has_trunk else -1, row + n, owners[n], tree.origin)
        self.score_at += [end - 1 for end in ends.values()]
        for segment in tree.sequences:
            if segment.follows:
                continue
            self.group_ids.append(tree.id if segment.place is None else segment.place[0])
            self.sequence_columns.append(dict(segment.columns))
        if len(tree.units) == 2:
            self.pairs.append((first, first + 1))
            self.pair_columns.append(dict(tree.columns))


def _columns(prefix: str, rows: list[dict[str, float]]) -> dict[str, torch.Tensor]:
    names = sorted({name for row in rows for name in row})
    return {
        f"{prefix}/{name}": torch.tensor([row.get(name, float("nan")) for row in rows], dtype=torch.float32)
        for name in names
    }


def collate(trees: Sequence[Tree], position_fn: PositionFn = text_positions) -> TokenBatch:
    """Lay trees end to end, in the order given, as one TokenBatch on the CPU.

    Raises DataError where a sequence's first token is scored and nothing precedes it.
    """
    assert trees, "a microbatch has at least one tree"
    layout = _Layout()
    for tree in trees:
        layout.add_tree(tree, position_fn)
    scored: dict[str, Any] = {
        name: torch.as_tensor(np.concatenate(parts) if parts else np.zeros(0)).to(SCORED_DTYPES[name])
        for name, parts in layout.scored.items()
    }
    carried: dict[str, Any] = {
        name: torch.as_tensor(np.concatenate(parts)) for name, parts in layout.carried.items() if parts
    }
    for name, values in carried.items():
        assert values.shape == scored["labels"].shape, f"some of these trees carry {name} and others do not"
    bounds = torch.tensor(layout.segments, dtype=torch.int32).reshape(-1, 4)
    if len(layout.row_owners) > len(layout.group_ids):
        rows = np.concatenate(layout.row_ids) if layout.row_ids else np.zeros(0)
        carried["row_ids"] = torch.as_tensor(rows).to(torch.int64)
        carried["row_owners"] = torch.tensor(layout.row_owners, dtype=torch.int64)
    return TokenBatch(
        token_ids=torch.as_tensor(np.concatenate(layout.tokens)).to(torch.int64),
        position_ids=torch.as_tensor(np.concatenate(layout.positions, axis=-1)).to(torch.int64),
        query_start=bounds[:, 0].contiguous(),
        query_end=bounds[:, 1].contiguous(),
        parent_start=bounds[:, 2].contiguous(),
        parent_end=bounds[:, 3].contiguous(),
        **scored,
        pairs=torch.tensor(layout.pairs, dtype=torch.int64).reshape(-1, 2),
        group_ids=torch.tensor(layout.group_ids, dtype=torch.int64),
        score_at=torch.tensor(layout.score_at, dtype=torch.int64),
        columns=_columns("sequence", layout.sequence_columns) | _columns("pair", layout.pair_columns),
        media=tuple(medium for medium, _ in layout.media),
        media_at=tuple(at for _, at in layout.media),
        twins=twins(trees),
        **carried,
    )


def twins(trees: Sequence[Tree]) -> torch.Tensor:
    """i64[S]: a number for each sequence, the same for those with the same tokens, scored places and media, whichever
    trees they are in and however these are cut: what a loss pulls up in one it may pull down in the other."""
    return torch.tensor([number for tree in trees for number in _contents(tree)], dtype=torch.int64)


def _contents(tree: Tree) -> list[int]:
    found = []
    for unit in tree.units or ((),):
        parts = [tree.trunk, *unit]
        starts = [0, *accumulate(map(len, parts))]
        digest = hashlib.blake2b(digest_size=8)
        for values in ([s.token_ids.astype(np.int64) for s in parts], [s.loss_mask for s in parts]):
            for one in values:
                digest.update(one.tobytes())
        media = [(m.kind, m.key, at + m.start) for s, at in zip(parts, starts, strict=False) for m in s.media]
        if len(unit) > 1:  # where one begins anew is part of it
            digest.update(repr(starts).encode())
        digest.update(repr(media).encode())
        found.append(int.from_bytes(digest.digest(), "little", signed=True))
    return found
