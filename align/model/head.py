"""The fused head: log-probability, entropy and log-sum-of-squares of scored tokens, without keeping logits.

Hidden states of N scored tokens are multiplied with the output embedding in chunks; each chunk's logits are reduced
to a few float32 numbers per token and thrown away. The backward pass computes them again, chunk by chunk. Memory is
one chunk of logits instead of N x V, whatever the number of tokens.

With z = logits / temperature, p = softmax(z), q = softmax(2z):
    log p(y)        = z_y - lse(z)                  d/dz = onehot(y) - p
    entropy H       = lse(z) - sum p z              d/dz = -p (log p + H)
    log sum p^2     = lse(2z) - 2 lse(z)            d/dz = 2 (q - p)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

CHUNK_ELEMENTS = 1 << 24  # logits held at once: 64 MiB in float32


@dataclass(frozen=True)
class LogitTransform:
    """What a model does to its logits after the output embedding: logits = softcap * tanh(scale * x / softcap)."""

    temperature: float = 1.0
    scale: float = 1.0
    softcap: float | None = None

    def apply(self, raw: Tensor) -> Tensor:
        """raw [n, V] -> float32 logits over temperature [n, V]."""
        x = raw.float()
        if self.scale != 1.0:
            x = x * self.scale
        if self.softcap is not None:
            x = self.softcap * torch.tanh(x / self.softcap)
        return x if self.temperature == 1.0 else x / self.temperature

    def backward(self, grad: Tensor, transformed: Tensor) -> Tensor:
        """Gradient with respect to raw logits, given the one with respect to `transformed = apply(raw)`."""
        grad = grad if self.temperature == 1.0 else grad / self.temperature
        if self.softcap is not None:
            grad = grad * (1 - (transformed * self.temperature / self.softcap) ** 2)
        return grad if self.scale == 1.0 else grad * self.scale


class _FusedHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        transform: LogitTransform,
        statistics: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        n = hidden.shape[0]
        logps = hidden.new_empty(n, dtype=torch.float32)
        lse = torch.empty_like(logps)
        entropy, log_sum_sq = torch.zeros_like(logps), torch.zeros_like(logps)
        for rows in _chunks(n, weight.shape[0]):
            z = transform.apply(torch.nn.functional.linear(hidden[rows], weight, bias))
            lse[rows] = torch.logsumexp(z, dim=-1)
            logps[rows] = z.gather(-1, labels[rows, None])[:, 0] - lse[rows]
            if statistics:
                log_p = z - lse[rows, None]
                entropy[rows] = -(log_p.exp() * log_p).sum(-1)
                log_sum_sq[rows] = torch.logsumexp(2 * log_p, dim=-1)
        ctx.save_for_backward(hidden, weight, bias, labels, lse, entropy, log_sum_sq)
        ctx.transform, ctx.statistics = transform, statistics
        return logps, entropy, log_sum_sq

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_logps, grad_entropy, grad_log_sum_sq = grads
        hidden, weight, bias, labels, lse, entropy, log_sum_sq = ctx.saved_tensors
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if bias is not None and needs_bias else None
        for rows in _chunks(hidden.shape[0], weight.shape[0]):
            z = ctx.transform.apply(torch.nn.functional.linear(hidden[rows], weight, bias))
            log_p = z - lse[rows, None]
            p = log_p.exp()
            coefficient = grad_logps[rows, None]
            grad = -coefficient * p
            if ctx.statistics:
                grad -= grad_entropy[rows, None] * p * (log_p + entropy[rows, None])
                q = torch.exp(2 * log_p - log_sum_sq[rows, None])
                grad += 2 * grad_log_sum_sq[rows, None] * (q - p)
            grad.scatter_add_(-1, labels[rows, None], coefficient)
            grad = ctx.transform.backward(grad, z).to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = grad @ weight
            if grad_weight is not None:
                grad_weight += grad.T @ hidden[rows]
            if grad_bias is not None:
                grad_bias += grad.sum(0, dtype=torch.float32)
        return (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(bias.dtype),
            None,
            None,
            None,
        )


def _chunks(n: int, vocabulary: int) -> list[slice]:
    step = max(1, CHUNK_ELEMENTS // vocabulary)
    return [slice(i, min(i + step, n)) for i in range(0, n, step)]


def fused_head(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    transform: LogitTransform = LogitTransform(),
    statistics: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Statistics of the token distribution at N positions.

    hidden [N, D] and weight [V, D] in one dtype; labels i64[N]; bias [V] or None.
    Returns logps, entropy and log_sum_sq, all f32[N] with gradients to hidden, weight and bias. Entropy and
    log_sum_sq are zero (and cost nothing) unless `statistics`.
    """
    assert hidden.ndim == 2 and labels.shape == hidden.shape[:1], (hidden.shape, labels.shape)
    return _FusedHead.apply(hidden, weight, bias, labels, transform, statistics)
