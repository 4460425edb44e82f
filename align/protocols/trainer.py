"""What stages ask of a trainer: updates, log-probabilities, and versions of the policy for engines to load."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from align.protocols.trees import Tree

Metrics = dict[str, float]
CI95 = "/ci95"
"""Ends the name of half the width of a metric's 95 % interval."""


@dataclass(frozen=True, slots=True)
class Publication:
    """One version of the policy, ready for engines to load.

    version: the stage's step. kind: "adapter" (peft layout folder), "weights" (safetensors of whole parameters) or
    "base" (nothing to load: the engine's own folder is the policy). path: of the folder. digest: `digest_arrays` of
    what an engine must hold after loading. rank: the adapter's LoRA rank.
    """

    version: int
    kind: Literal["adapter", "weights", "base"]
    path: str
    digest: str
    rank: int = 0


def digest_arrays(arrays: Mapping[str, np.ndarray]) -> str:
    """SHA-256 over names, shapes, dtypes and bytes, in order of name: equal digests mean bit-equal weights."""
    h = hashlib.sha256()
    for name in sorted(arrays):
        a = np.ascontiguousarray(arrays[name])
        h.update(f"{name}|{a.shape}|{a.dtype.str}|".encode())
        h.update(a.view(np.uint8).reshape(-1).data if a.size else b"")
    return h.hexdigest()


class Trainer(Protocol):
    """The policy: forward, update, publish, save. Packs trees itself. All methods are coroutines.

    `step` runs one optimizer update over all trees (any number of microbatches); counts are global over them.
    `progress` is the fraction of the stage's updates done before this one, in [0, 1). The trainer adds half an update,
    so that neither the first nor the last update is spent at a learning rate of zero.
    """

    async def step(self, trees: Sequence[Tree], *, step: int, progress: float) -> Metrics:
        """One update; its metrics by flat name. Raises NonFiniteError after several in a row whose loss or gradient is
        not finite (those leave the weights alone), LostError where a process is gone."""
        ...

    async def evaluate(self, trees: Sequence[Tree]) -> Metrics:
        """The losses' metrics of `trees` as one batch, without gradient and dropout."""
        ...

    async def logps(self, trees: Sequence[Tree]) -> list[list[np.ndarray]]:
        """Per tree, per sequence: f32[n] log-probabilities of its scored tokens under the policy, in order; those of
        a trunk come before its first branch's. Computed without dropout in the packing of a `step` over the same trees,
        so that before an update they are that step's own, to the bit."""
        ...

    async def numerics(self) -> dict[str, Any]:
        """What log-probabilities depend on beside weights and tokens, as plain JSON: dtype, device, temperature,
        versions of libraries and code. Values stored under it are never taken for those of another computation."""
        ...

    async def forward(self) -> dict[str, Any]:
        """How sequences are computed, as plain JSON. layout, attention: the module's; words: both for a person; slower:
        what was given up that costs speed, and why; notes: what else a user may want to know."""
        ...

    async def publish(self, folder: Path, version: int) -> Publication:
        """Write what engines load of this version into `folder`, with the digest of what they must then hold."""
        ...

    async def save(self, folder: Path) -> None:
        """Write model, optimizer and random state into an existing empty folder; the caller commits it."""
        ...

    async def restore(self, folder: Path) -> None:
        """Continue from what `save` wrote, on any number of ranks. Raises CheckpointError where it does not fit."""
        ...

    async def write_model(self, folder: Path) -> None:
        """Write what a user loads: the adapter in peft layout, or the whole model in transformers layout."""
        ...

    async def close(self) -> None:
        """End its processes; closing twice is harmless."""
        ...
