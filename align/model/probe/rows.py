"""What the probe computes with: two random trees, the first on a small picture where the model takes images, as a
packed batch and as rows alone."""

from __future__ import annotations

import logging
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from align.mediastore import processor_files, tensors_path
from align.model.backbone import takes_media
from align.model.load import quiet
from align.model.media.placeholders import Positions, placeholder, positions_of
from align.model.padded import sequences_of
from align.protocols.trees import Medium, Segment, Tree
from align.types import TokenBatch

log = logging.getLogger(__name__)

TREES = ((7, (5, 3)), (4, (6, 1)))  # tokens of a trunk and of its branches
LONG = ((150, (140, 3)), (20, (9,)))  # beyond what layers compress or cut into blocks; on a few layers alone
LONG_TOKENS = max(trunk + max(branches) for trunk, branches in LONG)
PICTURE = 48  # pixels of a side, before the processor makes of it what it does
TEXTS = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")  # of a processor, beside its media


class Alone(NamedTuple):
    """A sequence by itself: its tokens, how many of them are its trunk's, and what stands in that."""

    tokens: list[int]
    trunk: int
    media: tuple[Medium, ...] = ()


def two_tree_batch(
    vocabulary: int,
    device: torch.device | str,
    seed: int = 0,
    *,
    model: Any = None,
    prompt: Segment | None = None,
    sizes: tuple[tuple[int, tuple[int, ...]], ...] = TREES,
) -> tuple[TokenBatch, list[Alone]]:
    """Two random trees of two branches as a packed batch, and the same four sequences alone.

    model: whose positions they have, and whose marks of media do not occur in random text; text's where it is None.
    prompt: the trunk of the first tree, in place of random text. sizes: tokens of trunks and of their branches.
    """
    generator = torch.Generator().manual_seed(seed)
    seeing = model is not None and takes_media(model)
    marks = {placeholder(model.config, "image"), placeholder(model.config, "video")} if seeing else set()
    usual = [token for token in range(min(vocabulary, len(marks) + 1)) if token not in marks]

    def text(size: int) -> Segment:
        drawn = torch.randint(0, vocabulary, (size,), generator=generator).tolist()
        return Segment(np.array([usual[0] if t in marks else t for t in drawn]), np.zeros(size, dtype=bool))

    trees = []
    for number, (size, branches) in enumerate(sizes):
        trunk = text(size)
        trees.append(Tree(number, trunk if prompt is None or number else prompt, tuple(text(n) for n in branches)))
    positions = _text_positions if model is None else positions_of(model, _text_positions)
    return _laid(trees, [positions(tree) for tree in trees]).to(device), [
        Alone([*tree.trunk.token_ids.tolist(), *b.token_ids.tolist()], len(tree.trunk), tree.trunk.media)
        for tree in trees
        for b in tree.branches
    ]


def long_batch(model: Any) -> tuple[TokenBatch, list[Alone]] | None:
    """`two_tree_batch` of sequences of `LONG_TOKENS` at most; None where the model has fewer positions."""
    config = model.config.get_text_config()
    if (getattr(config, "max_position_embeddings", None) or LONG_TOKENS) < LONG_TOKENS:
        return None
    return two_tree_batch(config.vocab_size, next(model.parameters()).device, seed=1, model=model, sizes=LONG)


def _text_positions(tree: Tree) -> Positions:
    n = len(tree.trunk)
    return np.arange(n), [np.arange(n, n + len(b)) for b in tree.branches]


def _laid(trees: list[Tree], positions: list[Positions]) -> TokenBatch:
    """Every token of the branches is scored. (`align.data.packing` lays what is trained on; models do not know it.)"""
    at = 0
    segments: list[tuple[int, int, int, int]] = []
    predict_at: list[int] = []
    score_at: list[int] = []
    for tree in trees:
        trunk = (at, at + len(tree.trunk))
        segments.append((*trunk, -1, -1))
        at = trunk[1]
        for branch in tree.branches:
            segments.append((at, at + len(branch), *trunk))
            predict_at += [trunk[1] - 1, *range(at, at + len(branch) - 1)]
            at += len(branch)
            score_at.append(at - 1)
    branches = [b for tree in trees for b in tree.branches]
    labels = np.concatenate([b.token_ids for b in branches])
    bounds = torch.tensor(segments, dtype=torch.int32)
    starts = [int(start) for start, _, first, _ in segments if first < 0]
    rows = [row for tree in trees for row in (tree.trunk, *tree.branches)]
    laid = [p for trunk, following in positions for p in (trunk, *following)]
    return TokenBatch(
        token_ids=torch.as_tensor(np.concatenate([row.token_ids for row in rows])),
        position_ids=torch.as_tensor(np.concatenate(laid, axis=-1)),
        query_start=bounds[:, 0],
        query_end=bounds[:, 1],
        parent_start=bounds[:, 2],
        parent_end=bounds[:, 3],
        predict_at=torch.tensor(predict_at),
        labels=torch.as_tensor(labels),
        sequence_ids=torch.as_tensor(np.repeat(np.arange(len(branches)), [len(b) for b in branches])),
        loss_mask=torch.ones(len(labels), dtype=torch.bool),
        nll_mask=torch.ones(len(labels), dtype=torch.bool),
        advantages=torch.zeros(len(labels)),
        behavior_logps=torch.zeros(len(labels)),
        versions=torch.zeros(len(labels), dtype=torch.int32),
        pairs=torch.tensor([[0, 1], [2, 3]]),
        group_ids=torch.tensor([tree.id for tree in trees for _ in tree.branches]),
        score_at=torch.tensor(score_at),
        media=tuple(m for tree in trees for m in tree.trunk.media),
        media_at=tuple(s + m.start for s, tree in zip(starts, trees, strict=True) for m in tree.trunk.media),
    )


def alone_batches(batch: TokenBatch, plain: list[Alone]) -> list[TokenBatch]:
    """Each sequence of a batch in a row of its own: one trunk, whose last tokens are scored."""
    found = []
    device = batch.token_ids.device
    for n, (places, row) in enumerate(zip(sequences_of(batch), plain, strict=True)):
        tokens, first = len(places), row.trunk
        own, none = torch.tensor([[0, tokens]], dtype=torch.int32, device=device), torch.tensor([-1], dtype=torch.int32)
        scored = (batch.sequence_ids == n).nonzero()[:, 0]
        pick = lambda x, at=scored: x[at]  # noqa: E731
        one = replace(
            batch,
            token_ids=batch.token_ids[places.to(device)],
            position_ids=batch.position_ids[..., places.to(device)],
            query_start=own[:, 0],
            query_end=own[:, 1],
            parent_start=none.to(device),
            parent_end=none.to(device),
            predict_at=torch.arange(first - 1, tokens - 1, device=device),
            labels=pick(batch.labels),
            sequence_ids=torch.zeros(tokens - first, dtype=batch.sequence_ids.dtype, device=device),
            loss_mask=pick(batch.loss_mask),
            nll_mask=pick(batch.nll_mask),
            advantages=pick(batch.advantages),
            behavior_logps=pick(batch.behavior_logps),
            versions=pick(batch.versions),
            pairs=torch.zeros(0, 2, dtype=batch.pairs.dtype, device=device),
            group_ids=batch.group_ids[n : n + 1],
            score_at=torch.tensor([tokens - 1], device=device),
            media=row.media,
            media_at=tuple(medium.start for medium in row.media),
        )
        found.append(one)
    return found


class Picture:
    """A prompt with a small random picture by the processor in the model's folder; prompt None where the model takes
    none or the folder has no processor. Its tensors lie in a store that is gone after `close`."""

    def __init__(self, model: Any):
        self.prompt: Segment | None = None
        self._store: tempfile.TemporaryDirectory[str] | None = None
        made = _processed(model) if takes_media(model) else None
        if made is None:
            return
        self._store = tempfile.TemporaryDirectory(prefix="align-probe-")
        ids = made["input_ids"][0].numpy()
        slots = np.flatnonzero(ids == placeholder(model.config, "image"))
        tensors = {name: t.contiguous() for name, t in made.items() if name not in TEXTS and isinstance(t, Tensor)}
        save_file(tensors, tensors_path(self._store.name, "probe"))
        start, length = int(slots[0]), int(slots[-1] - slots[0]) + 1
        medium = Medium("image", "probe", self._store.name, start, length, patches=0)
        self.prompt = Segment(ids, np.zeros(len(ids), dtype=bool), media=(medium,))

    def close(self) -> None:
        if self._store is not None:
            self._store.cleanup()


def _processed(model: Any) -> dict[str, Any] | None:
    from transformers import AutoProcessor

    folder = Path(str(model.name_or_path or ""))
    if not processor_files(folder):
        log.info("%s has no processor beside it: probed on text alone", type(model).__name__)
        return None
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 256, (PICTURE, PICTURE, 3), dtype=np.uint8)
    with quiet():
        processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
        # Gemma's processors expand the mark of a beginning, the others that of an image
        mark = getattr(processor, "boi_token", None) or processor.image_token
        made: dict[str, Any] = processor(images=[Image.fromarray(pixels)], text=[f"a {mark} b"], return_tensors="pt")
    return made
