"""Metrics of one update, joined over microbatches and ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from align.losses.base import Metric


class MetricSums:
    """Adds up Metrics without leaving the device; `result` is the only synchronisation."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, Tensor | float] = {}
        self._reduce: dict[str, str] = {}

    def add(self, metrics: Mapping[str, Metric], prefix: str = "") -> None:
        for name, metric in metrics.items():
            key = prefix + name
            if key not in self._sums:
                self._sums[key], self._counts[key] = metric.sum.detach().double(), metric.count
                self._reduce[key] = metric.reduce
            elif metric.reduce == "max":
                self._sums[key] = torch.maximum(self._sums[key], metric.sum.detach().double())
            else:
                self._sums[key] = self._sums[key] + metric.sum.detach().double()
                self._counts[key] = self._counts[key] + metric.count

    def result(self, gather: Callable[[Any], list[Any]] = lambda own: [own]) -> dict[str, float]:
        """Plain numbers; a mean over nothing is left out rather than reported as 0.

        gather: what every rank found, by rank (`Ranks.objects`); they are joined as microbatches are.
        """
        joined: dict[str, tuple[float, float, str]] = {}
        for found in gather(self._numbers()):
            for name, (total, count, reduce) in found.items():
                before, counted, _ = joined.get(name, (None, 0.0, reduce))
                if before is not None and reduce == "max":
                    total = before if before > total or math.isnan(before) else total
                elif before is not None:
                    total, count = before + total, counted + count
                joined[name] = (total, count, reduce)
        out: dict[str, float] = {}
        for name, (total, count, reduce) in joined.items():
            if reduce != "mean":
                out[name] = total
            elif count > 0:
                out[name] = total / count
        return out

    def _numbers(self) -> dict[str, tuple[float, float, str]]:
        """Sum, count and way of joining by name; all numbers leave the device at once."""
        if not self._sums:
            return {}
        device = next(iter(self._sums.values())).device
        sums = torch.stack([total.reshape(()).to(device) for total in self._sums.values()])
        counts = torch.stack([torch.as_tensor(c).to(sums).reshape(()) for c in self._counts.values()])
        rows = zip(sums.tolist(), counts.tolist(), self._reduce.values(), strict=True)
        return dict(zip(self._sums, rows, strict=True))


def join_terms(metrics: dict[str, Metric], more: dict[str, Metric], term: str) -> None:
    """Add a term's metrics to those of the terms before it. A name means the same in every loss, so the first to report
    it is kept; a term's own total is called after the term ("loss/dpo", "loss/dpo-2")."""
    name, number = f"loss/{term}", 2
    while name in metrics:
        name, number = f"loss/{term}-{number}", number + 1
    for key, metric in more.items():
        metrics.setdefault(name if key == "loss/total" else key, metric)
