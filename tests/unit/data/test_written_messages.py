"""Messages and calls that stand as text in their rows: read, or refused where they would be learnt as that text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from align.data.records import Kind
from align.data.tokenizer import ChatTokenizer
from align.errors import DataError
from tests.unit.data.build import prepared, scored

ASK, SAY, BAD = (
    {"role": role, "content": words} for role, words in (("user", "Q"), ("assistant", "A"), ("assistant", "B"))
)
GOOD = {
    name: json.dumps([message])
    for name, message in (("prompt", ASK), ("completion", SAY), ("chosen", SAY), ("rejected", BAD))
}
FIELDS: dict[Kind, tuple[str, ...]] = {
    "conversation": ("prompt", "completion"), "pair": ("prompt", "chosen", "rejected"), "prompt": ("prompt",),
}  # fmt: skip


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in FIELDS.items() for name in names])
@pytest.mark.parametrize("before", [1, 1001])
def test_a_text_where_other_rows_hold_messages_is_refused_where_it_stands(
    tmp_path: Path, tokenizer: ChatTokenizer, kind: Kind, name: str, before: int
) -> None:
    row = {field: GOOD[field] for field in FIELDS[kind]}
    broken = row | {name: GOOD[name][:-2]}
    with pytest.raises(DataError, match=rf"data.jsonl:{before + 1}: the text of `{name}` is no messages in JSON"):
        prepared(tmp_path, [row] * before + [broken], kind, tokenizer)


@pytest.mark.parametrize(("kind", "name"), [("conversation", "completion"), ("pair", "chosen"), ("pair", "rejected")])
def test_messages_as_python_prints_them_beside_messages_are_refused(
    tmp_path: Path, tokenizer: ChatTokenizer, kind: Kind, name: str
) -> None:
    printed = str(json.loads(GOOD[name]))
    for prompt in (GOOD["prompt"], [ASK]):
        row = {field: GOOD[field] for field in FIELDS[kind]} | {"prompt": prompt, name: printed}
        with pytest.raises(DataError, match=f"the text of `{name}` is no messages in JSON, as they stand in other col"):
            prepared(tmp_path, [row], kind, tokenizer)
    made = prepared(tmp_path, [{"question": "Q", "answer": str([SAY])}], "conversation", tokenizer)
    assert any("as Python prints it, and is taken for the text" in note for note in made.report.sources[0].notes)


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({"query": GOOD["prompt"], "response": "A"}, "`query` holds messages as JSON text"),
        ({"question": GOOD["prompt"], "answer": GOOD["completion"]}, "`query` holds messages as JSON text"),
        ({"instruction": GOOD["prompt"], "output": "A"}, "`instruction` holds messages as JSON text"),
        ({"prompt": json.dumps({"messages": [ASK], "temperature": 0}), "completion": "A"}, "beside them temperature"),
        ({"prompt": "Write a chat", "completion": json.dumps([ASK, SAY])}, "or a JSON text that was asked for"),
    ],
)
def test_messages_as_json_text_that_would_be_a_turns_text_are_refused(
    tmp_path: Path, tokenizer: ChatTokenizer, row: dict[str, Any], why: str
) -> None:
    with pytest.raises(DataError, match=why):
        prepared(tmp_path, [row], "conversation", tokenizer)


def test_answers_in_json_stay_text_and_what_stands_with_messages_is_named(
    tmp_path: Path, tokenizer: ChatTokenizer
) -> None:
    for answer in ('{"role": 1}', "[1, 2]", json.dumps({"role": "keeper", "name": "K"})):
        [one] = prepared(tmp_path, [{"question": "Q", "answer": answer}], "conversation", tokenizer).items
        assert scored(tokenizer, one.trunk) == f"{answer}<|im_end|>"
    [one] = prepared(tmp_path, [{"prompt": GOOD["prompt"], "completion": '{"a": 1}'}], "conversation", tokenizer).items
    assert scored(tokenizer, one.trunk) == '{"a": 1}<|im_end|>'
    held = json.dumps({"messages": [ASK, SAY], "id": 7, "metadata": {"system": "S"}})
    made = prepared(tmp_path, [{"conversation": held}], "conversation", tokenizer)
    assert "`metadata` beside the messages in the JSON text of `conversation`" in made.report.sources[0].notes[0]


TOOLS = [{"name": "f", "parameters": {}}]


@pytest.mark.parametrize("names", [("query", "answers"), ("question", "answer"), ("query", "response")])
def test_a_call_as_text_beside_its_tool_is_refused(
    tmp_path: Path, tokenizer: ChatTokenizer, names: tuple[str, str]
) -> None:
    plain, call = (
        {names[0]: "Q", "tools": TOOLS, names[1]: text} for text in ("A", '[{"name": "f", "arguments": {}}]')
    )
    with pytest.raises(DataError, match=r"data.jsonl:1002: the answer is a call of a tool as JSON text"):
        prepared(tmp_path, [plain] * 1001 + [call], "conversation", tokenizer)
    other = plain | {names[1]: '[{"name": "Kim", "age": 3}]'}
    assert len(prepared(tmp_path, [plain, plain, other], "conversation", tokenizer).items) == 3


def test_a_row_that_is_laid_out_in_another_way_is_said_to_be(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    rows = [{"question_id": 1, "turns": ["Q"]}] * 2
    for other in ([], 3):
        with pytest.raises(DataError, match=r"data.jsonl:3: the row is not laid out as most rows of its source"):
            prepared(tmp_path, [*rows, {"question_id": 1, "turns": other}], "prompt", tokenizer)
