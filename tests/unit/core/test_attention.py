"""The attention kernels compute the same over packed trees. Flash attention has no CPU kernel: a plain one of the same
signature stands in for it, so that what is proved here is the gathering; tests/gpu compares the kernels themselves."""

from __future__ import annotations

import itertools
import shutil
from functools import wraps
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch.nn.attention.flex_attention import flex_attention

from align.data.packing import collate
from align.errors import Unsupported
from align.model.attention import flex, varlen
from align.model.attention.flex import BLOCK, flex_attention_over, touched_blocks
from align.model.attention.interface import kernels_for, packed_attention_forward
from align.model.attention.plan import AttentionPlan, plan_attention
from align.model.policy_module import PolicyModule
from align.protocols.trees import Segment, Tree
from tests.unit.core.families import make_family
from tests.unit.core.trees import conversation, group, pair

CPU, F32, BF16 = torch.device("cpu"), torch.float32, torch.bfloat16


def some_trees() -> list[Tree]:
    rng = np.random.default_rng(1)
    no_trunk = Tree(3, Segment(np.zeros(0, np.int64), np.zeros(0, bool)), (conversation(rng, 0).trunk,))
    return [conversation(rng, 0), pair(rng, 1), group(rng, 2), no_trunk, pair(rng, 4)]


def some_blocks(plan: AttentionPlan) -> tuple[tuple[int, int], ...]:
    """Three or four tokens inside every segment that has so many, one of them a segment's first tokens."""
    long = [(start, end) for start, end, *_ in plan.segments if end - start > 3]
    return tuple((start + n % 2, min(end, start + n % 2 + 4)) for n, (start, end) in enumerate(long))


def visible(
    segments: list[tuple[int, int, int, int]], window: int | None, blocks: tuple[tuple[int, int], ...] = ()
) -> np.ndarray:
    """bool[T, T], by the definition: itself causally, its parent, and all of its block; places count from the trunk's
    first token."""
    seen = np.zeros((segments[-1][1],) * 2, dtype=bool)
    for start, end, first, last in segments:
        chain = [*range(first, last), *range(start, end)]
        for place, q in enumerate(chain):
            if q >= start:
                near = chain[: place + 1] if window is None else chain[max(0, place + 1 - window) : place + 1]
                seen[q, near] = True
    for first, last in blocks:
        for q in range(first, last):
            seen[q, q:last] = True
            seen[q, first if window is None else max(first, q - window + 1) : q] = True
    return seen


def dense(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, softcap: float | None, sinks: Tensor | None
) -> Tensor:
    """The definition, T x T: [1, Hq, T, D] -> [1, T, Hq, D]."""
    repeat = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
    scores = q @ k.transpose(-1, -2) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    weights = scores.masked_fill(~mask, float("-inf"))
    if sinks is not None:
        weights = torch.cat([weights, sinks[None, :, None, None].expand(1, -1, q.shape[2], 1)], -1)
    return (weights.softmax(-1)[..., : k.shape[2]] @ v).transpose(1, 2)


def plain_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> Tensor:
    """torch.nn.attention.varlen.varlen_attn, written out: bottom-right aligned, window as (tokens before, after)."""
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32 and window_size[1] == 0 and query.shape[-1] % 8 == 0
    assert query.dtype == key.dtype == value.dtype
    assert enable_gqa == (query.shape[1] != key.shape[1]) and scale is not None
    bounds = zip(itertools.pairwise(cu_seq_q.tolist()), itertools.pairwise(cu_seq_k.tolist()), strict=True)
    outputs = []
    for (q0, q1), (k0, k1) in bounds:
        assert q1 - q0 <= max_q and k1 - k0 <= max_k
        distance = torch.arange(k1 - k0 - (q1 - q0), k1 - k0)[:, None] - torch.arange(k1 - k0)
        mask = (distance >= 0) & ((distance <= window_size[0]) | (window_size[0] < 0))
        q, k, v = (x.transpose(0, 1)[None] for x in (query[q0:q1], key[k0:k1], value[k0:k1]))
        outputs.append(dense(q, k, v, mask, scale, None, None)[0])
    return torch.cat(outputs)


def tensors(tokens: int, width: int = 16, heads: int = 4, kv_heads: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, h, tokens, width) for h in (heads, kv_heads, kv_heads)]
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]


def outcome(out: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    return [out.detach(), *torch.autograd.grad((out * cotangent).sum(), inputs)]


CASES: list[tuple[str, dict[str, Any]]] = [
    *((kernel, {"sliding_window": window}) for kernel in ("sdpa", "varlen", "flex") for window in (None, 1, 3, 6)),
    *((kernel, {"softcap": 1.5, "sliding_window": window}) for kernel in ("sdpa", "flex") for window in (None, 4)),
    *((kernel, {"s_aux": True, "sliding_window": window}) for kernel in ("sdpa", "flex") for window in (None, 4)),
    *((kernel, {"blocks": True, "sliding_window": window}) for kernel in ("sdpa", "flex") for window in (None, 3)),
    ("sdpa", {"blocks": True, "softcap": 1.5, "sliding_window": 3}),
]


@pytest.mark.parametrize(("kernel", "options"), CASES)
@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_every_kernel_gives_the_softmax_over_trunk_and_own_past(
    kernel: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(varlen, "varlen_attn", plain_varlen)
    plan = plan_attention(collate(some_trees()), kernel)
    plan.blocks = some_blocks(plan) if "blocks" in options else ()
    options = {name: value for name, value in options.items() if name != "blocks"}
    inputs = tensors(plan.segments[-1][1])
    if "s_aux" in options:
        options = options | {"s_aux": torch.tensor([0.5, -1.0, 2.0, 0.0], requires_grad=True)}
        inputs.append(options["s_aux"])
    q, k, v = inputs[:3]
    mask = torch.tensor(visible(plan.segments, options["sliding_window"], plan.blocks))
    wanted = outcome(dense(q, k, v, mask, 0.3, options.get("softcap"), options.get("s_aux")), inputs)
    given = [x.detach() for x in (q, k, v)] if kernel == "flex" else [q, k, v]  # it has no backward on a CPU
    with torch.set_grad_enabled(kernel != "flex"):
        out, _ = packed_attention_forward(torch.nn.Module(), *given, None, scaling=0.3, align_plan=plan, **options)
    assert out.shape == (1, q.shape[2], 4, 16)
    if kernel == "flex":
        torch.testing.assert_close(out, wanted[0], atol=2e-5, rtol=1e-5)
        return
    for found, expected in zip(outcome(out, inputs), wanted, strict=True):
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)


def test_flash_attention_refuses_blocks() -> None:
    plan = AttentionPlan([(0, 6, 0, 0)], CPU, "varlen", blocks=((1, 4),))
    with pytest.raises(Unsupported, match="blocks of tokens"):
        packed_attention_forward(torch.nn.Module(), *tensors(6), None, align_plan=plan)


def test_a_block_over_the_edge_of_flex_attentions_blocks_is_visible_on_both_sides() -> None:
    plan = AttentionPlan([(0, 300, 0, 0)], CPU, "flex", blocks=((120, 140),))
    mask = plan.derived("flex", flex.plan_flex).mask(plan, None)
    dense = mask.to_dense()[0, 0]
    assert dense[0, 1] and not dense[0, 2] and not dense[1, 2]


def test_heads_of_odd_width_and_without_parents_go_through_varlen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(varlen, "varlen_attn", plain_varlen)
    rng = np.random.default_rng(1)
    batch = collate([conversation(rng, 0), conversation(rng, 1)])
    inputs = tensors(batch.token_ids.numel(), width=12, kv_heads=4)
    outs = [
        packed_attention_forward(torch.nn.Module(), *inputs, None, align_plan=plan_attention(batch, kernel))[0]
        for kernel in ("sdpa", "varlen")
    ]
    for a, b in zip(*(outcome(out, inputs) for out in outs), strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-5)


def test_under_autocast_flash_attention_gets_half_precision_throughout(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[torch.dtype] = set()

    @wraps(plain_varlen)
    def spying(query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        seen.add(query.dtype)
        return plain_varlen(query, *args, **kwargs)

    monkeypatch.setattr(varlen, "varlen_attn", spying)
    module = PolicyModule(make_family("qwen3"), autocast=BF16)
    batch = collate(some_trees())
    expected = module(batch).logps
    module.use("shared", "varlen")
    assert (module(batch).logps - expected).abs().mean() < 0.05
    assert seen == {BF16}


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch compiles for a CPU with g++")
@pytest.mark.parametrize("options", [{}, {"window": 200, "softcap": 2.0}])
def test_flex_attention_compiles_once_for_rows_of_all_lengths(options: dict[str, Any]) -> None:
    """Forward only: compiled FlexAttention has no backward on a CPU. Blocks that need no mask are among them."""
    torch.compiler.reset()
    compiled = torch.compile(flex_attention, dynamic=True)
    counters["stats"].clear()
    for first, second in ((300, 130), (413, 390), (129, 512)):
        segments = [(0, first, 0, 0), (first, first + second, 0, first), (first + second, first + second + 260, 0, 0)]
        plan = AttentionPlan(segments, CPU, "flex")
        q, k, v = (x.detach() for x in tensors(segments[-1][1]))
        window, softcap = options.get("window"), options.get("softcap")
        with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
            patch.setattr(flex, "flex_attention", compiled)
            out = flex_attention_over(q, k, v, plan, scaling=0.3, sliding_window=window, softcap=softcap)
        wanted = dense(q, k, v, torch.tensor(visible(segments, window)), 0.3, softcap, None)
        torch.testing.assert_close(out, wanted, atol=2e-5, rtol=1e-5)
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("window", [None, 1, 60, 128, 500])
def test_blocks_hold_every_visible_pair_and_whole_ones_nothing_else(window: int | None) -> None:
    rng = np.random.default_rng(0)
    segments, at = [], 0
    for _ in range(4):
        trunk = (at, at + int(rng.integers(200, 700)))
        segments.append((*trunk, 0, 0))
        at = trunk[1]
        for _ in range(int(rng.integers(0, 4))):
            size = int(rng.integers(1, 400))
            segments.append((at, at + size, *trunk))
            at += size
    pad = -at % BLOCK
    seen = np.pad(visible(segments, window), ((0, pad), (0, pad)))
    n = seen.shape[0] // BLOCK
    blocks = seen.reshape(n, BLOCK, n, BLOCK)
    touched, whole = touched_blocks(segments, at, window)
    assert np.array_equal(touched, blocks.any(axis=(1, 3)))
    exact = blocks.all(axis=(1, 3))  # a block of queries of two branches asks the mask even for their trunk
    assert not (whole & ~exact).any() and whole.sum() >= 0.5 * exact.sum()
    assert whole.any() == (window is None or window > BLOCK)


def test_what_the_segments_do_not_describe_is_refused() -> None:
    plan = AttentionPlan([(0, 3, 0, 0)], CPU)
    q, k, v = tensors(3)

    def call(**options: Any) -> None:
        packed_attention_forward(torch.nn.Module(), q, k, v, options.pop("mask", None), align_plan=plan, **options)

    call()
    for options, what in (
        ({"mask": torch.ones(1, 1, 3, 3)}, "a mask of its own"),
        ({"position_bias": torch.ones(3)}, "a position bias"),
        ({"is_causal": False}, "what comes after"),
    ):
        with pytest.raises(Unsupported, match=what):
            call(**options)
    plan.kernel = "varlen"
    for options, what in (
        ({"softcap": 1.0}, "no soft-capping"),
        ({"s_aux": torch.ones(4)}, "no sinks"),
        ({"dropout": 0.1}, "no dropout"),
    ):
        with pytest.raises(Unsupported, match=what):
            call(**options)


def test_auto_is_sdpa_on_a_cpu_and_flash_in_half_precision_on_a_gpu() -> None:
    gpu = torch.device("cuda")
    assert kernels_for("auto", CPU, BF16) == ("sdpa",)
    assert kernels_for("auto", gpu, BF16)[0] == "varlen" and kernels_for("auto", gpu, F32) == ("sdpa",)
    assert kernels_for("flex", gpu, F32) == ("flex",) and kernels_for("auto", gpu, BF16, dropout=True) == ("sdpa",)
    with pytest.raises(Unsupported, match="drops no attention weights"):
        kernels_for("varlen", gpu, BF16, dropout=True)
    for word, device, dtype, what in (
        ("varlen", CPU, BF16, "needs an NVIDIA GPU"),
        ("flex", CPU, F32, "needs an NVIDIA GPU"),
        ("varlen", gpu, F32, "bfloat16 or float16, not in float32"),
        ("magic", gpu, BF16, "no attention of this version"),
    ):
        with pytest.raises(Unsupported, match=what):
            kernels_for(word, device, dtype)


def test_flash_attention_of_a_torch_that_is_not_told_of_groups_is_not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch 2.11 has no `enable_gqa`; its kernel takes fewer heads of keys as they come."""
    told: list[dict[str, Any]] = []

    def older(*args: Any, scale: float | None = None, window_size: tuple[int, int] = (-1, -1)) -> Tensor:
        told.append({"scale": scale, "window_size": window_size})
        q, k, *_ = args
        return plain_varlen(*args, scale=scale, window_size=window_size, enable_gqa=q.shape[1] != k.shape[1])

    plan = plan_attention(collate(some_trees()), "varlen")
    inputs = tensors(plan.segments[-1][1])
    found = []
    for kernel in (plain_varlen, older):
        monkeypatch.setattr(varlen, "varlen_attn", kernel)
        found.append(packed_attention_forward(torch.nn.Module(), *inputs, None, align_plan=plan)[0])
    assert told and torch.equal(*found)
