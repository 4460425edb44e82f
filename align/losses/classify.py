"""Sequence classification and regression on a score head: what a row's label columns say decides which.

    class        one label of K      -log softmax(s)[y], cross-entropy; with smoothing e: (1-e) of it, and e times the
                                     mean over all labels (1512.00567 section 7)
    labels/k     any of K            binary cross-entropy of each s_k, mean over k
    targets/k    K numbers           (s_k - y_k)^2, mean over k

class_weights: w_k of each label, in their order: of cross-entropy a row counts w_y times, of binary cross-entropy a
label that is there counts w_k times (torch's pos_weight). A column `weight` of the rows multiplies in. The mean is over
rows: torch's weighted cross-entropy divides by the sum of weights instead, which differs from batch to batch.

Counts behind F1 and moments behind the correlation are reported as sums, and become numbers in `derived`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated

import numpy as np
from pydantic import Field

from align.losses.base import LossConfig, LossInputs, LossOutput, Metric, Needs
from align.recipe.labels import Problem

if TYPE_CHECKING:
    from torch import Tensor

Columns = Mapping[str, "Tensor"]
_SUMS = "sums/"  # metrics that only `derived` reads
_MOMENTS = ("n", "x", "y", "xx", "yy", "xy")


class Config(LossConfig):
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    class_weights: tuple[Annotated[float, Field(gt=0, allow_inf_nan=False)], ...] | None = None


def needs(config: Config) -> Needs:
    return Needs(record="labelled", head=("scores",), scope="sequence", weights=True)


def loss(inputs: LossInputs, config: Config) -> LossOutput:
    """Loss f32[]: mean over all labelled rows of the update; others are left out. Needs scores f32[S, K]."""
    from align.losses.reduce import share_of_loss, weighted

    scores, columns = inputs.outputs.scores, inputs.batch.columns
    assert scores is not None and scores.shape[0] == inputs.batch.sequences, "classify needs scores of every sequence"
    labels, known = labels_of(scores, columns)
    if "sequence/class" in columns:
        terms = _cross_entropy(scores, labels[:, 0].long(), config)
    elif "sequence/labels/0" in columns:
        terms = _binary_cross_entropy(scores, labels, config)
    else:
        terms = ((scores - labels) ** 2).mean(-1)
    total = (weighted(terms, inputs, "sequence") * known).sum() / max(inputs.counts.sequences, 1)
    return LossOutput(total, {"loss/total": share_of_loss(total)} | measures(scores.detach(), columns))


def labels_of(scores: Tensor, columns: Columns) -> tuple[Tensor, Tensor]:
    """Labels in the dtype of `scores`, [S, 1] indices or [S, K] (0 where a row has none), and bool[S]: has it one?"""
    import torch

    names = ["sequence/class"] if "sequence/class" in columns else []
    names = names or [f"sequence/{word}/{k}" for word in ("labels", "targets") for k in range(scores.shape[1])]
    found = [columns[name] for name in names if name in columns]
    if not found:
        return scores.new_zeros(scores.shape), torch.zeros(scores.shape[0], dtype=torch.bool, device=scores.device)
    assert len(found) in (1, scores.shape[1]), "labels and outputs of the head differ in number"
    labels = torch.stack(found, dim=-1)
    return labels.nan_to_num().to(scores.dtype), ~labels[:, 0].isnan()


def _cross_entropy(scores: Tensor, labels: Tensor, config: Config) -> Tensor:
    """Terms [S] of scores [S, K] and labels i64[S]."""
    logps = scores.log_softmax(-1)
    terms = -logps.gather(-1, labels[:, None])[:, 0]
    if config.label_smoothing:
        terms = (1 - config.label_smoothing) * terms - config.label_smoothing * logps.mean(-1)
    return terms if config.class_weights is None else terms * scores.new_tensor(config.class_weights)[labels]


def _binary_cross_entropy(scores: Tensor, labels: Tensor, config: Config) -> Tensor:
    """Terms [S] of scores and labels [S, K]."""
    from torch.nn.functional import logsigmoid

    weights = 1.0 if config.class_weights is None else scores.new_tensor(config.class_weights)
    return -(weights * labels * logsigmoid(scores) + (1 - labels) * logsigmoid(-scores)).mean(-1)


def log_probs(scores: np.ndarray, problem: Problem | None) -> np.ndarray:
    """f64[n, K] log-probabilities of the labels by scores [n, K]: of a softmax over them for one label a row, each
    label's own (log sigmoid) for several."""
    s = scores.astype(np.float64)
    if problem == "multi_label":
        return -np.logaddexp(0.0, -s)
    raised = s - s.max(-1, keepdims=True)
    return np.asarray(raised - np.log(np.exp(raised).sum(-1, keepdims=True)))


# ------------------------------------------------------------------------------------------------- metrics


def measures(scores: Tensor, columns: Columns) -> dict[str, Metric]:
    """Metrics of scores [S, K] against the label columns, of rows that have a label; see `derived` for the rest."""
    from torch.nn.functional import one_hot

    labels, known = labels_of(scores, columns)
    scores, labels = scores[known], labels[known]
    rows = float(known.sum()) if scores.device.type == "cpu" else known.sum()
    if "sequence/class" in columns:
        chosen, wanted = scores.argmax(-1), labels[:, 0].long()
        right = (chosen == wanted).to(scores.dtype)
        said, there = one_hot(chosen, scores.shape[1]), one_hot(wanted, scores.shape[1])
    elif "sequence/labels/0" in columns:
        said, there = (scores > 0).long(), labels.long()
        right = (said == there).all(-1).to(scores.dtype)
    else:
        error = scores - labels
        means = {"mse": (error**2).mean(-1), "mae": error.abs().mean(-1)}
        return {name: Metric(values.sum(), rows) for name, values in means.items()} | _moments(scores, labels)
    found = {"accuracy": Metric(right.sum(), rows)}
    for word, hits in (("tp", said * there), ("fp", said * (1 - there)), ("fn", (1 - said) * there)):
        found |= {f"{_SUMS}{word}/{k}": Metric(count, reduce="sum") for k, count in enumerate(hits.sum(0).double())}
    return found


def _moments(scores: Tensor, targets: Tensor) -> dict[str, Metric]:
    x, y = scores.double(), targets.double()
    sums = zip(_MOMENTS, (x * 0 + 1, x, y, x * x, y * y, x * y), strict=True)
    return {f"{_SUMS}{name}/{k}": Metric(total, reduce="sum") for name, v in sums for k, total in enumerate(v.sum(0))}


def derived(metrics: Mapping[str, float]) -> dict[str, float]:
    """`metrics`, joined over all microbatches and ranks, with f1/<k>, f1_macro (mean over the labels that occur or were
    said), f1_micro and pearson (mean over outputs; left out where one is constant) in place of the sums behind them."""
    out = {name: value for name, value in metrics.items() if not name.startswith(_SUMS)}
    count = sum(name.startswith(f"{_SUMS}tp/") for name in metrics)
    if count:
        tp, fp, fn = ([metrics[f"{_SUMS}{word}/{k}"] for k in range(count)] for word in ("tp", "fp", "fn"))
        both = [2 * hit + more + less for hit, more, less in zip(tp, fp, fn, strict=True)]
        each = {f"f1/{k}": 2 * tp[k] / both[k] for k in range(count) if both[k]}
        if each:
            out |= {"f1_macro": sum(each.values()) / len(each), "f1_micro": 2 * sum(tp) / sum(both), **each}
    outputs = sum(name.startswith(f"{_SUMS}xy/") for name in metrics)
    found = [_correlation(*(metrics[f"{_SUMS}{name}/{k}"] for name in _MOMENTS)) for k in range(outputs)]
    if found and all(math.isfinite(value) for value in found):
        out["pearson"] = sum(found) / len(found)
    return out


def _correlation(n: float, x: float, y: float, xx: float, yy: float, xy: float) -> float:
    """Pearson's r from sums over n rows; NaN where one side is constant."""
    spread = [square - total * total / n if n else 0.0 for square, total in ((xx, x), (yy, y))]
    if min(spread) <= 1e-12 * max(xx, yy, 1e-300):
        return math.nan
    return (xy - x * y / n) / math.sqrt(spread[0] * spread[1])
