"""Metrics of one update, joined over microbatches."""

from __future__ import annotations

from collections.abc import Mapping

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

    def result(self) -> dict[str, float]:
        """Plain numbers; a mean over nothing is left out rather than reported as 0."""
        out: dict[str, float] = {}
        for name, total in self._sums.items():
            if self._reduce[name] == "mean":
                count = float(self._counts[name])
                if count > 0:
                    out[name] = float(total) / count
            else:
                out[name] = float(total)
        weight, weight_sq = out.pop("mismatch/weight", None), out.pop("mismatch/weight_sq", None)
        if weight is not None and weight_sq:
            out["mismatch/ess"] = weight**2 / weight_sq  # effective sample size as a share of the tokens
        return out
