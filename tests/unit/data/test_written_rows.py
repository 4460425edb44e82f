"""Records written in our own layout are read as the same records."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from align.cli.main import main
from align.data.formats import LAYOUTS
from align.data.formats.choosing import choose
from align.data.own_layout import row_of
from align.data.records import Kind
from align.data.sources import renamed
from align.errors import DataError
from tests.unit.data.build import write_jsonl
from tests.unit.data.test_formats import record

ASK, SAY, BAD = (
    {"role": role, "content": text} for role, text in (("user", "Q"), ("assistant", "A"), ("assistant", "B"))
)
CALL = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {"x": None}}}]}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}
ROWS: list[tuple[Kind, dict[str, Any]]] = [
    ("conversation", {"messages": [ASK, SAY]}),
    ("conversation", {"messages": [ASK, {**SAY, "weight": 0}, ASK, SAY], "system": "S", "weight": 0.5}),
    ("conversation", {"messages": [ASK, CALL, {"role": "tool", "content": "5"}, SAY], "tools": [TOOL]}),
    ("conversation", {"messages": [ASK, {**SAY, "reasoning": "hm"}], "enable_thinking": True}),
    ("conversation", {"prompt": "Q", "completion": "A"}),
    ("conversation", {"prompt": [ASK], "completion": [SAY]}),
    ("conversation", {"text": "Once."}),
    ("conversation", {"question": "Q", "answer": "A"}),
    ("pair", {"prompt": "Q", "chosen": "A", "rejected": "B"}),
    ("pair", {"prompt": [ASK], "chosen": [SAY], "rejected": [BAD]}),
    ("pair", {"chosen": "x and A", "rejected": "x and B"}),
    ("pair", {"instruction": "Q", "output_1": "A", "output_2": "B", "preference": 2}),
    ("unpaired", {"prompt": "Q", "completion": "A", "label": True}),
    ("unpaired", {"messages": [ASK, SAY], "label": False}),
    ("prompt", {"prompt": "Q"}),
    ("prompt", {"messages": [ASK, SAY]}),
]


@pytest.mark.parametrize(("kind", "row"), ROWS)
def test_what_is_written_is_read_as_the_same_record(kind: Kind, row: dict[str, Any]) -> None:
    layout, guess = choose(LAYOUTS, kind, [row], where="rows.jsonl")
    [values] = renamed([row], guess.columns if guess else {}, "rows.jsonl")
    made = layout.convert(values)
    again = record(kind, json.loads(json.dumps(row_of(made))))
    if kind == "prompt":  # the answer that was taken off is a column then
        assert (again.prompt, again.tools) == (made.prompt, made.tools)  # type: ignore[union-attr]
        assert row_of(made).get("reference_answer") == made.reference_answer  # type: ignore[union-attr]
    else:
        assert _turns(again) == _turns(made)


def _turns(made: Any) -> Any:
    """A conversation is its turns, wherever the prompt ends; others are compared as they are."""
    if hasattr(made, "completion") and not hasattr(made, "desirable") and not isinstance(made.completion, str):
        return (*made.prompt, *made.completion), made.tools, made.weight, made.arguments
    return made


# ------------------------------------------------------------------------------------------------- the command


@pytest.fixture
def model(folder: Path, tmp_path: Path) -> Path:
    """All of a model that is read."""
    found = shutil.copytree(folder, tmp_path / "model")
    (found / "config.json").write_text(json.dumps({"model_type": "qwen3"}))
    return found


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    asked = [f"Tell me the number {n} of the long list of numbers that I wrote down for you today." for n in range(8)]
    data = [{"problem": text, "answer": "It is here."} for text in asked]
    return write_jsonl(tmp_path / "rows.jsonl", [*data, data[0], {"problem": "no answer", "answer": ""}])


def test_a_file_is_told_of_and_written(
    model: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    exam = write_jsonl(
        tmp_path / "exam.jsonl",
        [{"prompt": "tell me the number 3 of the long list of numbers that I wrote down for you today"}],
    )
    out = tmp_path / "own.jsonl"
    given = ["data", str(model), str(rows), "--exam", str(exam), "--write", str(out), "--max-length", "10"]
    assert main(given) == 0
    printed = capsys.readouterr().out
    assert "sft: swift query; guessed: query = problem, response = answer" in printed
    assert "10 rows, 9 kept, 1 refused" in printed and f"{rows}:10: " in printed
    assert f"1 row says what an earlier one says: {rows}:1 = {rows}:9" in printed
    assert "longer than 10 tokens: 9 of 9 rows (100.0%)" in printed
    assert f"1 prompt of the exam is in the data: {exam}:1 = {rows}:4" in printed
    assert "  | ⟦It is here.<|im_end|>⟧" in printed
    written = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(written) == 9 and list(written[0]) == ["messages"]
    assert main(given) == 2 and "the file exists" in capsys.readouterr().err
    assert main(["data", str(model), str(out)]) == 0
    assert "sft: openai messages\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("row", "more", "words"),
    [
        ({"x": 1}, [], "no stage reads these columns"),
        ({"x": 1}, ["--for", "preference"], "no layout for a preference stage (pairs) fits the columns found: x"),
        ({"question": "Q", "answer": "A", "solution": "B"}, ["--for", "sft"], "several ways"),
        ({"query": "Q", "response": "A"}, ["--columns", "query"], "names no columns"),
    ],
)
def test_what_cannot_be_read_is_refused(
    row: dict[str, Any], more: list[str], words: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [row])
    assert main(["data", str(model), str(path), *more]) == DataError.exit_code
    assert words in capsys.readouterr().err
