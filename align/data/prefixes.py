"""Conversations that begin alike are computed as one tree: what they share once, a branch for the rest of each.

Questions about one picture, rows under one long system prompt, few-shot examples before every question: packing one
row after another would compute those tokens again for every row of an update. As with completions of one prompt, this
decides only how a batch is computed: a branch sees its trunk and itself, at the positions of the row it was.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from align.protocols.trees import Medium, Segment, Tree

LEAST = 8
"""Tokens that are worth a branch: below, one more segment costs attention what the shared tokens save."""

FLAGS = ("loss_mask", "nll_mask")
VALUES = ("advantages", "behavior_logps", "versions", "reference_logps", "proximal_logps")


def placed(tree: Tree) -> Tree:
    """The tree with every sequence's `place`, by which it is found again however the tree is computed."""
    if not tree.branches:
        return replace(tree, trunk=replace(tree.trunk, place=(tree.id, 0)))
    return replace(tree, branches=tuple(replace(b, place=(tree.id, k)) for k, b in enumerate(tree.branches)))


def share_prefixes(trees: Sequence[Tree], least: int = LEAST) -> list[Tree]:
    """The same sequences, with those that begin with the same tokens and media under one trunk.

    Trees of several branches stay as they are. What is scored is never shared: a trunk ends before the first scored
    token of each of its rows, and has at least `least` tokens. Rows are divided so that few tokens are computed: those
    that share more than the others have a tree of their own where that saves more. Deterministic, whatever the order
    of `trees`; a joined tree has the lowest id of its rows, in whose order its branches stand. Each says in its `place`
    which tree's sequence it is.
    """
    rows = sorted((tree for tree in trees if len(tree.branches) < 2), key=lambda tree: tree.id)
    flat = [_sequence(tree) for tree in rows]
    marks = [_marks(segment)[: _shareable(segment)] for segment in flat]
    order = sorted(range(len(rows)), key=lambda i: (marks[i].tobytes(), rows[i].id))
    depths = [_alike(marks[a], marks[b]) for a, b in itertools.pairwise(order)]
    joined = [tree for tree in trees if len(tree.branches) >= 2]
    alone = set(range(len(rows)))
    for depth, places in _divided([depth if depth >= least else 0 for depth in depths]):
        members = sorted(order[place] for place in places)
        alone -= set(members)
        trunk = replace(_cut(flat[members[0]], 0, depth), columns={}, place=None)
        branches = tuple(replace(_cut(flat[i], depth, len(flat[i])), place=(rows[i].id, 0)) for i in members)
        joined.append(replace(rows[members[0]], trunk=trunk, branches=branches))
    return sorted([*joined, *(rows[i] for i in alone)], key=lambda tree: tree.id)


Group = tuple[int, list[int]]
"""How many tokens are shared, and the places of the rows that share them."""


_Node = tuple[int, int, int, list[Group]]
"""First and last place, tokens saved, groups."""


@dataclass
class _Alike:
    """Neighbouring sorted rows, from `first` on, that share `depth` tokens; `within`: those of them that share
    more."""

    depth: int
    first: int
    within: list[_Node]

    def divided(self, last: int) -> _Node:
        """What saves more: one group of all but those whose own groups save more than joining it, or no such group."""
        apart = sum(saved for _, _, saved, _ in self.within)
        kept = [part for part in self.within if part[2] > (part[1] - part[0] + 1) * self.depth]
        elsewhere = {place for start, end, _, _ in kept for place in range(start, end + 1)}
        members = [place for place in range(self.first, last + 1) if place not in elsewhere]
        together = (len(members) - 1) * self.depth + sum(saved for _, _, saved, _ in kept)
        if len(members) > 1 and together >= apart:
            return self.first, last, together, [group for part in kept for group in part[3]] + [(self.depth, members)]
        return self.first, last, apart, [group for part in self.within for group in part[3]]


def _divided(depths: Sequence[int]) -> list[Group]:
    """Groups of rows. depths[i]: what rows i and i + 1 of the sorted rows share; 0: too little.

    Rows that share d tokens are neighbours, so what may be a group is a node of the tree of common prefixes, which one
    pass over the depths with a stack of open nodes visits from the leaves up (Kasai et al. 2001).
    """
    open_ = [_Alike(0, 0, [])]
    for row, depth in enumerate([*depths, 0]):
        first = row
        closed: list[_Node] = []
        while open_[-1].depth > depth:
            node = open_.pop()
            node.within += closed
            first, closed = node.first, [node.divided(row)]
        if open_[-1].depth < depth:
            open_.append(_Alike(depth, first, closed))
        else:
            open_[-1].within += closed
    return [group for part in open_[0].within for group in part[3]]


def _marks(segment: Segment) -> np.ndarray:
    """Big-endian i64[n], equal where tokens and media are: placeholder tokens alone would say that all pictures are
    the same. Their bytes sort as the numbers do."""
    marks = segment.token_ids.astype(">i8")
    for medium in segment.media:
        digest = hashlib.sha256(f"{medium.kind} {medium.key} {medium.length} {medium.store}".encode()).digest()
        marks[medium.start] = int.from_bytes(digest[:8], "big") >> 1
    return marks


def _alike(a: np.ndarray, b: np.ndarray) -> int:
    n = min(len(a), len(b))
    differ = a[:n] != b[:n]
    return int(differ.argmax()) if differ.any() else n


def _shareable(segment: Segment) -> int:
    """How much of a row may be shared: what comes before its first scored token, and not the whole row."""
    scored = segment.loss_mask if segment.nll_mask is None else segment.loss_mask | segment.nll_mask
    return min(int(scored.argmax()) if scored.any() else len(segment), len(segment) - 1)


def _sequence(tree: Tree) -> Segment:
    """A tree of one sequence as one segment, with the columns of that sequence."""
    if not tree.branches:
        return tree.trunk
    trunk, branch = tree.trunk, tree.branches[0]
    values: dict[str, Any] = {name: _end_to_end(trunk, branch, name) for name in VALUES}
    if trunk.nll_mask is not None or branch.nll_mask is not None:
        values["nll_mask"] = np.concatenate(
            [s.loss_mask if s.nll_mask is None else s.nll_mask for s in (trunk, branch)]
        )
    return Segment(
        np.concatenate([trunk.token_ids, branch.token_ids]),
        np.concatenate([trunk.loss_mask, branch.loss_mask]),
        columns=branch.columns,
        media=(*trunk.media, *_moved(branch.media, len(trunk))),
        **values,
    )


def _end_to_end(trunk: Segment, branch: Segment, name: str) -> np.ndarray | None:
    """A value per token of both; 0 where one of them has none."""
    given = [getattr(segment, name) for segment in (trunk, branch)]
    known = next((values for values in given if values is not None), None)
    if known is None:
        return None
    return np.concatenate(
        [
            np.zeros(len(segment), dtype=known.dtype) if values is None else values
            for segment, values in zip((trunk, branch), given, strict=True)
        ]
    )


def _cut(segment: Segment, start: int, end: int) -> Segment:
    """Tokens `start` to `end` of a segment; no cut is inside a medium, whose tokens are alike or are not as a whole."""
    arrays = {name: getattr(segment, name) for name in ("token_ids", *FLAGS, *VALUES)}
    inside = [medium for medium in segment.media if start <= medium.start < end]
    return replace(
        segment,
        media=_moved(inside, -start),
        **{name: values[start:end] for name, values in arrays.items() if values is not None},
    )


def _moved(media: Sequence[Medium], by: int) -> tuple[Medium, ...]:
    return tuple(replace(medium, start=medium.start + by) for medium in media)
