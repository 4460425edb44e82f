"""Attention over packed trees by torch's variable-length flash attention: one launch a layer, whatever the trees.

Queries are the segments as they stand in the row. The keys of a branch are [trunk; branch], gathered; causal, aligned
bottom-right, as flash attention aligns queries that are fewer than keys. Heads of keys and values are not repeated.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.varlen import varlen_attn

from align.errors import Unsupported

if TYPE_CHECKING:
    from align.model.attention.plan import AttentionPlan

MAX_HEAD = 256


@dataclass(frozen=True)
class Keys:
    """The keys of every segment, one after another.

    index i64[K]: their places in the row, None where no segment has a parent (the row itself serves);
    query_lengths, key_lengths: of the M segments; cu_queries, cu_keys i32[M + 1]: their cumulative sums.
    """

    index: Tensor | None
    query_lengths: list[int]
    key_lengths: list[int]
    cu_queries: Tensor
    cu_keys: Tensor

    def gather(self, x: Tensor) -> Tensor:
        """x [T, H, D] -> [K, H, D]."""
        return x if self.index is None else x.index_select(0, self.index)


def plan_keys(plan: AttentionPlan) -> Keys:
    """Where keys stand and how long segments are. Indices are on the batch's device."""
    assert [start for start, *_ in plan.segments] == [0, *(end for _, end, *_ in plan.segments)][:-1], (
        "segments follow each other without gaps"
    )
    queries = [end - start for start, end, *_ in plan.segments]
    keys = [n + last - first for n, (_, _, first, last) in zip(queries, plan.segments, strict=True)]
    index = None
    if keys != queries:
        ranges = [r for start, end, first, last in plan.segments for r in ((first, last), (start, end)) if r[1] > r[0]]
        index = torch.cat([torch.arange(*bounds) for bounds in ranges]).to(plan.device)
    return Keys(index, queries, keys, _cumulative(queries, plan.device), _cumulative(keys, plan.device))


def _cumulative(lengths: list[int], device: torch.device) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32).to(device)


@cache
def _wants_groups_named(kernel: Callable[..., Any]) -> bool:
    """Whether this torch is to be told that heads share keys. 2.11 is not, and its kernel takes fewer heads of keys as
    they come."""
    return "enable_gqa" in inspect.signature(kernel).parameters


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: AttentionPlan,
    *,
    scaling: float | None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
) -> Tensor:
    """query [1, Hq, T, D], key and value [1, Hkv, T, D] in half precision -> [1, T, Hq, D].

    Raises Unsupported for what the kernel has not: dropout, heads above 256, values of another width than keys, blocks.
    """
    width = query.shape[-1]
    for found, what in (
        (dropout > 0, "dropout on attention weights"),
        (width > MAX_HEAD, f"heads of {width} (at most {MAX_HEAD})"),
        (value.shape[-1] != width, "values of another width than keys"),
        (bool(plan.blocks), "blocks of tokens that see each other both ways"),
    ):
        if found:
            raise Unsupported(f"varlen attention has no {what}", where="model.attention", remedy="use auto")
    keys: Keys = plan.derived("keys", plan_keys)
    q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
    if width % 8:  # the kernel takes multiples of 8; zeros change no score
        q, k, v = (F.pad(x, (0, 8 - width % 8)) for x in (q, k, v))
    grouped: dict[str, Any] = {"enable_gqa": query.shape[1] != key.shape[1]} if _wants_groups_named(varlen_attn) else {}
    out = varlen_attn(
        q.contiguous(),
        keys.gather(k).contiguous(),
        keys.gather(v).contiguous(),
        keys.cu_queries,
        keys.cu_keys,
        max(keys.query_lengths),
        max(keys.key_lengths),
        scale=width**-0.5 if scaling is None else scaling,
        # the kernel's window counts the tokens before a query, ours the query too
        window_size=(-1 if sliding_window is None else sliding_window - 1, 0),
        **grouped,
    )
    assert isinstance(out, Tensor)
    return out[..., :width].unsqueeze(0)
