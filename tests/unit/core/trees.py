"""Random trees for tests of packing, forward and losses."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from align.protocols.trees import Segment, Tree


def segment(rng: np.random.Generator, n: int, *, scored: bool, vocabulary: int = 97, rollout: bool = False) -> Segment:
    extra = {}
    if rollout:
        extra = {
            "advantages": np.full(n, rng.normal(), dtype=np.float32),
            "behavior_logps": rng.normal(-4.0, 0.3, n).astype(np.float32),
            "versions": np.zeros(n, dtype=np.int32),
        }
    return Segment(rng.integers(0, vocabulary, n), np.full(n, scored), **extra)


def conversation(rng: np.random.Generator, id: int) -> Tree:
    n = int(rng.integers(6, 14))
    mask = rng.random(n) < 0.6
    mask[0], mask[-1] = False, True
    return Tree(id, Segment(rng.integers(0, 97, n), mask), origin=f"rows.jsonl:{id + 1}")


def pair(rng: np.random.Generator, id: int) -> Tree:
    branches = tuple(segment(rng, int(rng.integers(2, 8)), scored=True) for _ in range(2))
    return Tree(id, segment(rng, int(rng.integers(3, 9)), scored=False), branches, origin=f"pairs.jsonl:{id + 1}")


def group(rng: np.random.Generator, id: int, size: int = 4) -> Tree:
    branches = tuple(segment(rng, int(rng.integers(1, 9)), scored=True, rollout=True) for _ in range(size))
    return Tree(id, segment(rng, int(rng.integers(3, 9)), scored=False), branches)


def labelled(rng: np.random.Generator, id: int, **columns: float) -> Tree:
    """A text and its label: class 0, 1 or 2 where `columns` say nothing else."""
    text = segment(rng, int(rng.integers(4, 12)), scored=False)
    return Tree(id, replace(text, columns=columns or {"class": float(id // 3 % 3)}), origin=f"labels.jsonl:{id + 1}")


def unpaired(rng: np.random.Generator, id: int) -> Tree:
    branch = replace(segment(rng, int(rng.integers(2, 8)), scored=True), columns={"desirable": float(id % 2)})
    return Tree(id, segment(rng, int(rng.integers(3, 9)), scored=False), (branch,), origin=f"kto.jsonl:{id + 1}")
