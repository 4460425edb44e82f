"""A pair's margin, from its column to the tensor that the reward model's loss reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from align.data.packing import collate
from align.data.prepare import prepare
from align.data.tokenizer import ChatTokenizer
from align.errors import DataError
from tests.unit.data.build import prepared, source, write_jsonl

PAIR: dict[str, Any] = {"prompt": "a", "chosen": " b", "rejected": " c"}


def test_margins_reach_the_batch_and_rows_without_one_have_none(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    rows = [{**PAIR, "margin": 1.5}, PAIR, {**PAIR, "margin": -2}, {**PAIR, "margin": None}]
    path = write_jsonl(tmp_path / "data.jsonl", rows)
    for _ in ("tokenised", "from the cache"):
        trees = prepare((source(path),), "pair", tokenizer, seed=0, cache=tmp_path / "cache").items
        assert [tree.columns for tree in trees] == [{"margin": 1.5}, {}, {"margin": -2.0}, {}]
        margins = collate(trees).columns["pair/margin"]
        torch.testing.assert_close(margins, torch.tensor([1.5, float("nan"), -2, float("nan")]), equal_nan=True)
        assert all(branch.columns == {} for tree in trees for branch in tree.branches)


def test_a_column_of_another_name_is_mapped(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    rows = [{**PAIR, "score_gap": 3}]
    made = prepared(tmp_path, rows, "pair", tokenizer, columns={"margin": "score_gap"})
    assert made.items[0].columns == {"margin": 3.0}


@pytest.mark.parametrize("value", ["large", True, [1]])
def test_a_margin_that_is_no_number_is_refused_with_its_line(
    tmp_path: Path, tokenizer: ChatTokenizer, value: Any
) -> None:
    with pytest.raises(DataError, match=r"data.jsonl:2[^0-9][\s\S]*`margin` must be a number"):
        prepared(tmp_path, [PAIR, {**PAIR, "margin": value}], "pair", tokenizer)


def test_a_conversation_may_have_a_column_of_that_name(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    made = prepared(tmp_path, [{"prompt": "a", "completion": "b", "margin": "wide"}], "conversation", tokenizer)
    assert made.items[0].columns == {}
