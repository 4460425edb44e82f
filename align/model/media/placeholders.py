"""Which tokens of a row stand for media, and the positions that a model gives to the tokens of a tree."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from align.mediastore import read_tensors
from align.protocols.trees import Medium, Segment, Tree

TYPES = {"image": 1, "video": 2, "audio": 3}  # transformers' mm_token_type_ids; 0 is text
MOST_GRIDS = 1 << 16  # a few numbers each
# whose image tokens see each other both ways, in every layer ("Gemma 3 Technical Report", 2503.19786, and its code)
BOTH_WAYS = ("gemma3",)

Positions = tuple[np.ndarray, list[np.ndarray]]


def placeholder(config: Any, kind: str) -> int:
    """The token that a medium's features replace, as the configuration names it."""
    for name in (f"{kind}_token_id", f"{kind}_token_index", "image_token_id", "image_token_index"):
        found = getattr(config, name, None)
        if isinstance(found, int):
            return found
    raise AttributeError(f"{type(config).__name__} names no token that stands for {kind}")


def type_ids(config: Any, token_ids: np.ndarray, media: Sequence[Medium], at: Sequence[int]) -> np.ndarray:
    """i64[T]: for each token 0 where it is text, else the type of the medium whose features replace it.

    at: where each medium's tokens begin. The same ids outside media (a prompt that spells a mark) are text.
    """
    found = np.zeros(len(token_ids), dtype=np.int64)
    for medium, start in zip(media, at, strict=True):
        own = slice(start, start + medium.length)
        found[own] = np.where(token_ids[own] == placeholder(config, medium.kind), TYPES[medium.kind], 0)
    return found


def inside_media(length: int, media: Sequence[Medium], at: Sequence[int]) -> Tensor:
    """bool[length]: the tokens of a row that belong to media, which begin at `at`."""
    found = torch.zeros(length, dtype=torch.bool)
    for medium, start in zip(media, at, strict=True):
        found[start : start + medium.length] = True
    return found


def slots_of(types: np.ndarray, media: Sequence[Medium], at: Sequence[int]) -> list[int]:
    """Of each medium, how many of its tokens features replace."""
    return [int((types[start : start + medium.length] > 0).sum()) for medium, start in zip(media, at, strict=True)]


def runs(types: np.ndarray, media: Sequence[Medium], at: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """(start, end) of every run of tokens that features replace, each within one medium."""
    found = []
    for medium, start in zip(media, at, strict=True):
        inside = np.concatenate([[0], types[start : start + medium.length] > 0, [0]]).astype(np.int8)
        edges = np.flatnonzero(np.diff(inside)) + start
        found += [(int(a), int(b)) for a, b in zip(edges[::2], edges[1::2], strict=True)]
    return tuple(found)


class MRope:
    """Positions i64[3, n] by the model's own `get_rope_index`, over trunk and branch together where a branch has media.

    A branch of text continues at the largest of its trunk's positions over the three axes, plus one. What of a medium
    decides positions (its grid, seconds between frames) is read once and kept.
    """

    def __init__(self, model: Any):
        self.config, self.index = model.config, model.base_model.get_rope_index
        self.known = inspect.signature(self.index).parameters
        self._grids: dict[str, dict[str, Tensor]] = {}

    def __call__(self, tree: Tree) -> Positions:
        trunk = self._positions([tree.trunk])
        return trunk, [self._after(tree, trunk, branch) for branch in tree.branches]

    def _after(self, tree: Tree, trunk: np.ndarray, branch: Segment) -> np.ndarray:
        if branch.media:
            return self._positions([tree.trunk, branch])[:, len(tree.trunk) :]
        start = int(trunk.max()) + 1 if trunk.size else 0
        return np.tile(np.arange(start, start + len(branch)), (3, 1))

    def _positions(self, segments: list[Segment]) -> np.ndarray:
        tokens = np.concatenate([segment.token_ids for segment in segments])
        media = [medium for segment in segments for medium in segment.media]
        if not media:
            return np.tile(np.arange(len(tokens)), (3, 1))
        offsets = np.cumsum([0, *(len(segment) for segment in segments)])
        at = [int(o) + m.start for o, segment in zip(offsets, segments, strict=False) for m in segment.media]
        grids: dict[str, list[Tensor]] = {}
        for medium in media:
            for name, tensor in self._grid(medium).items():
                grids.setdefault(name, []).append(tensor)
        found, _ = self.index(
            input_ids=torch.as_tensor(tokens)[None],
            mm_token_type_ids=torch.as_tensor(type_ids(self.config, tokens, media, at))[None],
            **{name: torch.cat(tensors) for name, tensors in grids.items()},
        )
        positions: np.ndarray = found[:, 0].numpy()
        return positions

    def _grid(self, medium: Medium) -> dict[str, Tensor]:
        if medium.key not in self._grids:
            if len(self._grids) >= MOST_GRIDS:
                self._grids.clear()
            tensors = read_tensors(medium)
            self._grids[medium.key] = {name: t for name, t in tensors.items() if name in self.known}
        return self._grids[medium.key]


def positions_of(model: Any, text: Callable[[Tree], Positions]) -> Callable[[Tree], Positions]:
    """How the tokens of a tree are counted for `model`: as text is, or along three axes under M-RoPE."""
    return MRope(model) if hasattr(model.base_model, "get_rope_index") else text
