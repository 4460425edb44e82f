"""`reference: cached`: log-probabilities under what a stage starts from, computed once and carried by its trees.

At the stage's start the policy is its own reference, so one pass of the trainer without gradient gives the values; no
second model and no reference forward is needed afterwards. They are stored by content. The name of a file is a hash of
all that decides its values, so one that is found is right, and whatever changes has another name:

    weights     the bytes of the files that a model and an adapter are loaded from
    tokens      ids and scored positions of every tree (template, tokenizer, data and max_length act through them)
    arithmetic  what the trainer says of itself (`Trainer.numerics`), its code and the versions of its libraries

Packing, threads and learning are no part of it: they change the last bit, or nothing.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from align.protocols.trainer import Trainer
from align.protocols.trees import Segment, Tree
from align.stages.files import sha256_file, sync_folder

if TYPE_CHECKING:
    from align.recipe.capabilities import TrainStage
    from align.stages.backend import Start
    from align.stages.context import Context

FORMAT = 1
PROGRESS_S = 10.0  # between two lines on how far the pass is
CHUNK_BUDGETS = 4  # microbatches' worth of tokens between two looks at whether the user wants to stop
_READ = (".safetensors", ".json", ".py")  # what models, adapters and their code are loaded from


async def cached_reference(
    context: Context, stage: TrainStage, start: Start, trainer: Trainer, trees: list[Tree], held: list[Tree]
) -> tuple[list[Tree], list[Tree]]:
    """The stage's trees and those of its evaluation with `reference_logps`, from the cache or from `trainer`.

    trainer: as it was made from `start`, before any update and before a checkpoint is restored. Raises Interrupted.
    """
    weights = await asyncio.to_thread(weights_digest, start)
    facts = {"weights": weights, "numerics": await trainer.numerics()}
    ready = []
    for name, some in (("", trees), (" (eval)", held)):
        cache = ReferenceCache(
            folder=context.run.path.parent / ".cache" / "reference",  # keyed by content: runs beside this one share it
            facts=facts,
            trainer=trainer,
            label=f"{stage.id}{name}: reference log-probabilities",
            chunk_tokens=CHUNK_BUDGETS * stage.packing.budget(gpu=True),
            say=context.report.message,
            raise_if_stopped=lambda: context.raise_if_stopped(stage.id),
        )
        ready.append(await cache.attach(some) if some else some)
    return ready[0], ready[1]


def weights_digest(start: Start) -> dict[str, dict[str, str]]:
    """SHA-256 of every file that the weights and their code are read from, by name; never a file's name, size or date
    alone: those can stay while the content changes."""
    folders = {"base": start.base, "adapter": start.adapter}
    return {name: _files(folder) for name, folder in folders.items() if folder is not None}


def _files(folder: Path) -> dict[str, str]:
    top = {p for p in folder.iterdir() if p.is_file() and p.suffix in _READ}
    files = sorted(top | set(folder.rglob("*.py")))
    return {file.relative_to(folder).as_posix(): sha256_file(file) for file in files}


def tree_digest(tree: Tree) -> bytes:
    """SHA-256 of what a tree's log-probabilities depend on: its segments' tokens, which of them are scored, and which
    images stand where. Its id, origin and columns are left out, so equal rows share their values."""
    h = hashlib.sha256()
    for segment in (tree.trunk, *tree.branches):
        h.update(len(segment).to_bytes(8, "little"))
        h.update(np.ascontiguousarray(segment.token_ids, dtype="<i8").tobytes())
        h.update(np.packbits(_scored(segment)).tobytes())
        for medium in segment.media:
            h.update(f"{medium.kind}|{medium.key}|{medium.start}|".encode())
    return h.digest()


def attached(tree: Tree, values: np.ndarray) -> Tree:
    """The tree with `reference_logps` f32[n] in every segment. values: f32[k], those of its scored tokens, in order:
    trunk, then branches. Zero stands where a token is not scored, and is never read."""
    segments, at = [], 0
    for segment in (tree.trunk, *tree.branches):
        scored = _scored(segment)
        whole = np.zeros(len(segment), dtype=np.float32)
        end = at + int(scored.sum())
        whole[scored] = values[at:end]
        segments.append(replace(segment, reference_logps=whole))
        at = end
    assert at == len(values), f"tree {tree.id}: {len(values)} values for {at} scored tokens"
    return replace(tree, trunk=segments[0], branches=tuple(segments[1:]))


def _scored(segment: Segment) -> np.ndarray:
    """bool[n]: the tokens that a forward scores, as packing chooses them."""
    return segment.loss_mask if segment.nll_mask is None else segment.loss_mask | segment.nll_mask


@dataclass(frozen=True)
class Stored:
    """Values of U different trees. digests u8[U, 32]: of each tree; ends i64[U]: where its values end in values f32."""

    digests: np.ndarray
    ends: np.ndarray
    values: np.ndarray

    @classmethod
    def of(cls, digests: Sequence[bytes], found: Sequence[np.ndarray]) -> Stored:
        return cls(
            np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 32),
            np.cumsum([len(one) for one in found], dtype=np.int64),
            np.concatenate(found).astype(np.float32),
        )

    @classmethod
    def read(cls, path: Path, key: str, digests: Sequence[bytes]) -> Stored:
        """Raises SafetensorError, OSError or ValueError where the file is not what `write` left under `key`."""
        with safe_open(path, framework="np") as file:
            said = file.metadata() or {}
            stored = cls(*(file.get_tensor(name) for name in ("digests", "ends", "values")))
        if said.get("key") != key or said.get("sha256") != stored.checksum:
            raise ValueError("its checksum differs")
        if stored.digests.tobytes() != b"".join(digests):
            raise ValueError("it was made for other trees")
        return stored

    def write(self, path: Path, key: str) -> None:
        """Write aside and rename: a reader sees the whole file or none."""
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        aside = path.with_name(f".{key}.{uuid4().hex[:8]}")
        try:
            save_file(self.arrays, aside, metadata={"key": key, "sha256": self.checksum})
            with aside.open("rb") as handle:
                os.fsync(handle.fileno())
            aside.replace(path)
        finally:
            aside.unlink(missing_ok=True)
        sync_folder(path.parent)

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        return {"digests": self.digests, "ends": self.ends, "values": self.values}

    @property
    def checksum(self) -> str:
        h = hashlib.sha256()
        for name, array in self.arrays.items():
            h.update(f"{name}|{array.dtype.str}|{array.shape}|".encode())
            h.update(np.ascontiguousarray(array).tobytes())
        return h.hexdigest()

    def by_digest(self) -> dict[bytes, np.ndarray]:
        starts = np.concatenate([[0], self.ends[:-1]])
        rows = zip(self.digests, starts, self.ends, strict=True)
        return {digest.tobytes(): self.values[start:end] for digest, start, end in rows}


@dataclass
class ReferenceCache:
    """The files below `folder`, and the trainer that fills them.

    facts: plain JSON that decides the values, beside the trees. label: beginning of what it says; say: to whom.
    raise_if_stopped: asked before every chunk of about `chunk_tokens` tokens.
    """

    folder: Path
    facts: Mapping[str, Any]
    trainer: Trainer
    label: str
    chunk_tokens: int
    say: Callable[[str], None]
    raise_if_stopped: Callable[[], None] = lambda: None

    async def attach(self, trees: Sequence[Tree]) -> list[Tree]:
        """`trees` in their order, with reference log-probabilities."""
        begun = time.perf_counter()
        digests = [tree_digest(tree) for tree in trees]
        unique = dict(zip(digests, trees, strict=True))
        key = self.key(list(unique))
        path = self.folder / f"{key}.safetensors"
        stored = await asyncio.to_thread(self._load, path, key, list(unique))
        if stored is not None:
            self.say(f"{self.label}: from the cache, {_seconds(begun)}")
        else:
            self.say(f"{self.label}: computing them for {len(unique)} trees")
            stored = Stored.of(list(unique), await self._compute(list(unique.values())))
            self.say(f"{self.label}: computed for {len(unique)} trees in {_seconds(begun)}")
            if np.isfinite(stored.values).all():
                await asyncio.to_thread(self._keep, stored, path, key)
            else:  # perhaps by a fault of the machine, which a file would make last
                self.say(f"{self.label}: some are not finite, so they are not stored")
        values = stored.by_digest()
        return [attached(tree, values[digest]) for tree, digest in zip(trees, digests, strict=True)]

    def key(self, digests: Sequence[bytes]) -> str:
        """SHA-256, in hexadecimal, of everything that decides the values of the trees with these digests."""
        h = hashlib.sha256(json.dumps([FORMAT, self.facts], sort_keys=True).encode() + b"\0")
        for digest in digests:
            h.update(digest)
        return h.hexdigest()

    async def _compute(self, trees: Sequence[Tree]) -> list[np.ndarray]:
        """f32[k] per tree: its scored tokens, trunk before branches."""
        found: list[np.ndarray] = []
        begun = said = time.perf_counter()
        for chunk in _chunks(trees, self.chunk_tokens):
            self.raise_if_stopped()
            found += [np.concatenate(sequences) for sequences in await self.trainer.logps(chunk)]
            now = time.perf_counter()
            if now - said >= PROGRESS_S and len(found) < len(trees):
                said, left = now, (now - begun) / len(found) * (len(trees) - len(found))
                self.say(f"{self.label}: {len(found)} of {len(trees)} trees, about {left:.0f} s left")
        return found

    def _keep(self, stored: Stored, path: Path, key: str) -> None:
        try:
            stored.write(path, key)
        except (SafetensorError, OSError) as error:  # another user's folder, a full disk
            self.say(f"{self.label}: they are not kept: {path.parent}: {error}")

    def _load(self, path: Path, key: str, digests: Sequence[bytes]) -> Stored | None:
        """What the file holds; None where there is none, or it is not what was written (said, and made again)."""
        try:
            return Stored.read(path, key, digests)
        except FileNotFoundError:
            return None
        except (SafetensorError, OSError, ValueError) as error:
            why = str(error).strip().partition("\n")[0] or type(error).__name__
            self.say(f"{self.label}: the file {path} is damaged ({why}) and is made again")
            return None


def _chunks(trees: Sequence[Tree], tokens: int) -> Iterator[list[Tree]]:
    """Neighbours together, up to `tokens` tokens; a larger tree alone."""
    chunk: list[Tree] = []
    size = 0
    for tree in trees:
        if chunk and size + tree.tokens > tokens:
            yield chunk
            chunk, size = [], 0
        chunk.append(tree)
        size += tree.tokens
    if chunk:
        yield chunk


def _seconds(begun: float) -> str:
    return f"{time.perf_counter() - begun:.1f} s"
