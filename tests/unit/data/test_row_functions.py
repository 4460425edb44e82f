"""`format: mine.py:rows`: a private structure is one function of a row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from align.data.prepare import Prepared, prepare
from align.data.tokenizer import ChatTokenizer
from align.errors import DataError, PluginError
from tests.unit.data.build import scored, source, write_jsonl

MINE = """
def rows(row):
    call = row["call"]
    if call["stars"] == 0:
        raise ValueError("nobody voted")
    if call["stars"] == 9:
        return None if len(call) == 2 else {"question": {1, 2}}
    return {"question": call["transcript"][0], "completion": call["transcript"][1], "label": call["stars"] >= 3}

number = 3
"""


def log(stars: int, **more: Any) -> dict[str, Any]:
    return {"call": {"transcript": [f"why {stars}?", f"because {stars}"], "stars": stars, **more}}


def read(folder: Path, rows: list[dict[str, Any]], kind: Any, tokenizer: ChatTokenizer, **options: Any) -> Prepared:
    (folder / "mine.py").write_text(MINE)
    path = write_jsonl(folder / "data.jsonl", rows)
    one = source(path, format=f"{folder}/mine.py:{options.pop('name', 'rows')}", **options)
    return prepare((one,), kind, tokenizer, seed=0, cache=folder / "cache")


def test_what_it_returns_is_read_as_any_row(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    made = read(tmp_path, [log(4), log(1)], "unpaired", tokenizer)
    assert [tree.branches[0].columns["desirable"] for tree in made.items] == [1.0, 0.0]
    assert [scored(tokenizer, tree.branches[0]) for tree in made.items] == [
        "because 4<|im_end|>",
        "because 1<|im_end|>",
    ]
    assert [tree.origin for tree in made.items] == [f"{tmp_path}/data.jsonl:{n}" for n in (1, 2)]
    [prompt] = read(tmp_path, [log(4)], "prompt", tokenizer).items
    assert prompt.row["completion"] == "because 4" and prompt.row["label"] is True


def test_it_counts_for_the_cache(tmp_path: Path, tokenizer: ChatTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    read(tmp_path, [log(4)], "conversation", tokenizer, on_bad_row="skip")
    monkeypatch.setattr(f"{__name__}.MINE", MINE.replace("[1]", "[1].upper()"))
    read(tmp_path, [log(4)], "conversation", tokenizer, on_bad_row="skip")
    assert len(list((tmp_path / "cache").glob("*.npz"))) == 2


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (log(0), "`rows` failed on the row: ValueError: nobody voted"),
        ({"other": 1}, "`rows` failed on the row: KeyError: 'call'"),
        (log(9), "`rows` must return a dict with the row, got None"),
        (log(9, x=1), "`rows` returned a row that cannot be read: it holds"),
    ],
)
def test_a_row_that_it_fails_on_is_that_rows_error(
    tmp_path: Path, tokenizer: ChatTokenizer, row: dict[str, Any], words: str
) -> None:
    with pytest.raises(DataError) as error:
        read(tmp_path, [log(4), row], "unpaired", tokenizer)
    assert words in str(error.value) and f"{tmp_path}/data.jsonl:2" in str(error.value)
    assert read(tmp_path, [log(4), row], "unpaired", tokenizer, on_bad_row="skip").report.kept == 1


def test_what_is_no_function_is_refused(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    with pytest.raises(PluginError, match="a Layout, a list of them, or a function of a row; this is int"):
        read(tmp_path, [log(4)], "unpaired", tokenizer, name="number")
