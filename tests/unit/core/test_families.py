"""Model x layout: in every family, however trees are laid out, log-probabilities and gradients are those of one plain
forward per sequence. Float32; gradients by a random cotangent, relative to the largest."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from align.data.microbatches import Budget, split_to_budget
from align.data.packing import collate, global_counts, text_positions
from align.losses import configure
from align.losses.base import LossInputs
from align.model.backbone import set_attention
from align.model.policy_module import PolicyModule
from align.model.probe.choose import probe
from align.protocols.trees import Tree
from align.types import TokenBatch
from tests.unit.core.families import FAMILIES, STATEFUL, make_family, mrope_positions
from tests.unit.core.trees import conversation, group, pair

Split = Callable[[list[Tree]], list[list[Tree]]]


def trees() -> list[Tree]:
    rng = np.random.default_rng(3)
    return [conversation(rng, 0), pair(rng, 1), group(rng, 2), pair(rng, 3), conversation(rng, 4)]


def parts_of(trees: list[Tree]) -> list[Tree]:
    """Groups cut into parts of a few branches; each part repeats the trunk."""
    return [part for tree in trees for part in split_to_budget(tree, Budget(len(tree.trunk) + 8), keep_together=False)]


def branch_by_branch(trees: list[Tree]) -> list[Tree]:
    return [replace(tree, branches=(b,)) for tree in trees for b in tree.branches] or trees


LAYOUTS: dict[str, Split] = {
    "one row of all trees": lambda trees: [trees],
    "one tree a microbatch": lambda trees: [[tree] for tree in trees],
    "groups split over microbatches": lambda trees: [[part] for part in parts_of(trees)],
    "trunk repeated per branch": lambda trees: [
        [part for tree in trees for part in ([tree] if not tree.branches else branch_by_branch([tree]))]
    ],
}


def batches_of(family: str, split: Split, trees: list[Tree]) -> list[TokenBatch]:
    positions = mrope_positions if family == "qwen2_5_vl" else text_positions
    return [collate(part, positions) for part in split(trees)]


def sequences(trees: list[Tree]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Token ids and loss mask of each sequence."""
    found = []
    for tree in trees:
        for branch in tree.branches or (None,):
            parts = [tree.trunk] if branch is None else [tree.trunk, branch]
            found.append((np.concatenate([p.token_ids for p in parts]), np.concatenate([p.loss_mask for p in parts])))
    return found


def own_logps(model: Any, rows: list[tuple[np.ndarray, np.ndarray]]) -> Tensor:
    """Scored log-probabilities under the model's own forward, one row or a right-padded batch of rows."""
    longest = max(len(ids) for ids, _ in rows)
    ids = torch.tensor(np.stack([np.pad(ids, (0, longest - len(ids))) for ids, _ in rows]))
    padding = {}
    if len(rows) > 1:
        padding["attention_mask"] = torch.tensor([[1] * len(i) + [0] * (longest - len(i)) for i, _ in rows])
    logits = model(input_ids=ids, use_cache=False, **padding).logits[:, :-1]
    logps = torch.log_softmax(logits, -1).gather(-1, ids[:, 1:, None])[..., 0]
    return torch.cat([one[: len(i) - 1][torch.as_tensor(mask[1:])] for one, (i, mask) in zip(logps, rows, strict=True)])


def gradients(model: Any, logps: list[Tensor]) -> list[Tensor]:
    """Of all parameters, by a fixed random cotangent, added up over the parts that `logps` came in."""
    cotangent = torch.randn(sum(x.numel() for x in logps), generator=torch.Generator().manual_seed(0))
    parameters = list(model.parameters())
    total = [torch.zeros_like(p) for p in parameters]
    for part, weights in zip(logps, cotangent.split([x.numel() for x in logps]), strict=True):
        found = torch.autograd.grad((part * weights).sum(), parameters, allow_unused=True)
        for into, one in zip(total, found, strict=True):
            if one is not None:
                into += one
    return total


@cache
def expected(family: str) -> tuple[PolicyModule, Tensor, list[Tensor]]:
    """A probed module, and what one plain forward per sequence gives."""
    model = make_family(family)
    alone = [own_logps(model, [row]) for row in sequences(trees())]
    values, grads = torch.cat(alone).detach(), gradients(model, alone)
    padded = own_logps(model, sequences(trees()))
    assert_same(model, [padded], values, grads)
    module = PolicyModule(model)
    assert probe(module) < 1e-5
    return module, values, grads


def assert_same(model: Any, logps: list[Tensor], values: Tensor, grads: list[Tensor]) -> None:
    torch.testing.assert_close(torch.cat(logps).detach(), values, atol=1e-5, rtol=1e-5)
    largest = max(g.abs().max() for g in grads)
    assert largest > 0.1
    found = gradients(model, logps)
    assert max((a - b).abs().max() for a, b in zip(found, grads, strict=True)) / largest < 1e-5


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_log_probs_and_gradients_are_those_of_one_plain_forward_a_sequence(family: str, layout: str) -> None:
    module, values, grads = expected(family)
    logps = [module(batch).logps for batch in batches_of(family, LAYOUTS[layout], trees())]
    assert_same(module.model, logps, values, grads)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_probe_finds_the_layout_and_remembers_it(family: str) -> None:
    module, _, _ = expected(family)
    assert (module.layout, module.attention) == ("padded" if family in STATEFUL else "shared", "sdpa")


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in STATEFUL])
def test_a_row_a_sequence_serves_every_family(family: str) -> None:
    module, values, grads = expected(family)
    before = module.layout, module.attention
    module.use("padded", "eager")
    try:
        logps = [module(batch).logps for batch in batches_of(family, LAYOUTS["one row of all trees"], trees())]
        assert_same(module.model, logps, values, grads)
    finally:
        module.use(*before)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_dpo_update_is_the_same_in_one_row_and_a_tree_at_a_time(family: str) -> None:
    module, _, _ = expected(family)
    rng = np.random.default_rng(8)
    pairs = [pair(rng, i) for i in range(3)]
    counts = global_counts(pairs)
    chosen = configure("dpo", {"beta": 0.5})

    def update(layout: str) -> tuple[Tensor, list[Tensor]]:
        module.zero_grad()
        total = torch.zeros(())
        for batch in batches_of(family, LAYOUTS[layout], pairs):
            outputs = module(batch)
            inputs = LossInputs(outputs, batch, counts, reference_logps=outputs.logps.detach() * 0.9)
            loss = chosen(inputs).loss
            loss.backward()
            total += loss.detach()
        grads = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in module.parameters()]
        module.zero_grad()
        return total, grads

    (whole, whole_grads), (split, split_grads) = update("one row of all trees"), update("one tree a microbatch")
    torch.testing.assert_close(whole, split, atol=1e-6, rtol=1e-6)
    largest = max(g.abs().max() for g in whole_grads)
    assert max((a - b).abs().max() for a, b in zip(whole_grads, split_grads, strict=True)) / largest < 1e-5


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen3_next", "gpt_oss"])
def test_router_losses_stay_off(family: str) -> None:
    model = make_family(family, output_router_logits=True)
    ids = torch.arange(8)[None]
    assert model(input_ids=ids, labels=ids).aux_loss is not None
    PolicyModule(model)
    set_attention(model, "eager")
    assert model.config.output_router_logits is False
    assert model(input_ids=ids, labels=ids).aux_loss is None


def test_the_three_axes_of_m_rope_reach_the_layers() -> None:
    """Positions with unequal axes, as an image in the prompt makes them, packed and alone."""
    model = make_family("qwen2_5_vl")
    some = trees()[1:2]
    trunk = len(some[0].trunk)
    axes = np.stack([np.arange(trunk), np.arange(trunk) // 2, np.arange(trunk) % 3])
    following = [np.tile(np.arange(trunk, trunk + len(b)), (3, 1)) for b in some[0].branches]
    packed = PolicyModule(model)(collate(some, lambda tree: (axes, following))).logps
    set_attention(model, "eager")
    alone = []
    for (ids, mask), behind in zip(sequences(some), following, strict=True):
        positions = torch.tensor(np.concatenate([axes, behind], axis=1))[:, None]
        row = torch.tensor(ids)[None]
        logits = model(input_ids=row, position_ids=positions, use_cache=False).logits[0, :-1]
        logps = torch.log_softmax(logits, -1).gather(-1, row[0, 1:, None])[:, 0]
        alone.append(logps[torch.as_tensor(mask[1:])])
    torch.testing.assert_close(packed, torch.cat(alone), atol=1e-5, rtol=1e-5)
    straight = PolicyModule(model)(collate(some, mrope_positions)).logps
    assert (straight - packed).abs().max() > 1e-3
