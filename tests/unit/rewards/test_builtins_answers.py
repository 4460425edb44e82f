"""Rewards that compare with a gold answer: choices, BIG-Bench Hard's targets, counts and boxes, by hand and on real
rows."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest

from rewards import PluginError, Sample
from rewards.builtins._answers import final_answer, row_gold
from rewards.builtins._choices import listed_options
from rewards.builtins.bbh import bbh
from rewards.builtins.box_iou import _best_sum, box_iou, iou
from rewards.builtins.choice import choice
from rewards.builtins.contains import contains
from rewards.builtins.count import count, final_count
from rewards.builtins.exact import exact
from rewards.find import load
from rewards.plugin import PluginSpec

COLOURS = ["red", "blue", "light blue"]


def gold_of(reward: Callable[..., Any]) -> Callable[..., str]:
    gold: Callable[..., str] = reward.__reward__.gold  # type: ignore[attr-defined]
    return gold


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("The answer is (B).", "(B)"),
        ("work\n#### 12\nmore", "12"),
        ("\\boxed{\\frac{1}{2}} is it", "\\frac{1}{2}"),
        ("<answer>\n 7 \n</answer> bye", "7"),
        ("**Answer:** **yes**", "yes"),
        ("Answer:\n\nthe moon.", "the moon"),
        ("A: one\nA: two", "two"),
        ("A: one\nA:", "one"),
        ("the answer is: $x$", "x"),
        ("\\boxed{open", "open"),
        ("no marker", None),
        ("####", None),
    ],
)
def test_where_a_completion_gives_its_answer(text: str, answer: str | None) -> None:
    assert final_answer(text) == answer


# ------------------------------------------------------------------------------------------------------------ choice


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("B", 1),
        ("(B)", 1),
        ("b)", 1),
        ("B. blue", 1),
        ("Blue", 1),
        ("It is blue, I think.", 1),
        ("Not (A), because it is cold.\nSo (B).", 1),
        ("The answer is (B), not (A)", 0),
        ("The answer is B", 1),
        ("(A) or (B)?\nThe answer is option B.", 1),
        ("light blue", 0),
        ("C", 0),
        ("red or blue", 0),
        ("A", 0),
        ("A blue sky", 1),
        ("D", 0),
        ("", 0),
        ("I do not know", 0),
    ],
)
def test_a_choice_by_letter_or_words(text: str, value: float) -> None:
    for gold in ("B", "(B)", "blue", 1):
        assert choice([Sample(text, row={"answer": gold})], options=COLOURS) == [value]


def test_options_come_from_the_recipe_the_row_or_the_prompt() -> None:
    prompt = "Which?\n(A) one\n(B) two\nA. red\nB. blue\nC. light blue"
    assert listed_options(prompt) == {"A": "red", "B": "blue", "C": "light blue"}
    parts = [{"type": "image", "image": "x.png"}, {"type": "text", "text": prompt}]
    for messages in ([{"role": "user", "content": prompt}], [{"role": "user", "content": parts}]):
        assert choice([Sample("light blue", messages=messages, row={"answer": "C"})]) == [1.0]
    row = {"options": ["red", "blue"], "letters": {"X": "red", "Y": "blue"}, "answer": "blue"}
    assert choice([Sample("(B)", row=row)], options="options") == [1.0]
    assert choice([Sample("(Y)", row=row), Sample("(B)", row=row)], options="letters") == [1.0, 0.0]
    assert gold_of(choice)(row, options="options") == "(B)"
    assert choice([Sample("so (C)", row={"answer": "c"})]) == [1.0]


@pytest.mark.parametrize(
    ("row", "args", "error", "message"),
    [
        ({"question": "?"}, {}, KeyError, "question"),
        ({"answer": "green"}, {"options": COLOURS}, ValueError, "'green' is none of the options: red, blue"),
        ({"answer": "blue"}, {}, ValueError, "none given"),
        ({"answer": "D"}, {"options": COLOURS}, ValueError, "'D' is none"),
        ({"answer": "A"}, {"options": "choices"}, KeyError, "'choices'; it has: answer"),
        ({"answer": "A", "choices": "a|b"}, {"options": "choices"}, ValueError, "a list or letter"),
    ],
)
def test_a_gold_choice_that_is_no_option_is_an_error(row: Any, args: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        choice([Sample("A", row=row)], **args)


# --------------------------------------------------------------------------------------------------------------- bbh


@pytest.mark.parametrize(
    ("target", "right", "wrong"),
    [
        ("(B)", ["(B)", "So the answer is (B).", "B"], ["(A)", "The answer is (A), not (B)", "?"]),
        ("-7", ["-7", "3 - 10 = -7. So the answer is -7."], ["7", "-7 or so. The answer is 8.", ""]),
        ("False", ["False", "not ( True ) is False", "So the answer is False."], ["True", "False is True", "maybe"]),
        ("ant bee cow", ["ant bee cow", "Sorted:\nant, bee, cow", "The answer is ant bee cow"], ["bee ant cow", ""]),
    ],
)
def test_bbh_compares_by_the_kind_of_the_target(target: str, right: list[str], wrong: list[str]) -> None:
    assert bbh([Sample(t, row={"target": target}) for t in right]) == [1.0] * len(right)
    assert bbh([Sample(t, row={"target": target}) for t in wrong]) == [0.0] * len(wrong)
    with pytest.raises(KeyError, match="input"):
        bbh([Sample(target, row={"input": "?"})])


TASKS = ("boolean_expressions", "object_counting", "multistep_arithmetic_two", "word_sorting", "date_understanding")


@pytest.mark.realdata
@pytest.mark.parametrize("task", TASKS)
def test_real_bbh_targets_score_best_and_another_target_lower(shared_data: Path, task: str) -> None:
    rows = json.loads((shared_data / f"text/bbh/{task}.json").read_text(encoding="utf-8"))["examples"]
    assert len(rows) == 250
    right = [gold_of(bbh)(row) for row in rows]
    assert bbh([Sample(t, row=row) for t, row in zip(right, rows, strict=True)]) == [1.0] * 250
    told = [f"{row['input']}\nLet's think.\nSo the answer is {row['target']}." for row in rows]
    assert bbh([Sample(t, row=row) for t, row in zip(told, rows, strict=True)]) == [1.0] * 250
    others = [next(r["target"] for r in rows if r["target"] != row["target"]) for row in rows]
    told = [f"{t}\nSo the answer is {other}." for t, other in zip(told, others, strict=True)]
    assert bbh([Sample(t, row=row) for t, row in zip(told, rows, strict=True)]) == [0.0] * 250


@pytest.mark.realdata
def test_real_dates_are_chosen_by_letter_or_by_date(shared_data: Path) -> None:
    rows = json.loads((shared_data / "text/bbh/date_understanding.json").read_text(encoding="utf-8"))["examples"]
    scores: dict[str, float] = {"letter": 0, "date": 0, "next": 0}
    for row in rows:
        options, letter = listed_options(row["input"]), row["target"][1]
        messages = [{"role": "user", "content": row["input"]}]
        letters = list(options)
        following = letters[(letters.index(letter) + 1) % len(letters)]
        texts = (f"It is ({letter}).", f"The answer is {options[letter]}", f"The answer is ({following})")
        found = choice([Sample(t, messages=messages, row=row) for t in texts])
        scores = {name: scores[name] + value for name, value in zip(scores, found, strict=True)}
    assert scores == {"letter": 250, "date": 250, "next": 0}


# ------------------------------------------------------------------------------------------------------------- count


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("3", 3),
        ("There are three circles.", 3),
        ("Twenty-one shapes", 21),
        ("1,024 dots.", 1024),
        ("3.0", 3),
        ("There are no circles.", 0),
        ("None.", 0),
        ("three, no more", 3),
        ("No, there are 2 circles", 2),
        ("2 red and 3 blue make five", 5),
        ("Answer: 4\nthe box has 2 corners", 4),
        ("about 2.5", None),
        ("many", None),
        ("9" * 5000, None),
        ("", None),
    ],
)
def test_the_count_of_a_text(text: str, number: int | None) -> None:
    assert final_count(text) == number


def test_a_count_is_right_or_partly() -> None:
    samples = [Sample(t, row={"answer": 4}) for t in ("four", "3", "6", "12", "?")]
    assert count(samples) == [1.0, 0.0, 0.0, 0.0, 0.0]
    assert count(samples, partial=True) == [1.0, 0.75, 0.5, 0.0, 0.0]
    assert count([Sample("1", row={"answer": "none"})], partial=True) == [0.0]
    for gold in (2.5, -1, "many", True):
        with pytest.raises(ValueError, match="is no count"):
            count([Sample("1", row={"answer": gold})])
    with pytest.raises(KeyError, match="question"):
        count([Sample("1", row={"question": "?"})])


# ------------------------------------------------------------------------------------------------------------- boxes


def test_boxes_are_read_from_the_ways_models_write_them() -> None:
    row = {"answer": [[0, 0, 10, 10]]}
    texts = [
        "[0, 0, 10, 10]",
        '```json\n[{"bbox_2d": [0, 0, 10, 10], "label": "cat"}]\n```',
        "<|box_start|>(0,0),(10,10)<|box_end|>",
        "It is at (0.0, 0.0, 10.0, 10.0).",
        "[5, 0, 10, 10]",
        "[0, 0, 10, 10] [0, 0, 10, 10]",
        "[10, 10, 0, 0]",
        "[20, 20, 30, 30]",
        "there is none",
    ]
    assert box_iou([Sample(t, row=row) for t in texts]) == [1, 1, 1, 1, 0.5, 0.5, 0, 0, 0]
    assert box_iou([Sample(texts[4], row=row)], threshold=0.5) == [1.0]
    assert box_iou([Sample(texts[4], row=row)], threshold=0.51) == [0.0]
    assert iou((0, 0, 2, 2), (1, 1, 3, 3)) == pytest.approx(1 / 7)


def test_several_boxes_are_matched_whatever_their_order() -> None:
    row = {"answer": json.dumps([{"bbox_2d": [0, 0, 10, 10]}, {"bbox_2d": [20, 20, 30, 30]}])}
    texts = ["[20, 20, 30, 30], [0, 0, 10, 10]", "[0, 0, 10, 10]", "[0,0,10,10] [20,20,30,30] [1,1,2,2]"]
    assert box_iou([Sample(t, row=row) for t in texts]) == [1.0, 0.5, pytest.approx(2 / 3)]
    chance = random.Random(0)
    for rows, columns in [(1, 5), (3, 3), (4, 2), (5, 6)]:
        values = [[chance.choice([0.0, chance.random()]) for _ in range(columns)] for _ in range(rows)]
        wide = values if rows <= columns else [list(c) for c in zip(*values, strict=True)]
        best = max(
            sum(w[j] for w, j in zip(wide, p, strict=False)) for p in permutations(range(len(wide[0])), len(wide))
        )
        assert _best_sum(values) == pytest.approx(best)


@pytest.mark.parametrize("gold", [[], [0, 0, 1], [[0, 0, 1, 1], [5, 5, 4, 6]], "[0, 0", [0, 0, 1, float("nan")], 7])
def test_a_gold_box_that_is_none_is_an_error(gold: Any) -> None:
    with pytest.raises(ValueError, match="gold box"):
        box_iou([Sample("[0,0,1,1]", row={"answer": gold})])


def test_a_degenerate_completion_of_any_kind_takes_no_time() -> None:
    started = time.monotonic()
    row = {"answer": "1", "box": [0, 0, 1, 1], "options": ["1", "2"]}
    for piece in ("[0,0,1,1]", "(A) ", "[ ", "\n", "1 ", "one ", "twenty-", "\\boxed{", "A:\n", "answer is ", "(0,0),"):
        sample = [Sample(piece * 10_000, row=row)]
        box_iou(sample, column="box")
        count(sample)
        bbh(sample)
        choice(sample, options="options")
    assert time.monotonic() - started < 10.0


# --------------------------------------------------------------------------------------------------------- real rows


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.open(encoding="utf-8")]


@pytest.mark.realdata
def test_answers_about_real_pictures_score_best_and_other_answers_lower(shared_data: Path) -> None:
    for name, column, size in (("easy_vqa/vqa", "answer", 1548), ("nlvr/vqa", "label", 264)):
        rows = lines(shared_data / f"multimodal/{name}.jsonl")
        options = sorted({row[column] for row in rows})
        assert len(rows) == size
        for reward, args in ((choice, {"options": options, "column": column}), (exact, {"column": column})):
            right = [gold_of(reward)(row, **args) for row in rows]
            assert reward([Sample(t, row=r) for t, r in zip(right, rows, strict=True)], **args) == [1.0] * size
        said = [Sample(f"I see it clearly.\nAnswer: {row[column].capitalize()}.", row=row) for row in rows]
        assert choice(said, options=options, column=column) == [1.0] * size
        other = [options[options.index(row[column]) - 1] for row in rows]
        said = [Sample(f"Answer: {o}", row=row) for o, row in zip(other, rows, strict=True)]
        assert choice(said, options=options, column=column) == [0.0] * size


@pytest.mark.realdata
def test_receipts_and_pairs_of_pictures(shared_data: Path) -> None:
    receipts = lines(shared_data / "multimodal/receipts/vqa.jsonl")
    assert len(receipts) == 60
    for reward in (exact, contains):
        right = [Sample(gold_of(reward)(row), row=row) for row in receipts]
        wrong = [Sample(row["question"], row=row) for row in receipts]
        assert (sum(reward(right)), sum(reward(wrong))) == (60, 0)
    pairs = lines(shared_data / "multimodal/nlvr/two_image_vqa.jsonl")
    samples = [[Sample(f"It is the {word} one.", row=row) for word in ("first", "second")] for row in pairs]
    assert [sum(choice(two, options=["first", "second"])) for two in samples] == [1.0] * 70


@pytest.mark.realdata
def test_counts_and_boxes_of_real_pictures(shared_data: Path) -> None:
    for row in lines(shared_data / "multimodal/nlvr/vqa.jsonl"):
        items = [item for box in row["structured_rep"] for item in box]
        corners = [[i["x_loc"], i["y_loc"], i["x_loc"] + i["size"], i["y_loc"] + i["size"]] for i in items]
        row = {**row, "items": len(items), "boxes": corners}
        texts = (gold_of(count)(row, column="items"), f"I see {len(items)} items.", f"{len(items) + 1}")
        assert count([Sample(t, row=row) for t in texts], column="items") == [1.0, 1.0, 0.0]
        moved = [[x1 + 3, y1, x2 + 3, y2] for x1, y1, x2, y2 in corners]
        texts = (gold_of(box_iou)(row, column="boxes"), json.dumps(corners[::-1]), json.dumps(moved), "[0, 0, 1, 1]")
        best, reversed_, worse, worst = box_iou([Sample(t, row=row) for t in texts], column="boxes")
        assert best == reversed_ == 1.0
        assert 1 > worse > worst


def test_impossible_arguments_are_refused() -> None:
    for use, args, message in (
        ("box_iou", {"threshold": 0.0}, "threshold is an IoU"),
        ("choice", {"options": []}, "0 options"),
        ("count", {"partial": "yes"}, "type bool"),
    ):
        with pytest.raises(PluginError, match=message):
            load(PluginSpec(use, args=args), ".")
    with pytest.raises(ValueError, match="the gold answer is"):
        exact([Sample("", row={"answer": []})])
    with pytest.raises(ValueError, match="empty text"):
        contains([Sample("", row={"answer": [""]})])


def test_a_gold_answer_inside_an_object_is_named_with_what_reaches_it() -> None:
    verl = {"prompt": [], "reward_model": {"style": "rule", "ground_truth": "42"}, "extra_info": {"answer": "6 * 7"}}
    with pytest.raises(KeyError, match=r"`columns: \{ground_truth: reward_model.ground_truth\}` of the source"):
        row_gold(verl, None)
    with pytest.raises(KeyError, match=r"`columns: \{answer: extra_info.answer\}` of the source"):
        row_gold(verl, "answer")
