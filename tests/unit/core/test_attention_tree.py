"""Own part and trunk part, joined by their log-sum-exps, are attention with a mask: values and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from align.model.attention.plan import AttentionPlan
from align.model.attention.sdpa import sdpa_attention
from align.model.attention.tree import SHORT, plan_trees, tree_attention

TREES = {
    "short": [(5, (3, 1, 7)), (2, ()), (1, (1,)), (30, (17, 16))],
    "long": [(200, (150, 300)), (SHORT, (SHORT + 1,)), (140, ())],
    "mixed": [(40, (200, 3, 129)), (300, (5, 6)), (16, (16, 16))],
}


def row(trees: list[tuple[int, tuple[int, ...]]]) -> list[tuple[int, int, int, int]]:
    segments, at = [], 0
    for trunk, branches in trees:
        start, at = at, at + trunk
        segments.append((start, at, 0, 0))
        for size in branches:
            segments.append((at, at + size, start, start + trunk))
            at += size
    return segments


def visible(segments: list[tuple[int, int, int, int]]) -> Tensor:
    tokens = segments[-1][1]
    mask = torch.zeros(tokens, tokens, dtype=torch.bool)
    for start, end, parent_start, parent_end in segments:
        mask[start:end, parent_start:parent_end] = True
        mask[start:end, start:end] = torch.ones(end - start, end - start, dtype=torch.bool).tril()
    return mask


def dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scaling: float) -> Tensor:
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scores = (q @ k.transpose(-1, -2) * scaling).masked_fill(~mask, -torch.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2)


def tensors(tokens: int, heads: tuple[int, int], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    made = [torch.randn(1, tokens, h, 16, generator=g, dtype=torch.float64) for h in (heads[0], heads[1], heads[1])]
    return [x.to(dtype).transpose(1, 2).requires_grad_() for x in made]


@pytest.mark.parametrize("name", TREES)
@pytest.mark.parametrize("heads", [(4, 2), (6, 1), (2, 2)], ids=str)
def test_values_and_gradients_equal_masked_attention_in_float64(name: str, heads: tuple[int, int]) -> None:
    segments = row(TREES[name])
    plan = plan_trees(AttentionPlan(segments, torch.device("cpu")))
    assert plan is not None
    mine = tensors(segments[-1][1], heads)
    exact = [x.detach().double().requires_grad_() for x in mine]
    out = tree_attention(*mine, plan, 0.3)
    expected = dense(*exact, visible(segments), 0.3)
    torch.testing.assert_close(out.double(), expected, atol=2e-6, rtol=1e-5)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    found = torch.autograd.grad(out, mine, cotangent)
    wanted = torch.autograd.grad(expected, exact, cotangent.double())
    for a, b in zip(found, wanted, strict=True):
        assert (a - b).abs().max() / b.abs().max() < 1e-5


def test_long_segments_are_slices_and_short_ones_share_a_call() -> None:
    plan = plan_trees(AttentionPlan(row(TREES["mixed"]), torch.device("cpu")))
    assert plan is not None
    assert len(plan.slices) == 3 and plan.trunks == [(0, 40, 40, 372), (372, 672, 672, 683), (683, 699, 699, 731)]
    assert {batch.length: batch.size for batch in plan.batches} == {16: 6, 48: 1}


def test_branches_that_do_not_stand_side_by_side_are_left_to_another_path() -> None:
    segments = [(0, 4, 0, 0), (4, 6, 0, 4), (6, 9, 0, 0), (9, 11, 0, 4)]
    assert plan_trees(AttentionPlan(segments, torch.device("cpu"))) is None


def test_half_precision_is_computed_in_float32() -> None:
    segments = row(TREES["mixed"])
    plan = plan_trees(AttentionPlan(segments, torch.device("cpu")))
    assert plan is not None
    q, k, v = tensors(segments[-1][1], (4, 2), torch.bfloat16)
    out = tree_attention(q, k, v, plan, 0.25)
    expected = dense(*(x.detach().double() for x in (q, k, v)), visible(segments), 0.25)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), expected, atol=1e-6, rtol=2**-8)


@pytest.mark.parametrize(("window", "path"), [(12, "trees"), (13, "trees"), (11, "masked")])
def test_a_window_that_reaches_over_every_sequence_is_none(window: int, path: str) -> None:
    plan = AttentionPlan(row([(5, (3, 7)), (2, ())]), torch.device("cpu"))
    q, k, v = tensors(17, (4, 2))
    out = sdpa_attention(q, k, v, plan, scaling=0.3, sliding_window=window)
    assert ("sdpa" not in plan.cache) == (path == "trees")
    distance = torch.tensor([*range(5), *range(5, 8), *range(5, 12), *range(2)])
    near = distance[:, None] - distance[None] < window
    expected = dense(*(x.detach().double() for x in (q, k, v)), visible(plan.segments) & near, 0.3)
    torch.testing.assert_close(out.double(), expected, atol=2e-6, rtol=1e-5)
