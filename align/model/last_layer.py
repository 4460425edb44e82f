"""In the last layer a token needs more than its keys and values only if its hidden state is read.

Nothing comes after the last layer, so what it makes of a prompt's tokens (output projection, feed-forward) is thrown
away, but for the last of them. Hooks on these two modules, which treat each token by itself, compute the tokens that
are read and leave zeros elsewhere. A prompt then costs one feed-forward less: a sixteenth of its forward in a model of
eight layers with a prompt of half the tokens, little in a deep one. The probe at load sees the trimmed forward.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

WORTH_IT = 0.9  # of a row's tokens: with more to be read, selecting them costs what it saves


class LastLayer:
    """The trimmed modules of one backbone; without `reading`, they compute every token."""

    def __init__(self, backbone: Any):
        self._rows: Tensor | None = None
        self._tokens = 0
        for module in _tokenwise(backbone):
            module.register_forward_pre_hook(self._select)
            module.register_forward_hook(self._place)

    @contextmanager
    def reading(self, at: Tensor, tokens: int) -> Iterator[None]:
        """Within the block, of a row of `tokens` only those at places `at` i64[K] are needed after the last layer."""
        rows = torch.unique(at)
        self._rows, self._tokens = (rows if 0 < len(rows) < WORTH_IT * tokens else None), tokens
        try:
            yield
        finally:
            self._rows = None

    def _select(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if self._rows is None:
            return None
        return args[0].index_select(1, self._rows), *args[1:]

    def _place(self, module: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor | None:
        if self._rows is None:
            return None
        return out.new_zeros(1, self._tokens, out.shape[-1]).index_copy(1, self._rows, out)


def _tokenwise(backbone: Any) -> list[nn.Module]:
    """Output projection and dense feed-forward of the last decoder layer, where it has them under their usual names."""
    layers = getattr(backbone, "layers", None)
    last: Any = layers[-1] if isinstance(layers, nn.ModuleList) and len(layers) else None
    projection = getattr(getattr(last, "self_attn", None), "o_proj", None)
    feed_forward = getattr(last, "mlp", None)
    found = [projection, feed_forward if hasattr(feed_forward, "down_proj") else None]
    return [module for module in found if isinstance(module, nn.Module)]
