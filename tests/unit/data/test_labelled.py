"""Labelled rows: which layouts there are, what a label may be, and what the data report says of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from align.data.labels import label_values
from align.data.prepare import prepare
from align.data.records import RowError
from align.data.tokenizer import ChatTokenizer
from align.errors import DataError
from align.recipe.labels import Labels
from tests.unit.data.build import source, text, write_jsonl

SINGLE = Labels(("bad", "so-so", "good"), "single_label")
MULTI = Labels(("a", "b", "c"), "multi_label")
STARS = Labels(("1", "2", "3"), "single_label")
NUMBER = Labels.numbered(1, "regression")
USER = [{"role": "user", "content": "What is 12+7?"}]


def read(tmp_path: Path, rows: list[Any], tokenizer: ChatTokenizer, labels: Labels = SINGLE, **options: Any) -> Any:
    given = {key: options.pop(key) for key in ("unlabelled", "cache") if key in options}
    path = write_jsonl(tmp_path / "data.jsonl", rows)
    return prepare((source(path, **options),), "labelled", tokenizer, seed=0, labels=labels, **given)


LAYOUTS = {
    "text": ({"text": "quick fox"}, "quick fox"),
    "two texts": ({"text": "quick fox", "text_pair": "lazy dog"}, "quick fox\nlazy dog"),
    "messages": ({"messages": USER}, "<|im_start|>user\nWhat is 12+7?<|im_end|>\n"),
    "messages and an answer": (
        {"messages": [*USER, {"role": "assistant", "content": "19"}]},
        "<|im_start|>user\nWhat is 12+7?<|im_end|>\n<|im_start|>assistant\n19<|im_end|>\n",
    ),
    "a system column": (
        {"messages": USER, "system": "Be brief."},
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhat is 12+7?<|im_end|>\n",
    ),
    "sharegpt": ({"conversations": [{"from": "human", "value": "Hi"}]}, "<|im_start|>user\nHi<|im_end|>\n"),
    "alpaca": ({"instruction": "Add", "input": "12+7"}, "<|im_start|>user\nAdd\n12+7<|im_end|>\n"),
    "swift": ({"query": "What is 12+7?"}, "<|im_start|>user\nWhat is 12+7?<|im_end|>\n"),
}


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_every_layout_gives_the_whole_text_and_a_label(layout: str, tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    row, expected = LAYOUTS[layout]
    [tree] = read(tmp_path, [row | {"label": "good"}], tokenizer).items
    assert text(tokenizer, tree.trunk) == expected and not tree.branches
    assert dict(tree.trunk.columns) == {"class": 2.0} and tree.trunk.labelled
    assert not tree.trunk.loss_mask.any(), "the sequence is scored, and none of its tokens"


def test_other_columns_are_mapped(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    columns = {"text": "review", "label": "verdict"}
    [tree] = read(tmp_path, [{"review": "fox", "verdict": 0}], tokenizer, columns=columns).items
    assert tree.trunk.columns["class"] == 0.0


@pytest.mark.parametrize(
    ("labels", "label", "values"),
    [
        (SINGLE, "so-so", [1]),
        (SINGLE, 2, [2]),
        (SINGLE, "2", [2]),
        (SINGLE, 2.0, [2]),
        (STARS, 1, [0]),
        (STARS, "3", [2]),
        (Labels(("no", "yes"), "single_label"), True, [1]),
        (MULTI, ["a", "c"], [1, 0, 1]),
        (MULTI, [1], [0, 1, 0]),
        (MULTI, [], [0, 0, 0]),
        (MULTI, "b", [0, 1, 0]),
        (MULTI, [1, 0, 1], [1, 0, 1]),
        (MULTI, [True, False, False], [1, 0, 0]),
        (MULTI, [0, 1, 2], [1, 1, 1]),
        (NUMBER, 3, [3]),
        (NUMBER, "-0.25", [-0.25]),
        (Labels.numbered(2, "regression"), [1, 2.5], [1, 2.5]),
    ],
)
def test_a_label_is_a_name_or_an_index_a_list_or_a_number(labels: Labels, label: Any, values: list[float]) -> None:
    assert label_values(label, labels) == values


@pytest.mark.parametrize(
    ("labels", "label", "why"),
    [
        (SINGLE, "fine", r"unknown label 'fine' \(known: bad, so-so, good, or an index below 3\)"),
        (SINGLE, 3, "unknown label 3"),
        (SINGLE, -1, "unknown label -1"),
        (SINGLE, True, "unknown label True"),
        (SINGLE, ["good"], "unknown label"),
        (SINGLE, None, "no `label`"),
        (STARS, 0, r"unknown label 0 \(known: 1, 2, 3\)"),
        (MULTI, ["a", "a"], "stands twice"),
        (MULTI, ["a", "d"], "unknown label 'd'"),
        (MULTI, [0.5, 1.0, 0.0], "must hold 0 and 1"),
        (MULTI, 3, "must be a list"),
        (Labels(("a", "b"), "multi_label"), [0, 1], "may be indices or truth values"),
        (NUMBER, "high", "must be a number"),
        (NUMBER, float("nan"), "must be a number"),
        (NUMBER, True, "must be a number"),
        (NUMBER, [1.0, 2.0], "has 2 numbers, and the head 1 outputs"),
    ],
)
def test_other_labels_are_refused_with_the_known_ones(labels: Labels, label: Any, why: str) -> None:
    with pytest.raises(RowError, match=why):
        label_values(label, labels)


def test_a_bad_label_names_its_line(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    rows = [{"text": "fox", "label": "good"}, {"text": "dog", "label": "fine"}, {"text": "cat"}]
    with pytest.raises(DataError, match="unknown label 'fine'") as caught:
        read(tmp_path, rows, tokenizer)
    assert "data.jsonl:2" in str(caught.value) and "no `label`" in str(caught.value)
    report = read(tmp_path, rows, tokenizer, on_bad_row="skip").report
    assert (report.kept, len(report.refused)) == (1, 2)


def test_a_row_with_two_labels_is_refused(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    with pytest.raises(DataError, match="`label` and `labels`"):
        read(tmp_path, [{"text": "fox", "label": "good", "labels": "bad"}], tokenizer)


def test_where_nobody_need_know_labels_may_be_missing(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    rows = [{"text": "fox", "label": "good"}, {"text": "dog"}]
    first, second = read(tmp_path, rows, tokenizer, unlabelled=True).items
    assert first.trunk.labelled and not second.trunk.labelled
    [only] = read(tmp_path, [{"text": "dog"}], tokenizer, unlabelled=True).items
    assert not only.trunk.columns


@pytest.mark.parametrize(("side", "kept"), [("right", slice(0, 3)), ("left", slice(-3, None))])
def test_a_long_text_is_cut_on_the_side_that_the_source_says(
    side: str, kept: slice, tmp_path: Path, tokenizer: ChatTokenizer
) -> None:
    rows = [{"text": "The quick brown fox jumps over the lazy dog.", "label": 0}]
    [whole] = read(tmp_path, rows, tokenizer).items
    cut = read(tmp_path, rows, tokenizer, max_length=3, too_long=side)
    assert np.array_equal(cut.items[0].trunk.token_ids, whole.trunk.token_ids[kept])
    assert cut.report.truncated == 1
    with pytest.raises(DataError, match="more than max_length 3"):
        read(tmp_path, rows, tokenizer, max_length=3)


def test_the_report_says_how_often_each_label_occurs_and_which_does_not(
    tmp_path: Path, tokenizer: ChatTokenizer
) -> None:
    rows = [{"text": "fox", "label": name} for name in ("good", "bad", "good", "good")]
    report = read(tmp_path, rows, tokenizer).report
    assert report.to_json()["sources"][0]["labels"] == {"bad": 1, "so-so": 0, "good": 3}
    assert "labels: good 3 (75%), bad 1 (25%), so-so 0 (0%)" in "\n".join(report.summary)
    assert "no row has the label so-so" in "\n".join(report.summary)
    assert "learn to stop" not in "\n".join(report.summary)
    several = read(
        tmp_path, [{"text": "fox", "labels": ["a", "c"]}, {"text": "dog", "labels": ["a"]}], tokenizer, MULTI
    )
    assert several.report.sources[0].labels == {"a": 2, "b": 0, "c": 1}
    numbers = read(tmp_path, [{"text": "fox", "label": 1}, {"text": "dog", "label": 2}], tokenizer, NUMBER)
    assert numbers.report.sources[0].labels == {"LABEL_0": {"min": 1.0, "mean": 1.5, "max": 2.0}}
    assert "LABEL_0: 1 to 2, mean 1.5" in "\n".join(numbers.report.summary)


def test_a_cached_source_is_read_back_with_its_labels_and_other_labels_read_it_anew(
    tmp_path: Path, tokenizer: ChatTokenizer
) -> None:
    rows, cache = [{"text": "fox", "label": 1}, {"text": "dog", "label": 2}], tmp_path / "cache"
    first, again = (read(tmp_path, rows, tokenizer, cache=cache) for _ in range(2))
    assert [t.trunk.columns for t in again.items] == [t.trunk.columns for t in first.items]
    assert again.report.to_json() == first.report.to_json()
    assert len(list(cache.glob("*.npz"))) == 1
    other = read(tmp_path, rows, tokenizer, NUMBER, cache=cache)
    assert [dict(t.trunk.columns) for t in other.items] == [{"targets/0": 1.0}, {"targets/0": 2.0}]


def test_the_mark_of_a_target_that_nobody_gave_is_no_number() -> None:
    four = Labels.numbered(4, "regression")
    with pytest.raises(RowError, match="-100"):
        label_values([-100, 3, 4, 0], four)
    assert label_values([-100, 250.0, 4, -80], four) == [-100.0, 250.0, 4.0, -80.0]  # a scale that goes so far
    assert label_values(-100, Labels.numbered(1, "regression")) == [-100.0]
