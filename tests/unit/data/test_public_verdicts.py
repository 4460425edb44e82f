"""Verdicts and calls of single projects: arenas, raters, function calls outside of messages, the same said twice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from align.data.tokenizer import ChatTokenizer, load_tokenizer
from align.errors import DataError
from tests.unit.data.build import prepared, scored, text

TURN = "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n"


def asked(*said: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[n % 2], "content": words} for n, words in enumerate(said)]


TABLE = {"prompt": '["Q"]', "response_a": '["A"]', "response_b": '["B"]'}
ARENA = {"conversation_a": asked("Q", "A"), "conversation_b": asked("Q", "B")}
SHP = {"history": "Q", "human_ref_A": "A", "human_ref_B": "B", "score_A": 1, "score_B": 2}
STEER = {"context": asked("Q"), "response1": "A", "response2": "B"}


@pytest.mark.parametrize(
    ("row", "first"),
    [
        (ARENA | {"winner": "model_a"}, True),
        (ARENA | {"winner": "model_b"}, False),
        (TABLE | {"winner_model_a": 1, "winner_model_b": 0, "winner_tie": 0}, True),
        (TABLE | {"winner_model_a": "0", "winner_model_b": "1", "winner_tie": "0"}, False),
        (SHP | {"labels": 1}, True),
        (SHP | {"labels": 0}, False),
        (STEER | {"overall_preference": -1}, True),
        (STEER | {"overall_preference": 3}, False),
        ({"instruction": "Q", "response_a": "A", "response_b": "B", "chosen": "A"}, True),
        ({"instruction": "Q", "response_a": "A", "response_b": "B", "chosen": "B"}, False),
        ({"prompt": "Q", "response_0": "A", "response_1": "B", "better_response_id": 1}, False),
    ],
)
def test_the_side_that_the_verdict_names_is_chosen(
    tmp_path: Path, tokenizer: ChatTokenizer, row: dict[str, Any], first: bool
) -> None:
    [pair] = prepared(tmp_path, [row], "pair", tokenizer).items
    assert text(tokenizer, pair.trunk) == TURN
    assert [scored(tokenizer, side)[0] for side in pair.branches] == (["A", "B"] if first else ["B", "A"])


@pytest.mark.parametrize(
    ("row", "why"),
    [
        (ARENA | {"winner": "tie (bothbad)"}, "a tie"),
        (ARENA | {"winner": "left"}, "`winner` must be model_a, model_b or a tie"),
        (TABLE | {"winner_model_a": 0, "winner_model_b": 0}, "a tie"),
        (TABLE | {"winner_model_a": 0.3, "winner_model_b": 0.7}, "must be 0 or 1"),
        (TABLE | {"prompt": '["Q", "R"]', "winner_model_a": 1, "winner_model_b": 0}, "2 turns and `response_a` 1"),
        (SHP | {"labels": 2}, "`labels` must be 1"),
        (STEER | {"overall_preference": 0}, "a tie"),
        ({"prompt": "Q", "response_0": "A", "response_1": "B", "better_response_id": 1, "safer_response_id": 0},
         "preference: better_response_id}` or `.*preference: safer_response_id"),
    ],
)  # fmt: skip
def test_a_verdict_that_prefers_none_or_two_is_refused(
    tmp_path: Path, tokenizer: ChatTokenizer, row: dict[str, Any], why: str
) -> None:
    with pytest.raises(DataError, match=why):
        prepared(tmp_path, [row], "pair", tokenizer)


def test_several_turns_of_an_arenas_table_part_where_the_answers_do(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    row = {"prompt": '["Q", "R"]', "response_a": '["A", "C"]', "response_b": '["B", "D"]'}
    row |= {"winner_model_a": 0, "winner_model_b": 1}
    [pair] = prepared(tmp_path, [row], "pair", tokenizer).items
    assert text(tokenizer, pair.trunk) == TURN
    assert [scored(tokenizer, side) for side in pair.branches] == ["B<|im_end|>D<|im_end|>", "A<|im_end|>C<|im_end|>"]
    with pytest.raises(DataError, match="`prompt` has 2 turns, and two answers to each"):
        prepared(tmp_path, [row], "prompt", tokenizer)
    [one] = prepared(tmp_path, [row | {"prompt": '["Q"]'}], "prompt", tokenizer).items
    assert tokenizer.decode(one.token_ids, skip_special_tokens=False) == TURN


CALL = '<tool_call>\n{"name": "w", "arguments": {"city": "O\'s"}}\n</tool_call><|im_end|>'


def test_answers_that_are_calls_are_called(tmp_path: Path, folder: Path) -> None:
    qwen = load_tokenizer(folder, chat_template="qwen3")
    calls, tools = [{"name": "w", "arguments": {"city": "O's"}}], [{"name": "w", "parameters": {}}]
    row = {"query": "Q", "answers": json.dumps(calls), "tools": json.dumps(tools)}
    [tree] = prepared(tmp_path, [row], "conversation", qwen).items
    assert scored(qwen, tree.trunk).endswith(CALL) and '"name": "w"' in text(qwen, tree.trunk).partition("user\n")[0]
    [item] = prepared(tmp_path, [row], "prompt", qwen).items
    assert item.row["reference_answer"] == row["answers"]
    with pytest.raises(DataError, match="holds no call"):
        prepared(tmp_path, [row | {"answers": "[]"}], "conversation", qwen)


def test_a_text_of_speakers_and_function_calls_is_turns_and_tools(tmp_path: Path, folder: Path) -> None:
    qwen = load_tokenizer(folder, chat_template="qwen3")
    function = {"name": "w", "description": "d", "parameters": {"type": "object", "properties": {}}}
    offer = (
        "SYSTEM: You help. Use them if required -\n" + json.dumps(function, indent=1) + "\n\n" + json.dumps(function)
    )
    chat = (
        'USER: Q\n\n\nASSISTANT: <functioncall> {"name": "w", "arguments": \'{"city": "O\\\'s"}\'} <|endoftext|>\n\n\n'
        'FUNCTION RESPONSE: {"t": 3}\n\n\nASSISTANT: A <|endoftext|>\n\n\n'
    )
    [tree] = prepared(tmp_path, [{"system": offer, "chat": chat}], "conversation", qwen).items
    whole = text(qwen, tree.trunk)
    assert CALL in scored(qwen, tree.trunk) and '<tool_response>\n{"t": 3}\n</tool_response>' in whole
    assert scored(qwen, tree.trunk).endswith("A<|im_end|>") and "You help. Use them if required." in whole
    assert whole.count('"description": "d"') == 2
    wrongs = ("<functioncall> w(1)", "<s> A", "A </s>")
    for wrong in ({"system": "Use them if required - {"}, *({"chat": f"USER: Q\n\nASSISTANT: {w}"} for w in wrongs)):
        with pytest.raises(DataError, match=r"is no call|cannot be read|a mark within one"):
            prepared(tmp_path, [{"system": offer, "chat": chat} | wrong], "conversation", qwen)


def test_whole_conversations_beside_a_text_with_their_questions_are_a_pair(
    tmp_path: Path, tokenizer: ChatTokenizer
) -> None:
    row = {
        "prompt": "<|user|>\nP\n<|user|>\nQ",
        "chosen": asked("P", "O", "Q", "A"),
        "rejected": asked("P", "O", "Q", "B"),
    }
    made = prepared(tmp_path, [row], "pair", tokenizer)
    assert text(tokenizer, made.items[0].trunk).endswith(f"O<|im_end|>\n{TURN}")
    assert [scored(tokenizer, side) for side in made.items[0].branches] == ["A<|im_end|>", "B<|im_end|>"]
    assert any("whose questions chosen and rejected begin with" in note for note in made.report.sources[0].notes)
    with pytest.raises(DataError, match="chosen starts with a user turn"):
        prepared(tmp_path, [row | {"prompt": "something else"}], "pair", tokenizer)


@pytest.mark.parametrize("name", ["prompt", "instruction"])
def test_a_prompt_that_is_a_turn_of_the_messages_beside_it_is_one_meaning(
    tmp_path: Path, tokenizer: ChatTokenizer, name: str
) -> None:
    [item] = prepared(tmp_path, [{name: "Q", "messages": asked("Q", "A")}], "prompt", tokenizer).items
    assert item.row["reference_answer"] == "A"
    with pytest.raises(DataError, match="several layouts fit"):
        prepared(tmp_path, [{name: "something else", "messages": asked("Q", "A")}], "prompt", tokenizer)


def test_the_expected_answer_goes_before_a_solution_that_a_model_wrote(
    tmp_path: Path, tokenizer: ChatTokenizer
) -> None:
    row = {"problem": "Q", "generated_solution": "A", "expected_answer": "42"}
    [tree] = prepared(tmp_path, [row], "conversation", tokenizer).items
    assert scored(tokenizer, tree.trunk) == "A<|im_end|>"
    [item] = prepared(tmp_path, [row], "prompt", tokenizer).items
    assert item.row["reference_answer"] == "42"
