"""A training example: a trunk that is computed once and the branches that continue it, with what stands in them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Literal

import numpy as np


@dataclass(frozen=True, slots=True)
class Medium:
    """An image, a video's frames or a sound that stands in a segment: a reference. Its tensors lie in a media store
    (`align.mediastore`) and are read where they are computed with.

    kind: "image", "video" or "audio". key: hash of content, limits and processor; equal keys, equal tensors.
    store: folder of the store. start: first of its tokens in the segment; length: how many tokens of the segment stand
    for it, marks that its processor writes around and inside it included. patches: what its tower computes for it, in
    the tower's own units (a patch budget counts these).
    """

    kind: Literal["image", "video", "audio"]
    key: str
    store: str
    start: int
    length: int
    patches: int

    @property
    def identity(self) -> tuple[str, str, int, int]:
        """What it shows, and where: media that agree in it are one, whichever store holds them."""
        return self.kind, self.key, self.start, self.length


REPEATED = -2

# the first column of a row's label: see `align.recipe.labels.Labels.columns`
FIRST_LABEL_COLUMNS = ("class", "labels/0", "targets/0")


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of tokens of one tree: its trunk, or one of its branches.

    token_ids: i64[n]
    loss_mask: bool[n]; True where the token is scored by the loss. A trunk of an offline conversation has its
        assistant tokens here, a prompt has none, a completion has all of them (its end-of-turn token included).
    nll_mask: bool[n] or None (= loss_mask); tokens of the negative log-likelihood term, where a loss has one.
    advantages: f32[n] or None; behavior_logps: f32[n] or None, the sampler's log-probabilities;
    versions: i32[n] or None, the policy version that sampled each token; -1 of one that nobody sampled, REPEATED of one
        that a branch which `follows` another repeats of it: context, which is neither scored nor observed again.
    reference_logps: f32[n] or None, log-probabilities under the reference where they are known before the stage
        (`reference: cached`); 0 where no token is scored. They belong to this segment after this trunk and no other.
    proximal_logps: f32[n] or None, log-probabilities under the policy at the start of a batch that makes several
        updates; 0 where no token is scored.
    columns: one float per name for this sequence (desirable, weight, score, a label's...).
    media: what stands in it, in order of `start`; no token of it is scored.
    place: (id of a tree, number of a sequence in it) where this is, or ends, a sequence of a tree that was given and
        now stands in another: rows that begin alike are computed as one tree, and groups are cut between branches.
    follows: whether it goes on with the sequence of the branch before it, behind another context: an episode that began
        anew. Losses count both as one sequence, and no microbatch holds one without the other.
    """

    token_ids: np.ndarray
    loss_mask: np.ndarray
    nll_mask: np.ndarray | None = None
    advantages: np.ndarray | None = None
    behavior_logps: np.ndarray | None = None
    versions: np.ndarray | None = None
    reference_logps: np.ndarray | None = None
    proximal_logps: np.ndarray | None = None
    columns: Mapping[str, float] = field(default_factory=dict)
    media: tuple[Medium, ...] = ()
    place: tuple[int, int] | None = None
    follows: bool = False

    def __len__(self) -> int:
        return int(self.token_ids.shape[0])

    def same_input(self, other: Segment) -> bool:
        """Whether a model is shown the same: the same tokens, and the same media in the same places. Tokens alone do
        not say so: all pictures have the same."""
        return np.array_equal(self.token_ids, other.token_ids) and [m.identity for m in self.media] == [
            m.identity for m in other.media
        ]

    @property
    def labelled(self) -> bool:
        """Whether it carries a label: what is scored then is the sequence, and none of its tokens."""
        return any(name in self.columns for name in FIRST_LABEL_COLUMNS)


@dataclass(frozen=True, slots=True)
class Tree:
    """One training example: a trunk that is computed once, and the branches that continue it.

    A conversation is a trunk alone (one sequence: the trunk itself). A pair is a trunk with two branches, chosen
    first. A GRPO group is a trunk with G branches; an unpaired completion is a trunk with one.

    id: unique in its stage; packing lays trees in order of it, so results do not depend on arrival.
    columns: one float per name for the tree (a pair's margin, for instance).
    origin: "file:line" of the row it came from, for error messages and reports.
    """

    id: int
    trunk: Segment
    branches: tuple[Segment, ...] = ()
    columns: Mapping[str, float] = field(default_factory=dict)
    origin: str = ""

    @property
    def tokens(self) -> int:
        """Tokens that a packed forward computes for this tree (the trunk counted once)."""
        return len(self.trunk) + sum(len(b) for b in self.branches)

    @property
    def media(self) -> tuple[Medium, ...]:
        """In the order in which packing lays their tokens: the trunk's, then each branch's."""
        return tuple(medium for segment in (self.trunk, *self.branches) for medium in segment.media)

    @property
    def patches(self) -> int:
        """Patches that a packed forward computes for this tree (the trunk's media counted once)."""
        return sum(medium.patches for medium in self.media)

    @property
    def sequences(self) -> tuple[Segment, ...]:
        """What is computed as one row: each branch behind its trunk, or the trunk where it stands alone. Losses count
        each as one, but for those that follow another (`owners`)."""
        return self.branches or (self.trunk,)

    @property
    def owners(self) -> tuple[int, ...]:
        """For each of `sequences` the number, from 0 on, of what losses count as one sequence."""
        begun = [not segment.follows for segment in self.sequences]
        assert begun[0], "the first branch of a tree follows none"
        return tuple(n - 1 for n in accumulate(begun))

    @property
    def units(self) -> tuple[tuple[Segment, ...], ...]:
        """Branches by the sequence that they belong to: what is never cut apart."""
        found: list[list[Segment]] = []
        for branch in self.branches:
            if branch.follows and found:
                found[-1].append(branch)
            else:
                found.append([branch])
        return tuple(map(tuple, found))


@dataclass(frozen=True)
class Counts:
    """Global numbers over all ranks and microbatches of one update; what losses divide by. tokens, nll_tokens: those in
    `loss_mask` and `nll_mask`; sequences: those with a scored token or a label; pairs: trees of two branches."""

    tokens: int
    nll_tokens: int
    sequences: int
    pairs: int
