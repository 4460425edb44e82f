"""A row's `weight` on its way from the file to the trees: 0 is left out and named, others are carried."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from align.data.prepare import prepare
from align.data.tokenizer import ChatTokenizer
from align.errors import DataError
from align.recipe.labels import Labels
from tests.unit.data.build import prepared, source, turns, write_jsonl


def rows(kind: str, weights: list[Any]) -> list[dict[str, Any]]:
    one = {
        "conversation": {"messages": turns("q", "a")},
        "pair": {"prompt": "q ", "chosen": "a", "rejected": "b"},
        "unpaired": {"prompt": "q ", "completion": "a", "label": True},
        "prompt": {"prompt": "q "},
        "labelled": {"text": "q", "label": "bad"},
    }[kind]
    return [one | ({} if weight is None else {"weight": weight}) for weight in weights]


KINDS = ["conversation", "pair", "unpaired", "prompt", "labelled"]
LABELS = Labels(("bad", "good"), "single_label")


def read(tmp_path: Path, kind: Any, weights: list[Any], tokenizer: ChatTokenizer, **options: Any) -> Any:
    path = write_jsonl(tmp_path / "data.jsonl", rows(kind, weights))
    labels = LABELS if kind == "labelled" else None
    return prepare((source(path),), kind, tokenizer, seed=0, labels=labels, **options)


def weight_of(item: Any) -> float:
    return item.weight if hasattr(item, "weight") else item.sequences[0].columns.get("weight", 1.0)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_weight_zero_are_left_out_and_named_and_others_carry_theirs(
    tmp_path: Path, tokenizer: ChatTokenizer, kind: str
) -> None:
    made = read(tmp_path, kind, [2, 0, None, 0.0, 0.25], tokenizer)
    assert [item.origin.rpartition(":")[2] for item in made.items] == ["1", "3", "5"]
    assert [weight_of(item) for item in made.items] == [2.0, 1.0, 0.25]
    report = made.report.sources[0]
    assert (report.read, report.kept, report.weightless, report.weighted) == (5, 3, 2, 2)
    text = "\n".join(made.report.summary)
    assert f"2 of weight 0 left out (the first: {tmp_path}/data.jsonl:2)" in text
    assert "2 rows have another weight than 1: 0.25 to 2" in text
    assert made.report.to_json()["sources"][0]["first_weighted"].endswith("data.jsonl:1")
    if kind == "pair":
        assert [tree.columns["weight"] for tree in made.items] == [2.0, 1.0, 0.25]


@pytest.mark.parametrize("kind", KINDS)
def test_weights_of_one_leave_no_trace(tmp_path: Path, tokenizer: ChatTokenizer, kind: str) -> None:
    made = read(tmp_path, kind, [1, 1.0, None], tokenizer)
    assert all(weight_of(item) == 1.0 for item in made.items)
    assert kind == "prompt" or not any("weight" in s.columns for tree in made.items for s in tree.sequences)
    assert "weight 0" not in "\n".join(made.report.summary) and "another weight" not in "\n".join(made.report.summary)


def test_a_source_whose_rows_all_have_weight_zero_is_an_error(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    with pytest.raises(DataError, match=r"none of 2 rows can be used") as error:
        read(tmp_path, "conversation", [0, 0], tokenizer)
    assert "2 rows have weight 0" in str(error.value)


def test_a_row_of_weight_zero_needs_no_mending(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    """Whoever gives a row no weight has switched it off, be it empty, equal on both sides or too long."""
    empty = {"messages": turns("q", ""), "weight": 0}
    long = {"messages": turns("q", "a" * 300), "weight": 0}
    good = {"messages": turns("q", "a")}
    made = prepared(tmp_path, [empty, good, long], "conversation", tokenizer, max_length=100)
    assert len(made.items) == 1 and made.report.sources[0].weightless == 2


def test_the_cache_keeps_what_was_left_out_and_the_weights(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    first, again = (read(tmp_path, "pair", [0, 3, 1], tokenizer, cache=tmp_path / "cache") for _ in range(2))
    assert first.report.summary == again.report.summary and first.report.to_json() == again.report.to_json()
    assert [t.columns["weight"] for t in again.items] == [3.0, 1.0]


def test_a_mixture_draws_from_the_rows_that_are_left(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    paths = [
        write_jsonl(tmp_path / "a.jsonl", rows("conversation", [0, 1, 1, 0])),
        write_jsonl(tmp_path / "b.jsonl", rows("conversation", [2, 0])),
    ]
    made = prepare([source(p, weight=1) for p in paths], "conversation", tokenizer, seed=0)
    assert len(made.items) == 3 and {item.origin.rpartition("/")[2] for item in made.items} <= {
        "a.jsonl:2",
        "a.jsonl:3",
        "b.jsonl:1",
    }
    assert {weight_of(item) for item in made.items} == {1.0, 2.0}


def test_the_classify_verb_judges_rows_of_weight_zero_too(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    made = read(tmp_path, "labelled", [0, 1, 2], tokenizer, unlabelled=True)
    assert len(made.items) == 3 and np.isfinite([len(t.trunk) for t in made.items]).all()
