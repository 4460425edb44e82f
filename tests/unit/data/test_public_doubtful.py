"""Rows of public layouts that say more than the layout reads, or another thing: what is refused, left out or named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from align.data.prepare import prepare
from align.data.records import Kind
from align.data.tokenizer import ChatTokenizer
from align.errors import DataError
from tests.unit.data.build import prepared, scored, source, text

TURN = "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n"


def said(role: str, words: str, *replies: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"text": words, "role": role, "replies": list(replies), **more}


def tree(root: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"message_tree_id": "t", "prompt": root, **more}


def seed(**inside: Any) -> dict[str, Any]:
    return {"instruction": "Q", "instances": [{"input": "", "output": "A", **inside}]}


def moss(**more: Any) -> dict[str, Any]:
    return {"Human": "<|Human|>: Q<eoh>\n", "MOSS": "<|MOSS|>: A<eom>\n", **more}


ANSWER = said("assistant", "A", rank=0)
ARENA = {
    name: [{"role": ("user", "assistant")[n % 2], "content": words} for n, words in enumerate(turns)]
    for name, turns in (("conversation_a", "QARC"), ("conversation_b", "QBRD"))
}


@pytest.mark.parametrize(
    ("kind", "row", "why"),
    [
        ("conversation", {"src": ["Q", "R"], "tgt": ["A", "B"], "label": [1]}, "`label` must be a list of 2"),
        ("conversation", {"src": ["Q", "R"], "tgt": ["A", "B"], "label": [1, 2]}, "`label` must be a list of 2"),
        ("conversation", {"src": ["S", "Q"], "tgt": ["", "A"], "is_system": 1}, "the first text of `src`"),
        ("conversation", {"src": ["Der Hund"], "tgt": ["The dog"], "src_lang": "de"}, "a text and its translation"),
        ("conversation", {"src": ["Guten", "Tag"], "tgt": ["Good", "day"]}, "the tokens of one text each"),
        ("pair", {"src": ["Q"], "response": ["A", "B", "C"], "sort": [2, 1, 0]}, "no layout"),
        ("prompt", {"src": ["a.txt"], "text": "T"}, "no layout"),
        ("conversation", seed(constraints="In one word."), "the instance has `constraints`"),
        ("conversation", seed(instruction_with_input="Q: I"), "the instance has `instruction_with_input`"),
        ("conversation", seed(images=["a.png"]), "the instance has `images`"),
        ("conversation", seed(weight=0), "the instance has `weight`"),
        ("conversation", seed(instruction="R"), "the instance has `instruction`"),
        ("conversation", seed() | {"input": "I"}, "its instance an input of its own"),
        ("conversation", tree(said("prompter", "Q", ANSWER, deleted=True)), "took the first message away"),
        ("prompt", tree(said("prompter", "Q", ANSWER, review_result=False)), "took the first message away"),
        ("conversation", tree(said("prompter", "Q", ANSWER), tree_state="aborted_low_grade"), "ended the tree"),
        ("pair", tree(said("prompter", "Q", ANSWER, said("prompter", "R", rank=1))), "is of the same role"),
        ("conversation", tree(said("prompter", "Q", said("assistant", "A", ANSWER))), "is of the same role"),
        ("conversation", tree(said("prompter", "Q", said("assistant", "A", deleted="maybe"))), "must be true or false"),
        ("conversation", {"chat": {"turn_1": moss(**{"Tool Responses": "<|Results|>: 42<eor>"})}}, "calls no tool"),
        ("conversation", {"chat": {"turn_1": moss(loss=False)}}, "has `loss`"),
        ("conversation", {"chat": {"turn_1": moss(System="S")}}, "has `System`"),
        ("conversation", {"chat": {"turn_1": moss(), "turn_3": moss()}}, "turn_1, turn_2 and so on"),
        ("conversation", {"chat": {"turn_1": moss(), "turn_2": {"MOSS": "A"}}}, "what `Human` and `MOSS` say"),
        ("prompt", {"question_id": 1, "turns": ["A"], "model_id": "m"}, "`model_id` beside `turns`"),
        ("prompt", {"question": [[{"role": "user", "content": "Q"}]], "function": [{"name": "f"}],
                    "tools": [{"name": "g"}]}, "tools in `function` and beside it"),
        ("pair", ARENA | {"winner": "model_a", "turn": 3}, "`turn` says which answer was judged"),
        ("pair", {"prompt": '["Q"]', "response_a": '["A"]', "response_b": '["B"]', "winner": "tie"}, "a tie"),
        *(
            ("pair", {"prompt": '["Q"]', "response_a": '["A"]', "response_b": '["B"]', "winner_model_a": 1,
                      "winner_model_b": 0, "winner_tie": tie}, "in `winner_tie` that none did")
            for tie in (1, "true")
        ),
        *(
            ("pair", {"prompt": "Q", "response_a": "A", "response_b": "B", "winner": word}, "must name one of the two")
            for word in ("not_a", "worse_a", "neither_b", "tie_b")
        ),
        *(
            ("pair", {"prompt": "Q", "response_1": "A", "response_2": "B", "preferred": word}, "must name one of the t")
            for word in ("both_1_2", "tied_1")
        ),
        ("conversation", {"chat": "USER: Q ASSISTANT: A USER: R ASSISTANT: B"}, "a turn of `chat` holds 'ASSISTANT:'"),
        ("conversation", {"chat": "USER: Q\nASSISTANT: A</s>"}, "a turn of `chat` holds"),
        ("conversation", {"chat": "USER: Q\n\nASSISTANT: A</s>"}, "a turn of `chat` holds '</s>'"),
        ("conversation", {"chat": "USER: Q\n\nASSISTANT: so:\n\nUSER: R\n\nASSISTANT: B <|endoftext|>"},
         "does not end with <"),
        ("conversation", {"chat": "USER: Q\n\nASSISTANT: A <|endoftext|>USER: R\n\nASSISTANT: B"},
         "does not end with <"),
        ("conversation", {"chat": "USER: Q\n\nASSISTANT: so:\nUSER: a"}, "a turn of `chat` holds 'USER:'"),
        ("conversation", {"chat": "USER: Q\n\nASSISTANT: A\n\nSYSTEM: S"}, "a turn of `chat` holds 'SYSTEM:'"),
        ("conversation", {"query": "Q", "tools": "[]", "answers": [{"name": "Paris", "score": 0.9}]}, "no layout"),
    ],
)  # fmt: skip
def test_a_row_that_may_mean_another_thing_is_refused(
    tmp_path: Path, tokenizer: ChatTokenizer, kind: Kind, row: dict[str, Any], why: str
) -> None:
    with pytest.raises(DataError, match=why):
        prepared(tmp_path, [row], kind, tokenizer)


@pytest.mark.parametrize(
    ("row", "what"),
    [
        (seed(explanation="E"), "key 'explanation' of `instances`"),
        (tree(said("prompter", "Q", said("assistant", "A", labels={"spam": 1}))), "key 'labels' of a message"),
        (tree(said("prompter", "Q", ANSWER, said("assistant", "B", deleted="true"))), "moderators took away"),
        (tree(said("prompter", "Q", ANSWER, said("assistant", "B", review_result=0))), "moderators took away"),
        ({"chat": {"turn_1": moss(score=1)}}, "key 'score' of a turn of `chat`"),
    ],
)
def test_what_a_layout_leaves_out_within_a_row_is_named(
    tmp_path: Path, tokenizer: ChatTokenizer, row: dict[str, Any], what: str
) -> None:
    made = prepared(tmp_path, [row], "conversation", tokenizer)
    assert text(tokenizer, made.items[0].trunk) == f"{TURN}A<|im_end|>\n"
    assert any(what in note for note in made.report.sources[0].notes)


def test_texts_of_paddle_that_are_marked_0_are_not_learnt(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    row = {"src": ["Q", "R"], "tgt": ["A", "B"], "label": [0, 1]}
    [one] = prepared(tmp_path, [row], "conversation", tokenizer).items
    assert scored(tokenizer, one.trunk) == "B<|im_end|>"


def test_a_mark_of_another_text_of_moss_is_text(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    row = {"chat": {"turn_1": {"Human": "Q", "MOSS": "A <eod>"}}}
    [one] = prepared(tmp_path, [row], "conversation", tokenizer).items
    assert scored(tokenizer, one.trunk) == "A <eod><|im_end|>"


def test_turns_behind_the_one_that_was_judged_are_left_out(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    made = prepared(tmp_path, [ARENA | {"winner": "model_b", "turn": 1}], "pair", tokenizer)
    assert [scored(tokenizer, side) for side in made.items[0].branches] == ["B<|im_end|>", "A<|im_end|>"]
    assert any("behind the one that was judged" in note for note in made.report.sources[0].notes)
    [both] = prepared(tmp_path, [ARENA | {"winner": "model_b", "turn": 2}], "pair", tokenizer).items
    assert scored(tokenizer, both.branches[0]) == "B<|im_end|>D<|im_end|>"


def test_a_table_of_turns_with_one_verdict_is_read_as_the_arenas(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    row = {"prompt": '["Q"]', "response_a": '["A"]', "response_b": '["B"]', "winner": "model_b"}
    [pair] = prepared(tmp_path, [row], "pair", tokenizer).items
    assert text(tokenizer, pair.trunk) == TURN
    assert [scored(tokenizer, side) for side in pair.branches] == ["B<|im_end|>", "A<|im_end|>"]


@pytest.mark.parametrize("word", ["a", "model_a", "Response A", "option-a", "answer_a"])
def test_a_verdict_names_a_side_in_known_words(tmp_path: Path, tokenizer: ChatTokenizer, word: str) -> None:
    row = {"prompt": "Q", "response_a": "A", "response_b": "B", "winner": word}
    [pair] = prepared(tmp_path, [row], "pair", tokenizer).items
    assert scored(tokenizer, pair.branches[0]) == "A<|im_end|>"


# ------------------------------------------------------------------------------------------------- beside the rows


@pytest.mark.parametrize(
    ("rows", "beside"),
    [
        ("instances", {"instruction": "Q"}),
        ("examples", {"task_prefix": "P"}),
        ("questions", {"context": "C"}),
        ("questions", {"passage": "C"}),
        ("data", {"system": "S"}),
        ("data", {"weight": 0}),
        ("train", {"Template": "T {}"}),
    ],
)
def test_what_stands_beside_the_rows_of_a_file_and_may_be_of_each_is_refused(
    tmp_path: Path, tokenizer: ChatTokenizer, rows: str, beside: dict[str, Any]
) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps(beside | {rows: [{"input": "Q", "output": "A"}] * 2}))
    [name] = beside
    with pytest.raises(DataError, match=f"`{rows}` holds its rows, and `{name}` beside it may be of each"):
        prepare((source(path),), "conversation", tokenizer, seed=0)


def test_other_facts_beside_the_rows_of_a_file_are_named(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"version": 2, "licence": None, "data": [{"query": "Q", "response": "A"}] * 2}))
    made = prepare((source(path),), "conversation", tokenizer, seed=0)
    assert made.report.sources[0].notes == [
        f"`version`, which stands beside the rows of the file, is not read: 2 times, first {path} data[0]"
    ]


@pytest.mark.parametrize(
    "row",
    [
        {"query": "Q", "response": "A"},
        {"instruction": "Q", "output": "A", "input": "I"},
        {"src": ["Q"], "tgt": ["A"]},
        {"prompt": "Q", "completion": "A"},
    ],
)
def test_a_context_beside_any_question_that_is_a_text_has_two_meanings(
    tmp_path: Path, tokenizer: ChatTokenizer, row: dict[str, Any]
) -> None:
    rows = [row, row, row | {"context": "C"}]
    with pytest.raises(DataError, match=r"or `context` and `.*` together"):
        prepared(tmp_path, rows, "conversation", tokenizer)
    asked = next(iter(row))
    if asked != "src":  # a layout found as it is, of which no field is mapped
        made = prepared(tmp_path, rows, "conversation", tokenizer, columns={asked: asked})
        assert any("'context'" in note for note in made.report.sources[0].notes)
    late = [row] * 1001 + [row | {"context": "C"}]
    with pytest.raises(DataError, match=r"data.jsonl:1002: the row has `context`, on which the answer may depend"):
        prepared(tmp_path, late, "conversation", tokenizer)


def test_what_the_question_holds_already_is_not_left_out(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    for row in (
        {"query": "C: Q", "response": "A", "context": "C"},
        {"question": "Q? yes or no", "answer": "no", "answer_choices": ["yes", "no"]},
    ):
        assert prepared(tmp_path, [row], "conversation", tokenizer).items


# ------------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize("names", [("question", "answer"), ("query", "response"), ("instruction", "output")])
@pytest.mark.parametrize(
    "beside",
    [
        {"things": ["x", "y"]},
        {"things": {"A": "x", "B": "y"}},
        {"optA": "x", "optB": "y"},
        {"sol1": "x", "sol2": "y"},
        {"ans0": "x", "ans1": "y"},
        {"1": "x", "2": "y"},
    ],
)
def test_a_number_beside_what_may_be_choices_has_two_meanings(
    tmp_path: Path, tokenizer: ChatTokenizer, names: tuple[str, str], beside: dict[str, Any]
) -> None:
    row = {names[0]: "Q", names[1]: 1, **beside}
    for kind in ("conversation", "prompt"):
        with pytest.raises(DataError, match=r"is the number 1: it may be the answer, or say which|would leave out"):
            prepared(tmp_path, [row], kind, tokenizer)
    ours = {"question": "query", "answer": "response"}
    columns = {ours.get(name, name): name for name in names}
    [one] = prepared(tmp_path, [row], "conversation", tokenizer, columns=columns).items
    assert scored(tokenizer, one.trunk) == "1<|im_end|>"


@pytest.mark.parametrize("name", ["ctx", "support", "answer_options", "possible_answers", "opa", "endings", "option_A"])
def test_a_guess_leaves_no_choices_out(tmp_path: Path, tokenizer: ChatTokenizer, name: str) -> None:
    with pytest.raises(DataError, match=f"would leave out `{name}`"):
        prepared(tmp_path, [{"question": "Q", "answer": "A", name: "x"}], "conversation", tokenizer)


def test_a_ranking_may_be_ranks_or_an_order(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    row = {"prompt": "Q", "responses": ["A", "B", "C"], "ranking": [1, 2, 0]}
    with pytest.raises(DataError, match="the rank of each of `responses`, or the order"):
        prepared(tmp_path, [row], "pair", tokenizer)
    columns = {"query": "prompt", "responses": "responses", "ranks": "ranking"}
    [pair] = prepared(tmp_path, [row], "pair", tokenizer, columns=columns).items
    assert [scored(tokenizer, side)[0] for side in pair.branches] == ["C", "B"]


@pytest.mark.parametrize("row", [{"src": "web", "answer": "A", "title": "T"}, {"src": "Q", "tgt": "A", "mt": "B"}])
def test_a_source_is_no_question(tmp_path: Path, tokenizer: ChatTokenizer, row: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=r"no layout|a text that is translated"):
        prepared(tmp_path, [row], "conversation", tokenizer)
