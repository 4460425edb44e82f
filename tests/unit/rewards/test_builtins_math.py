"""Mathematical answers: what is equal, what is not, and real solutions."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from rewards import Sample
from rewards.builtins.math import equal, last_expression, math


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("1/2", "0.5"),
        ("\\frac{1}{2}", "\\dfrac12"),
        ("-\\frac{3}{4}", "\\frac{-3}{4}"),
        ("1\\frac{3}{4}", "7/4"),
        ("1,250", "1250"),
        ("1{,}250", "1250.0"),
        ("50\\%", "50"),
        ("\\$12.50", "25/2"),
        ("90^\\circ", "90"),
        ("5\\text{ cm}^2", "5"),
        ("\\sqrt{8}", "2\\sqrt{2}"),
        ("\\sqrt[3]{-27}", "-3"),
        ("\\frac{1}{\\sqrt{2}}", "\\frac{\\sqrt 2}{2}"),
        ("2^{10}", "1024"),
        ("2^{-1}", "0.5"),
        ("-2^2", "-4"),
        ("10!", "3628800"),
        ("\\pi r^2", "r^2\\pi"),
        ("(x+1)^2", "x^2 + 2x + 1"),
        ("\\frac{x^2-1}{x-1}", "x + 1"),
        ("3(x-2)", "3x-6"),
        ("sin^2 x + cos^2 x", "1"),
        ("\\log_2 8", "3"),
        ("\\ln(e^2)", "2"),
        ("|-3|", "3"),
        ("x = 5", "5"),
        ("x=5", "x = 10/2"),
        ("(1, 2)", "\\left( 1, \\frac{4}{2} \\right)"),
        ("\\{1, 2\\}", "\\{2,1\\}"),
        ("1, 2", "2, 1"),
        ("[0, \\infty)", "[0,\\infty)"),
        ("(-\\infty, 1) \\cup (2, 3]", "(2,3]\\cup(-\\infty,1)"),
        ("1 \\pm \\sqrt{2}", "1+\\sqrt{2}, 1-\\sqrt{2}"),
        ("3 + 4i", "4i+3"),
        ("\\text{Evelyn}", "evelyn"),
        ("\\text{(B)}", "(B)"),
        ("2 \\cdot 3", "6"),
        ("x_1 + x_2", "x_2 + x_1"),
        ("\\emptyset", "\\{\\}"),
    ],
)
def test_equal_answers(a: str, b: str) -> None:
    assert equal(a, b)
    assert equal(b, a)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("1/3", "0.333"),
        ("1/2", "2"),
        ("12", "1 2"),
        ("x + 1", "x + 2"),
        ("x^2", "2x"),
        ("x", "y"),
        ("(1, 2)", "(2, 1)"),
        ("(0, 1)", "[0, 1]"),
        ("(0, 1]", "(0, 1)"),
        ("1, 2", "1, 2, 2"),
        ("\\{1, 2\\}", "(1, 2)"),
        ("\\infty", "-\\infty"),
        ("\\infty", "10"),
        ("\\sqrt{2}", "1.41421356"),
        ("3 + 4i", "3 - 4i"),
        ("1/0", "2/0"),
        ("\\text{Evelyn}", "\\text{Carla}"),
        ("x = 5", "y = 5"),
        ("", "0"),
        ("?", "5"),
        ("1 \\pm 2", "3"),
        ("100000000000000000001", "100000000000000000002"),
        ("10^{10^{10}}", "1"),
    ],
)
def test_different_answers(a: str, b: str) -> None:
    assert not equal(a, b)
    assert not equal(b, a)


def test_where_the_answer_stands_and_what_the_row_needs() -> None:
    assert last_expression("so $x$ is\n$$\\frac{1}{2}$$ then") == "\\frac{1}{2}"
    assert last_expression("first\nx = 3.") == "x = 3"
    row = {"solution": "We get $2+2=4$, so \\boxed{\\frac{8}{2}}."}
    texts = ["\\boxed{4}", "The answer is $4$.", "#### 4", "thus $x = 4$", "4", "5", "\\boxed{}", ""]
    assert math([Sample(t, row=row) for t in texts]) == [1, 1, 1, 1, 1, 0, 0, 0]
    assert math([Sample("2", row={"answer": ["1", "2"]})]) == [1.0]
    with pytest.raises(KeyError, match="question"):
        math([Sample("2", row={"question": "?"})])
    with pytest.raises(ValueError, match="is empty"):
        math([Sample("2", row={"answer": " "})])


PIECES = [
    "(",
    "{",
    "\\frac",
    "\\frac{1}{",
    "-",
    "1,",
    "x^",
    "9",
    "\\sqrt",
    "|",
    "$",
    "1+",
    "(1",
    "!",
    "x!",
    "2^",
    "sin ",
    "x",
]


@pytest.mark.parametrize("piece", PIECES)
def test_a_degenerate_completion_takes_no_time_and_equals_nothing(piece: str) -> None:
    started = time.monotonic()
    for times in (20, 60, 120, 240, 20_000):
        assert math([Sample("\\boxed{" + piece * times, row={"answer": "x+7"})]) == [0.0]
        assert math([Sample(piece * times, row={"answer": "x+7"})]) == [0.0]
    assert time.monotonic() - started < 2.0


@pytest.mark.realdata
def test_math_agrees_with_the_published_flags_of_gsm8k_solutions(shared_data: Path) -> None:
    disagreements, count = [], 0
    for line in (shared_data / "text/gsm8k/example_model_solutions.jsonl").open(encoding="utf-8"):
        row = json.loads(line)
        for solved in (v for v in row.values() if isinstance(v, dict)):
            count += 1
            if bool(math([Sample(solved["solution"], row=row)])[0]) != solved["is_correct"]:
                disagreements.append((solved["solution"][-60:], row["ground_truth"][-30:]))
    assert (count, disagreements) == (5276, [])


@pytest.mark.realdata
def test_real_arithmetic_is_evaluated(shared_data: Path) -> None:
    rows = json.loads((shared_data / "text/bbh/multistep_arithmetic_two.json").read_text(encoding="utf-8"))["examples"]
    texts = [row["input"].removesuffix("=").strip() for row in rows]
    assert math([Sample(t, row=row) for t, row in zip(texts, rows, strict=True)]) == [1.0] * 250
    assert math([Sample(t + "+1", row=row) for t, row in zip(texts, rows, strict=True)]) == [0.0] * 250
