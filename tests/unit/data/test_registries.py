"""A folder's dataset_info.json, LLaMA-Factory's or ms-swift's: its data sets are read by naming the folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from align.data.prepare import prepare
from align.data.records import Kind
from align.data.tokenizer import ChatTokenizer
from align.errors import DataError
from tests.unit.data.build import source, text, write_jsonl

TURNS = "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n"
ALPACA = {"file_name": "a.json", "columns": {"prompt": "frage", "response": "antwort"}}
PAIRS = {
    "file_name": "p.json", "ranking": True,
    "columns": {"prompt": "instruction", "chosen": "good", "rejected": "bad"},
}  # fmt: skip
OPENAI = {
    "file_name": "m.json", "formatting": "sharegpt", "columns": {"messages": "dialog"},
    "tags": {"role_tag": "who", "content_tag": "says", "user_tag": "u", "assistant_tag": "a"},
}  # fmt: skip
TEXT = {"file_name": "t.json", "columns": {"prompt": "body"}}


@pytest.fixture
def factory(tmp_path: Path) -> Path:
    """As LLaMA-Factory's data folder is."""
    files: dict[str, list[dict[str, Any]]] = {
        "a.json": [{"frage": "Q", "antwort": "A", "id": 1}],
        "p.json": [{"instruction": "Q", "good": "A", "bad": "B"}],
        "m.json": [{"dialog": [{"who": "u", "says": "Q"}, {"who": "a", "says": "A"}]}],
        "t.json": [{"body": "Once upon a time."}],
    }
    for name, rows in files.items():
        (tmp_path / name).write_text(json.dumps(rows))
    info = {"alpaca": ALPACA, "pairs": PAIRS, "openai": OPENAI, "text": TEXT, "far": {"hf_hub_url": "a/b"}}
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    return tmp_path


def read(folder: Path, tokenizer: ChatTokenizer, kind: Kind = "conversation", **options: Any) -> Any:
    return prepare((source(folder, **options),), kind, tokenizer, seed=0)


@pytest.mark.parametrize("split", ["alpaca", "openai"])
def test_an_entry_says_how_its_columns_and_roles_are_called(
    split: str, factory: Path, tokenizer: ChatTokenizer
) -> None:
    found = read(factory, tokenizer, split=split)
    assert [text(tokenizer, item.trunk) for item in found.items] == [TURNS]
    assert set(found.report.sources[0].unread) == ({"column 'id'"} if split == "alpaca" else set())


def test_pairs_and_plain_text_are_read_as_the_entry_says(factory: Path, tokenizer: ChatTokenizer) -> None:
    [pair] = read(factory, tokenizer, "pair", split="pairs").items
    assert [text(tokenizer, side) for side in pair.branches] == ["A<|im_end|>\n", "B<|im_end|>\n"]
    [plain] = read(factory, tokenizer, split="text").items
    assert text(tokenizer, plain.trunk).startswith("Once upon a time.")


def test_the_recipe_has_the_last_word_on_columns(factory: Path, tokenizer: ChatTokenizer) -> None:
    (factory / "a.json").write_text(json.dumps([{"frage": "Q", "antwort": "X", "besser": "A"}]))
    [item] = read(factory, tokenizer, split="alpaca", columns={"output": "besser"}).items
    assert text(tokenizer, item.trunk) == TURNS


def test_one_data_set_needs_no_name_and_several_do(factory: Path, tokenizer: ChatTokenizer) -> None:
    with pytest.raises(DataError, match="names 4 data sets: alpaca, openai, pairs, text") as caught:
        read(factory, tokenizer)
    assert "split: alpaca" in str(caught.value.remedy)
    with pytest.raises(DataError, match=r"no data set 'alpca' \(known: alpaca"):
        read(factory, tokenizer, split="alpca")
    (factory / "dataset_info.json").write_text(json.dumps({"only": ALPACA}))
    assert read(factory, tokenizer).report.kept == 1


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({**ALPACA, "file_name": "gone.json"}, "there is no such file"),
        ({**ALPACA, "columns": {"promt": "frage"}}, "names promt"),
        ({**OPENAI, "tags": {"user": "u"}}, "`tags` of this entry names user"),
        ({**ALPACA, "num_samples": 5}, "`num_samples` of this entry is not read"),
        ({**ALPACA, "subset": "x"}, "`subset` of this entry is not read"),
        ({**ALPACA, "columns": {"prompt": "gone", "response": "antwort"}}, "no column 'gone'"),
    ],
)
def test_what_an_entry_says_and_nobody_can_follow_is_refused(
    entry: dict[str, Any], words: str, factory: Path, tokenizer: ChatTokenizer
) -> None:
    (factory / "dataset_info.json").write_text(json.dumps({"only": entry}))
    with pytest.raises(DataError) as caught:
        read(factory, tokenizer)
    assert words in str(caught.value)


def test_ms_swifts_list_names_files_and_maps_the_other_way_round(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    write_jsonl(tmp_path / "rows.jsonl", [{"frage": "Q", "antwort": "A"}])
    entry = {"dataset_path": "rows.jsonl", "columns": {"frage": "query", "antwort": "response"}}
    (tmp_path / "dataset_info.json").write_text(json.dumps([entry]))
    assert [text(tokenizer, item.trunk) for item in read(tmp_path, tokenizer).items] == [TURNS]


def test_the_file_that_datasets_writes_beside_its_arrow_files_is_none_of_these(
    tmp_path: Path, tokenizer: ChatTokenizer
) -> None:
    write_jsonl(tmp_path / "rows.jsonl", [{"query": "Q", "response": "A"}])
    (tmp_path / "dataset_info.json").write_text(json.dumps({"features": {}, "splits": {"train": {"num_bytes": 1}}}))
    assert read(tmp_path, tokenizer).report.kept == 1
