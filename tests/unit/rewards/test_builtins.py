"""The built-in rewards on answers made by hand and on real solutions."""

from __future__ import annotations

import json
import time
from fractions import Fraction
from pathlib import Path

import pytest

from rewards import Sample
from rewards.builtins.contains import contains
from rewards.builtins.exact import exact
from rewards.builtins.format import format
from rewards.builtins.length import length
from rewards.builtins.numeric import final_number, numeric, to_number
from rewards.builtins.regex import regex


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so 3 + 4 = <<3+4=7>>7\n#### 7", 7),
        ("#### 1,234,567", 1234567),
        ("#### -3.50 dollars", "-7/2"),
        ("A: $18", 18),
        ("**Answer:** 72", 72),
        ("The answer is 1 3/4 cups", "7/4"),
        ("\\boxed{\\frac{3}{4}}", "3/4"),
        ("\\boxed{-\\dfrac{3}{4}}", "-3/4"),
        ("so \\boxed{1{,}000 \\text{ apples}}", 1000),
        ("it costs $1,250.00.", 1250),
        ("that is 50%", 50),
        ("from 16-3 we get 13", 13),
        ("x = -3", -3),
        ("x is \u22123", -3),
        ("first #### 5 then #### 6", 6),
        ("#### 72\nThe 3 of them", 72),
        ("#### none, so 7", 7),
        ("5e3", 5000),
        ("pi is .5", "1/2"),
        ("A: \\boxed{12}", 12),
        ("no number at all", None),
        ("1/0", None),
        ("9" * 5000, None),
        ("", None),
    ],
)
def test_the_final_number_of_a_text(text: str, number: str | int | None) -> None:
    assert final_number(text) == (None if number is None else Fraction(number))


@pytest.mark.parametrize(
    "piece", ["\n", " ", "9", "1 ", "1,", "\\frac ", "<<", "*", "#### ", "1/", "- ", "A:\n", "1 2"]
)
def test_a_degenerate_completion_takes_no_time(piece: str) -> None:
    started = time.monotonic()
    final_number(piece * 10_000)
    assert time.monotonic() - started < 2.0


def test_numeric_compares_with_the_row() -> None:
    row = {"answer": "so much work\n#### 1,000"}
    samples = [Sample("#### 1000.0", row=row), Sample("#### 1001", row=row), Sample("dunno", row=row)]
    assert numeric(samples) == [1.0, 0.0, 0.0]
    assert numeric(samples, tolerance=0.01) == [1.0, 1.0, 0.0]
    assert numeric([Sample("7", row={"sum": 7, "answer": 8})], column="sum") == [1.0]
    assert numeric([Sample("0.1", row={"reference_answer": 0.1, "answer": 8})]) == [1.0]


def test_a_row_without_a_gold_answer_is_an_error_that_names_its_columns() -> None:
    with pytest.raises(KeyError, match="question"):
        numeric([Sample("7", row={"question": "?"})])
    with pytest.raises(ValueError, match="holds no number"):
        numeric([Sample("7", row={"answer": "seven"})])


@pytest.mark.realdata
def test_numeric_agrees_with_the_published_flags_on_all_5276_gsm8k_solutions(shared_data: Path) -> None:
    disagreements, count = [], 0
    for line in (shared_data / "text/gsm8k/example_model_solutions.jsonl").open(encoding="utf-8"):
        row = json.loads(line)
        for model, solved in row.items():
            if not isinstance(solved, dict):
                continue
            count += 1
            score = numeric([Sample(solved["solution"], row=row)], column="ground_truth")[0]
            if bool(score) != solved["is_correct"]:
                disagreements.append(f"{model}: {solved['solution'][-60:]!r} against {row['ground_truth'][-30:]!r}")
    assert count == 5276
    assert not disagreements, "\n".join(disagreements)


@pytest.mark.realdata
def test_every_gsm8k_gold_answer_scores_best_against_itself(shared_data: Path) -> None:
    for line in (shared_data / "text/gsm8k/test.jsonl").open(encoding="utf-8"):
        row = json.loads(line)
        assert numeric([Sample(row["answer"], row=row)]) == [1.0]
        assert to_number(row["answer"]) == Fraction(row["answer"].rpartition("#### ")[2].replace(",", ""))


def test_exact_ignores_white_space_and_takes_any_of_several_answers() -> None:
    samples = [
        Sample(" New  York\n", row={"answer": ["NYC", "New York"]}),
        Sample("new york", row={"answer": "New York"}),
    ]
    assert exact(samples) == [1.0, 0.0]
    assert exact(samples, ignore_case=True) == [1.0, 1.0]


def test_contains_counts_the_share_of_texts() -> None:
    sample = [Sample("Thank you, please")]
    assert contains(sample, texts=["thank", "please"]) == [0.5]
    assert contains(sample, texts=["thank", "please"], ignore_case=True) == [1.0]
    assert contains(sample, texts=["sorry", "please"], absent=True) == [0.5]
    assert contains([Sample("it is 12", row={"answer": 12})]) == [1.0]


def test_regex_searches_or_matches_the_whole() -> None:
    samples = [Sample("work\n#### 12\n"), Sample("#### 12 apples")]
    assert regex(samples, pattern=r"#### -?[\d,]+$") == [1.0, 0.0]
    assert regex(samples, pattern=r"#### \d+ apples", mode="fullmatch") == [0.0, 1.0]
    assert regex(samples, pattern=r"WORK.*12", flags="is") == [1.0, 0.0]


def test_format_gives_a_share_for_each_part_in_order() -> None:
    parts = ["<think>.+?</think>", r"#### -?[\d,]+$"]
    texts = ["<think>a\nb</think> so #### 12", "<think>a</think> so 12", "#### 12", "#### 1 <think>a</think>"]
    assert format([Sample(t) for t in texts], parts=parts) == [1.0, 0.5, 0.5, 0.5]
    sample = [Sample("#### 12", token_ids=[1] * 9, truncated=True)]
    assert format(sample, parts=parts[1:], max_tokens=8, complete=True) == [pytest.approx(1 / 3)]
    assert format(sample, parts=parts[1:], max_tokens=9) == [1.0]


def test_length_has_a_slope_everywhere() -> None:
    samples = [Sample("x", token_ids=[0] * n) for n in (5, 10, 20, 40, 50)]
    assert length(samples, target=20) == [0.25, 0.5, 1.0, 0.5, 0.4]
    assert length(samples, max=40) == [0.875, 0.75, 0.5, 0.0, 0.0]
    assert length(samples, max=40, buffer=20) == [1.0, 1.0, 1.0, 0.0, 0.0]
    assert length([Sample("a b c d")], max=8, unit="words") == [0.5]
    with pytest.raises(ValueError, match="unit"):
        length([Sample("text without ids")], max=8)
