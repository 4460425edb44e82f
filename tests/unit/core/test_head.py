"""The fused head equals the plain computation in float64, values and gradients, whatever the tiles."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import pytest
import torch
from torch import Tensor

from align.model import head
from align.model.head import STATISTICS, LogitTransform, fused_head

TRANSFORMS = [LogitTransform(), LogitTransform(0.7), LogitTransform(1.3, 0.5, 3.0)]
TILES = [(1, 1), (33, 5), (16, 11), (1 << 20, 1 << 10)]


def inputs(bias: bool = True) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    return [torch.randn(s, generator=g, dtype=torch.float64) for s in [(7, 8), (11, 8), (11,)][: 3 if bias else 2]]


LABELS = torch.randint(0, 11, (7,), generator=torch.Generator().manual_seed(1))


def oracle(tensors: Sequence[Tensor], transform: LogitTransform) -> dict[str, Tensor]:
    z = torch.nn.functional.linear(*tensors) * transform.scale
    if transform.softcap:
        z = transform.softcap * torch.tanh(z / transform.softcap)
    log_p = torch.log_softmax(z / transform.temperature, -1)
    return {
        "logps": log_p.gather(-1, LABELS[:, None])[:, 0],
        "entropy": -(log_p.exp() * log_p).sum(-1),
        "log_sum_sq": (2 * log_p).logsumexp(-1),
    }


@pytest.fixture(params=TILES, ids=str)
def tile(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(head.TILE, "cpu", request.param)


@pytest.mark.usefixtures("tile")
@pytest.mark.parametrize("transform", TRANSFORMS, ids=["plain", "temperature", "softcap"])
@pytest.mark.parametrize("trained", [(True, True, True), (True, False, False), (False, True, False)], ids=str)
@pytest.mark.parametrize("used", [("logps",), ("logps", *STATISTICS), ("entropy",)], ids="+".join)
def test_statistics_and_gradients_equal_float64(
    transform: LogitTransform, trained: tuple[bool, ...], used: tuple[str, ...]
) -> None:
    want = [name for name in used if name != "logps"]
    cotangents = {name: torch.randn(7, generator=torch.Generator().manual_seed(5)).double() for name in used}
    single = [t.float().requires_grad_(on) for t, on in zip(inputs(), trained, strict=True)]
    mine = fused_head(single[0], single[1], LABELS, bias=single[2], transform=transform, want=want)
    sum((getattr(mine, name) * c.float()).sum() for name, c in cotangents.items()).backward()

    double = [t.clone().requires_grad_() for t in inputs()]
    expected = oracle(double, transform)
    sum((expected[name] * c).sum() for name, c in cotangents.items()).backward()

    for name in ("logps", *want):
        torch.testing.assert_close(getattr(mine, name).double(), expected[name], atol=2e-6, rtol=1e-6)
    for a, b, on in zip(single, double, trained, strict=True):
        if on:
            torch.testing.assert_close(a.grad.double(), b.grad, atol=5e-6, rtol=1e-5)


@pytest.mark.usefixtures("tile")
@pytest.mark.parametrize("tile", [(33, 5)], ids=str, indirect=True)
def test_gradients_equal_finite_differences() -> None:
    tensors = [t.requires_grad_() for t in inputs()]

    def everything(h: Tensor, w: Tensor, b: Tensor) -> list[Tensor]:
        out = fused_head(h, w, LABELS, bias=b, transform=LogitTransform(0.8, 1.2, 4.0), want=STATISTICS)
        return [out.logps, out.entropy, out.log_sum_sq]

    assert torch.autograd.gradcheck(everything, tensors)
    frozen = [tensors[0], *(t.detach() for t in tensors[1:])]
    assert torch.autograd.gradcheck(everything, frozen)


def test_what_is_not_wanted_is_not_given() -> None:
    h, w = (t.float() for t in inputs(bias=False))
    out = fused_head(h, w, LABELS, want=["entropy"])
    assert out.entropy is not None and out.log_sum_sq is None


def test_logits_of_thousands_do_not_overflow() -> None:
    h, w = (t.float() for t in inputs(bias=False))
    h = (h * 1000).requires_grad_()
    out = fused_head(h, w, LABELS, want=STATISTICS)
    (out.logps.sum() + out.entropy.sum() + out.log_sum_sq.sum()).backward()
    assert all(bool(t.isfinite().all()) for t in (out.logps, out.entropy, out.log_sum_sq, h.grad))


@pytest.mark.parametrize(("trained", "dtype"), list(product([False, True], [torch.float32, torch.bfloat16])))
def test_no_logits_are_kept_for_backward(trained: bool, dtype: torch.dtype) -> None:
    hidden = torch.randn(64, 8, requires_grad=True, dtype=dtype)
    weight = torch.randn(5000, 8, requires_grad=trained, dtype=dtype)
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        out = fused_head(hidden, weight, torch.zeros(64, dtype=torch.int64))
    assert out.logps.dtype == torch.float32
    assert max(saved) == weight.numel(), "the weight itself is the largest thing kept; 64 x 5000 logits would be more"
