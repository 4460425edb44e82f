"""The classify loss against its formulas in float64, row by row, and its metrics against counts by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from align.data.packing import collate, global_counts
from align.errors import RecipeError
from align.losses import configure
from align.losses.base import LossInputs, LossOutput
from align.losses.classify import derived
from align.protocols.trees import Tree
from align.train.metrics import MetricSums
from align.types import HeadOutputs
from tests.unit.core.trees import conversation, labelled

SINGLE = [{"class": float(k)} for k in (0, 2, 1, 2, 0)]
MULTI = [{"labels/0": a, "labels/1": b, "labels/2": c} for a, b, c in ((1, 0, 1), (0, 0, 0), (1, 1, 1), (0, 1, 0))]
NUMBERS = [{"targets/0": a, "targets/1": b} for a, b in ((0.5, -1.0), (2.0, 0.0), (-0.3, 4.0), (1.0, 1.0))]
WEIGHTS = (0.5, 2.0, 1.5)


def trees(columns: list[dict[str, float]]) -> list[Tree]:
    return [labelled(np.random.default_rng(i), i, **values) for i, values in enumerate(columns)]


def random_scores(rows: int, outputs: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows)
    return (2 * torch.randn(rows, outputs, generator=generator, dtype=torch.float64)).requires_grad_()


def run(options: dict[str, Any], some: list[Tree], scores: torch.Tensor, counts: Any = None) -> LossOutput:
    loss = configure("classify", options)
    assert (loss.needs.record, loss.needs.reference, loss.needs.head) == ("labelled", False, ("scores",))
    outputs = HeadOutputs(logps=torch.zeros(0), scores=scores)
    output: LossOutput = loss(LossInputs(outputs, collate(some), counts or global_counts(some)))
    return output


def metrics(*outputs: LossOutput) -> dict[str, float]:
    sums = MetricSums()
    for output in outputs:
        sums.add(output.metrics)
    return derived(sums.result())


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def cross_entropy(s: np.ndarray, columns: dict[str, float], smoothing: float, weights: Any) -> float:
    y, logps = int(columns["class"]), s - math.log(sum(math.exp(x) for x in s))
    spread = [smoothing / len(s) + (1 - smoothing) * (k == y) for k in range(len(s))]
    return (weights[y] if weights else 1.0) * -sum(p * lp for p, lp in zip(spread, logps, strict=True))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["alike", "weighted"])
def test_one_label_costs_its_cross_entropy(smoothing: float, weights: Any) -> None:
    scores = random_scores(5)
    out = run({"label_smoothing": smoothing, "class_weights": weights}, trees(SINGLE), scores)
    rows = zip(scores.detach().numpy(), SINGLE, strict=True)
    assert out.loss.item() == pytest.approx(np.mean([cross_entropy(s, y, smoothing, weights) for s, y in rows]))


@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["alike", "weighted"])
def test_several_labels_cost_the_mean_of_their_binary_cross_entropies(weights: Any) -> None:
    scores = random_scores(4)
    out = run({"class_weights": weights}, trees(MULTI), scores)
    expected = [
        -(w * y * math.log(sigmoid(s)) + (1 - y) * math.log(sigmoid(-s)))
        for row, columns in zip(scores.detach().numpy(), MULTI, strict=True)
        for s, y, w in zip(row, columns.values(), weights or (1.0, 1.0, 1.0), strict=True)
    ]
    assert out.loss.item() == pytest.approx(np.mean(expected))


def test_numbers_cost_their_squared_error() -> None:
    scores = random_scores(4, 2)
    out = run({}, trees(NUMBERS), scores)
    wanted = np.array([list(columns.values()) for columns in NUMBERS])
    assert out.loss.item() == pytest.approx(((scores.detach().numpy() - wanted) ** 2).mean())


CASES = {
    "single": ({}, SINGLE, 3),
    "smoothed and weighted": ({"label_smoothing": 0.2, "class_weights": WEIGHTS}, SINGLE, 3),
    "multi": ({}, MULTI, 3),
    "multi, weighted": ({"class_weights": WEIGHTS}, MULTI, 3),
    "numbers": ({}, NUMBERS, 2),
}


@pytest.mark.parametrize("case", list(CASES))
def test_the_gradient_equals_finite_differences(case: str) -> None:
    options, columns, outputs = CASES[case]
    assert torch.autograd.gradcheck(
        lambda s: run(options, trees(columns), s).loss, (random_scores(len(columns), outputs),)
    )


@pytest.mark.parametrize("case", list(CASES))
def test_microbatches_add_up_to_the_whole_in_value_gradient_and_metrics(case: str) -> None:
    options, columns, outputs = CASES[case]
    some, scores = trees(columns), random_scores(len(columns), outputs)
    whole = run(options, some, scores)
    counts = global_counts(some)
    parts = [run(options, some[a:b], scores[a:b], counts) for a, b in ((0, 1), (1, 3), (3, len(some)))]
    total = sum(part.loss for part in parts)
    torch.testing.assert_close(total, whole.loss)
    torch.testing.assert_close(*(torch.autograd.grad(x, scores, retain_graph=True)[0] for x in (total, whole.loss)))
    assert metrics(*parts) == pytest.approx(metrics(whole), rel=1e-6)


def test_a_row_counts_as_often_as_its_weight_says() -> None:
    scores = random_scores(5)
    weighted = [{**columns, "weight": float(w)} for columns, w in zip(SINGLE, (1, 0, 2, 1, 3), strict=True)]
    each = [run({}, trees(SINGLE)[i : i + 1], scores[i : i + 1]).loss.item() for i in range(5)]
    assert run({}, trees(weighted), scores).loss.item() == pytest.approx(np.dot(each, (1, 0, 2, 1, 3)) / 5)


def test_rows_without_label_cost_nothing_and_count_nowhere() -> None:
    labelled_rows, without = trees(SINGLE)[:2], conversation(np.random.default_rng(9), 9)
    scores = random_scores(3)
    counts = global_counts(labelled_rows)
    assert counts.sequences == 2
    mixed = run({}, [*labelled_rows, without], scores, counts)
    assert mixed.loss.item() == pytest.approx(run({}, labelled_rows, scores[:2]).loss.item())
    assert metrics(mixed) == pytest.approx(metrics(run({}, labelled_rows, scores[:2])))


@pytest.mark.parametrize("outputs", [1, 3])
def test_where_no_row_has_a_label_loss_and_gradient_are_0_and_no_metric_is_made_up(outputs: int) -> None:
    scores = random_scores(1, outputs)
    out = run({}, [conversation(np.random.default_rng(9), 9)], scores, global_counts([]))
    out.loss.backward()
    assert out.loss.item() == 0 and scores.grad is not None and not scores.grad.any()
    assert metrics(out) == {"loss/total": 0.0}


@pytest.mark.parametrize("far", [-1e4, 1e4])
@pytest.mark.parametrize("case", list(CASES))
def test_scores_far_apart_give_finite_values_and_gradients(case: str, far: float) -> None:
    options, columns, outputs = CASES[case]
    scores = torch.zeros(len(columns), outputs, dtype=torch.float64)
    scores[:, 0] = far
    loss = run(options, trees(columns), scores.requires_grad_()).loss
    loss.backward()
    assert math.isfinite(loss.item()) and scores.grad is not None and torch.isfinite(scores.grad).all()


# ------------------------------------------------------------------------------------------------- metrics


def test_accuracy_and_f1_of_one_label_are_those_counted_by_hand() -> None:
    said = torch.eye(4, dtype=torch.float64)[[0, 2, 2, 1, 0]]  # of 0, 2, 1, 2, 0; label 3 is nowhere
    found = metrics(run({}, trees(SINGLE), said))
    assert found["accuracy"] == pytest.approx(3 / 5)
    assert [found[f"f1/{k}"] for k in range(3)] == pytest.approx([1.0, 0.0, 2 * 1 / (2 * 1 + 1 + 1)])
    assert "f1/3" not in found and found["f1_macro"] == pytest.approx(1.5 / 3)
    assert not any(name.startswith("sums/") for name in found)


def test_accuracy_of_several_labels_asks_for_all_of_them() -> None:
    said = torch.tensor([[1, 0, 1], [1, 0, 0], [1, 1, 1], [0, 0, 0]], dtype=torch.float64) - 0.5
    found = metrics(run({}, trees(MULTI), said))
    assert found["accuracy"] == pytest.approx(2 / 4)
    assert [found[f"f1/{k}"] for k in range(3)] == pytest.approx([4 / 5, 2 / 3, 1.0])
    assert found["f1_micro"] == pytest.approx(2 * 5 / (2 * 5 + 1 + 1))


def test_errors_and_correlation_of_numbers() -> None:
    scores = random_scores(4, 2)
    found = metrics(run({}, trees(NUMBERS), scores))
    x, y = scores.detach().numpy(), np.array([list(columns.values()) for columns in NUMBERS])
    assert found["mse"] == pytest.approx(((x - y) ** 2).mean()) and found["mae"] == pytest.approx(abs(x - y).mean())
    assert found["pearson"] == pytest.approx(np.mean([np.corrcoef(x[:, k], y[:, k])[0, 1] for k in range(2)]))


def test_a_constant_output_has_no_correlation() -> None:
    found = metrics(run({}, trees(NUMBERS), torch.full((4, 2), 0.1, dtype=torch.float64)))
    assert "pearson" not in found and "mse" in found


@pytest.mark.parametrize("options", [{"label_smoothing": 1.0}, {"class_weights": [1.0, 0.0]}, {"smoothing": 0.1}])
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=next(iter(options))):
        configure("classify", options)
