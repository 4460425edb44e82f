"""The fused head equals the plain computation in float64, values and gradients, whatever the chunk size."""

from __future__ import annotations

import pytest
import torch

from align.model import head
from align.model.head import LogitTransform, fused_head


@pytest.mark.parametrize("transform", [LogitTransform(), LogitTransform(0.7), LogitTransform(1.3, 0.5, 3.0)])
@pytest.mark.parametrize("chunk", [1, 33, 1 << 20])
def test_statistics_and_gradients_equal_float64(
    transform: LogitTransform, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head, "CHUNK_ELEMENTS", chunk)
    g = torch.Generator().manual_seed(0)
    hidden, weight, bias = (torch.randn(s, generator=g, dtype=torch.float64) for s in [(7, 8), (11, 8), (11,)])
    labels = torch.randint(0, 11, (7,), generator=g)
    cotangents = [torch.randn(7, generator=g, dtype=torch.float64) for _ in range(3)]

    single = [t.float().requires_grad_() for t in (hidden, weight, bias)]
    mine = fused_head(single[0], single[1], labels, bias=single[2], transform=transform, statistics=True)
    sum((o * c.float()).sum() for o, c in zip(mine, cotangents, strict=True)).backward()

    double = [t.clone().requires_grad_() for t in (hidden, weight, bias)]
    z = torch.nn.functional.linear(*double) * transform.scale
    if transform.softcap:
        z = transform.softcap * torch.tanh(z / transform.softcap)
    log_p = torch.log_softmax(z / transform.temperature, -1)
    oracle = (log_p.gather(-1, labels[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1), (2 * log_p).logsumexp(-1))
    sum((o * c).sum() for o, c in zip(oracle, cotangents, strict=True)).backward()

    for a, b in zip(mine, oracle, strict=True):
        torch.testing.assert_close(a.double(), b, atol=2e-6, rtol=1e-6)
    for a, b in zip(single, double, strict=True):
        torch.testing.assert_close(a.grad.double(), b.grad, atol=5e-6, rtol=1e-5)


def test_no_logits_are_kept_for_backward() -> None:
    hidden = torch.randn(64, 8, requires_grad=True)
    weight = torch.randn(5000, 8)
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        fused_head(hidden, weight, torch.zeros(64, dtype=torch.int64))
    assert max(saved) == weight.numel(), "the weight itself is the largest thing kept; 64 x 5000 logits would be more"
