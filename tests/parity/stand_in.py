"""Stand-ins for TRL's trainers and models: their loss methods run on our tensors, so the arithmetic is theirs."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import torch


def padded(values: torch.Tensor, owner: torch.Tensor, sequences: int, front: int) -> tuple[torch.Tensor, torch.Tensor]:
    """[S, front + L] of per-token values, right-padded after `front` prompt places, and its completion mask."""
    lengths = [int((owner == s).sum()) for s in range(sequences)]
    rows, mask = [], torch.zeros(sequences, front + max(lengths), dtype=torch.long)
    for s, length in enumerate(lengths):
        empty = values.new_zeros(front), values.new_zeros(max(lengths) - length)
        rows.append(torch.cat([empty[0], values[owner == s], empty[1]]))
        mask[s, front : front + length] = 1
    return torch.stack(rows), mask


def stand_in(**attributes: Any) -> SimpleNamespace:
    accelerator = MagicMock()
    accelerator.device, accelerator.num_processes = torch.device("cpu"), 1
    accelerator.gather = accelerator.gather_for_metrics = lambda x: x
    accelerator.reduce = lambda x, reduction: x
    return SimpleNamespace(
        model=SimpleNamespace(training=False),
        accelerator=accelerator,
        aux_loss_enabled=False,
        _metrics={"train": defaultdict(list), "eval": defaultdict(list)},
        **attributes,
    )


def same(mine: torch.Tensor, theirs: torch.Tensor, logps: torch.Tensor) -> None:
    torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)
    gradients = [torch.autograd.grad(loss, logps, retain_graph=True)[0] for loss in (mine, theirs)]
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-5)
    assert gradients[0].abs().max() > 0
