"""Model x layout with pictures: in every family, however trees are laid out, log-probabilities and gradients are those
of the model's own forward over padded rows. Float32; gradients by a random cotangent, relative to the largest."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from align.data.microbatches import Budget, split_to_budget
from align.data.packing import PositionFn, collate, text_positions
from align.model import adapters
from align.model.backbone import set_attention
from align.model.fused.exchange import fuse
from align.model.load import load_model
from align.model.media.placeholders import positions_of, type_ids
from align.model.policy_module import PolicyModule
from align.model.probe.choose import probe
from align.protocols.trees import Medium, Tree
from align.recipe.adapter import Adapter
from tests.tiny_vlms import FAMILIES
from tests.unit.core.pictures import VIDEO_MARKS, Workshop, add_video, open_workshop
from tests.unit.core.test_families import branch_by_branch, gradients
from tests.unit.model.tiny import train_a_little

Split = Callable[[list[Tree]], list[list[Tree]]]
LAYOUTS: dict[str, Split] = {
    "one row of all trees": lambda trees: [trees],
    "one tree a microbatch": lambda trees: [[tree] for tree in trees],
    "groups split, each part with the trunk's pictures": lambda trees: [
        [part]
        for tree in trees
        for part in split_to_budget(tree, Budget(len(tree.trunk) + 8, 100), keep_together=False)
    ],
    "trunk repeated per branch": lambda trees: [
        [part for tree in trees for part in (branch_by_branch([tree]) if tree.branches else [tree])]
    ],
}


@dataclass
class Known:
    """A family's shop, its probed module, and what the model's own padded forward gives for the shop's trees."""

    shop: Workshop
    module: PolicyModule
    positions: PositionFn
    values: Tensor
    grads: list[Tensor]

    def logps(self, split: Split) -> list[Tensor]:
        return [self.module(collate(part, self.positions)).logps for part in split(self.shop.trees())]


@pytest.fixture(scope="module", params=FAMILIES)
def known(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Known]:
    shop = open_workshop(request.param, tmp_path_factory.mktemp("media"))
    own = own_logps(shop, shop.trees())
    values, grads = own.detach(), gradients(shop.model, [own])
    module = PolicyModule(shop.model)
    assert probe(module) < 1e-5
    yield Known(shop, module, positions_of(shop.model, text_positions), values, grads)


def own_logps(shop: Workshop, trees: list[Tree]) -> Tensor:
    """Scored log-probabilities of every sequence, in the model's own forward over rows padded on the right."""
    rows: list[tuple[np.ndarray, np.ndarray, list[Medium], list[int]]] = []
    for tree in trees:
        for branch in tree.branches or (None,):
            parts = [tree.trunk] if branch is None else [tree.trunk, branch]
            starts = np.cumsum([0, *map(len, parts)])
            media = [(m, int(at) + m.start) for at, part in zip(starts, parts, strict=False) for m in part.media]
            ids, mask = (np.concatenate([getattr(p, name) for p in parts]) for name in ("token_ids", "loss_mask"))
            rows.append((ids, mask, [m for m, _ in media], [at for _, at in media]))
    longest = max(len(ids) for ids, *_ in rows)
    pad = [longest - len(ids) for ids, *_ in rows]
    ids = torch.tensor(np.stack([np.pad(row, (0, gap)) for (row, *_), gap in zip(rows, pad, strict=True)]))
    types = np.stack(
        [np.pad(type_ids(shop.model.config, r[0], *r[2:]), (0, g)) for r, g in zip(rows, pad, strict=True)]
    )
    seen = torch.tensor([[1] * (longest - gap) + [0] * gap for gap in pad])
    model_type = shop.model.config.model_type
    named = {"gemma3": "token_type_ids", "qwen2_vl": "mm_token_type_ids", "qwen2_5_vl": "mm_token_type_ids"}
    named["qwen3_vl"] = "mm_token_type_ids"
    kwargs: dict[str, Any] = {named[model_type]: torch.tensor(types)} if model_type in named else {}
    kwargs |= by_hand(shop, [row[2] for row in rows])
    logits = shop.model(input_ids=ids, attention_mask=seen, use_cache=False, **kwargs).logits[:, :-1]
    logps = torch.log_softmax(logits, -1).gather(-1, ids[:, 1:, None])[..., 0]
    return torch.cat([one[: len(r[0]) - 1][torch.as_tensor(r[1][1:])] for one, r in zip(logps, rows, strict=True)])


def by_hand(shop: Workshop, rows: list[list[Medium]]) -> dict[str, Tensor]:
    """The pictures of a batch of rows as the family's processor returns them: with tiles, Idefics 3 has a row's tiles
    on one axis and LLaVA-OneVision an image's; both fill up with zeros."""
    media = [medium for row in rows for medium in row]
    tensors = [shop.tensors[medium.key] for medium in media]
    if shop.model.config.model_type not in ("idefics3", "smolvlm", "llava_onevision"):
        return {name: torch.cat([one[name] for one in tensors]) for name in tensors[0]}
    per_image = shop.model.config.model_type == "llava_onevision"
    groups = [[m] for m in media] if per_image else rows
    found: dict[str, Tensor] = {}
    for name, example in tensors[0].items():
        if example.dim() < 3:
            found[name] = torch.cat([one[name] for one in tensors])
            continue
        joined = [torch.cat([shop.tensors[m.key][name][0] for m in group] or [example[0][:0]]) for group in groups]
        most = max(len(one) for one in joined)
        found[name] = torch.stack([torch.cat([one, one.new_zeros(most - len(one), *one.shape[1:])]) for one in joined])
    return found


def assert_same(known: Known, logps: list[Tensor]) -> None:
    torch.testing.assert_close(torch.cat(logps).detach(), known.values, atol=1e-5, rtol=1e-5)
    assert abs(torch.cat(logps).mean() - known.values.mean()) < 1e-6  # a likelihood loss
    largest = max(g.abs().max() for g in known.grads)
    assert largest > 0.1
    found = gradients(known.module.model, logps)
    worst = max((a - b).abs().max() for a, b in zip(found, known.grads, strict=True)) / largest
    assert worst < 1e-5, f"gradients differ by {worst:.2g} of the largest"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_log_probs_and_gradients_are_those_of_the_models_own_padded_forward(known: Known, layout: str) -> None:
    towers = [name for name, p in known.shop.model.named_parameters() if "language_model" not in name]
    assert len(towers) > 10  # and their gradients are among those that are compared
    assert_same(known, known.logps(LAYOUTS[layout]))


def test_a_row_a_sequence_serves_too(known: Known) -> None:
    before = known.module.layout, known.module.attention
    known.module.use("padded", "eager")
    assert known.module.media is not None
    computed = known.module.media.computed
    try:
        assert_same(known, known.logps(LAYOUTS["one row of all trees"]))
    finally:
        known.module.use(*before)
    assert known.module.media.computed == computed + 3, "each picture once, however many rows and blocks hold it"


def test_trees_without_pictures_are_computed_as_ever(known: Known) -> None:
    text = known.shop.trees()[:1]
    before = known.module.media.computed
    packed = known.module(collate(text, known.positions)).logps
    torch.testing.assert_close(packed.detach(), known.values[: len(packed)], atol=1e-5, rtol=1e-5)
    assert known.module.media.computed == before


def test_another_picture_gives_other_values(known: Known) -> None:
    rng = np.random.default_rng(2)
    tree = known.shop.trees()[1]
    other = Tree(1, known.shop.segment(rng, 6, 1), tree.branches)
    same = [known.module(collate([one], known.positions)).logps for one in (tree, other)]
    assert (same[0] - same[1]).abs().max() > 1e-3


def test_an_adapter_is_fused_without_changing_a_number(known: Known) -> None:
    """As the trainer has it: transformers' sdpa in the tower, the language model's modules exchanged for fused ones."""
    batch = collate(known.shop.trees(), known.positions)
    found = []
    for fused in (False, True):
        model = load_model(known.shop.folder, dtype=torch.float32)
        adapters.attach(model, Adapter(rank=2, alpha=4), None, seed=0)
        train_a_little(model)
        if fused:
            assert sum(fuse(model).values()) > 0
        module = PolicyModule(model)
        assert probe(module) < 1e-5 and module.layout == "shared"
        logps = module(batch).logps
        trained = [p for p in model.parameters() if p.requires_grad]
        grads = torch.autograd.grad((logps * torch.arange(len(logps))).sum(), trained, allow_unused=True)
        found.append([logps.detach(), *(torch.zeros(1) if g is None else g for g in grads)])
    largest = max(g.abs().max() for g in found[0][1:])
    assert (found[0][0] - known.values).abs().max() > 1e-3, "the adapter does something"
    torch.testing.assert_close(found[1][0], found[0][0], atol=1e-5, rtol=1e-5)
    assert max((a - b).abs().max() for a, b in zip(found[0][1:], found[1][1:], strict=True)) / largest < 1e-5


def test_videos_stand_beside_pictures(known: Known) -> None:
    """Two videos and a picture before two answers; the model's own forward on each sequence alone."""
    shop, family = known.shop, known.shop.model.config.model_type
    if family not in VIDEO_MARKS:
        pytest.skip(f"the tiny {family} has no processor for videos")
    rng = np.random.default_rng(7)
    for n in range(2):
        add_video(shop, f"{family}-video-{n}", rng.integers(0, 256, (4, 56, 56 + 28 * n, 3), dtype=np.uint8))
    trunk = shop.segment(rng, 8, 3, 0, 4)
    tree = Tree(0, trunk, tuple(shop.segment(rng, n, scored=True) for n in (4, 3)))
    packed = known.module(collate([tree], known.positions)).logps
    tensors: dict[str, list[Tensor]] = {}
    for medium in trunk.media:
        for name, t in shop.tensors[medium.key].items():
            tensors.setdefault(name, []).append(t)
    kwargs: dict[str, Any] = {name: torch.cat(parts) for name, parts in tensors.items()}
    alone = []
    set_attention(shop.model, "eager")
    for branch in tree.branches:
        ids = np.concatenate([trunk.token_ids, branch.token_ids])
        if family.startswith("qwen"):
            types = type_ids(shop.model.config, ids, trunk.media, [m.start for m in trunk.media])
            kwargs["mm_token_type_ids"] = torch.tensor(types)[None]
        row = torch.tensor(ids)[None]
        logits = shop.model(input_ids=row, use_cache=False, **kwargs).logits[0, len(trunk) - 1 : -1]
        alone.append(torch.log_softmax(logits, -1).gather(-1, row[0, len(trunk) :, None])[:, 0])
    known.module.use(known.module.layout, known.module.attention)
    torch.testing.assert_close(packed, torch.cat(alone), atol=1e-5, rtol=1e-5)
