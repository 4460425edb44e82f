"""Every column of a data row reaches a reward as the file has it, whatever the file's kind and the function's."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from align.actors.scoring import samples_of
from align.data.prepare import prepare
from align.data.tokenizer import ChatTokenizer, load_tokenizer
from align.protocols.fleet import Completion, Group, PromptItem
from rewards.plugin import PluginSpec
from rewards.pool import RewardPool
from tests.unit.data.build import source

SEEN = """
from rewards import Score

def ours(samples):
    return [Score(1.0, info={"row": dict(s.row)}) for s in samples]

def theirs(prompts, completions, log_extra, **columns):
    for name in ("trainer_state", "log_metric", "completion_ids"):
        columns.pop(name)
    log_extra("row", [{name: values[i] for name, values in columns.items()} for i in range(len(completions))])
    return [1.0] * len(completions)
"""

ROWS: list[dict[str, Any]] = [
    {
        "prompt": "one", "weight": 2, "int": 1, "float": 1.0, "whole": 3.0, "text": "1", "empty": "", "null": None,
        "true": True, "zero": 0, "minus": -0.5, "list": [1, 1.0, None, "a"], "object": {"a": None, "b": {"c": [0]}},
        "level": "data: " + "what a table says, " * 20, "big": 2**60, "small": 1e-300, "answer": "42",
    },
    {"prompt": "two", "weight": 0.5, "int": 2, "float": 2.5, "whole": 4.0, "text": "zwei", "null": "x", "answer": 42},
]  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer_folder: Path) -> ChatTokenizer:
    return load_tokenizer(tiny_tokenizer_folder)


def rows_seen(file: Path, tokenizer: ChatTokenizer, name: str, signature: str) -> list[dict[str, Any]]:
    (file.parent / "seen.py").write_text(SEEN)
    prompts = prepare((source(file),), "prompt", tokenizer, seed=0).items
    import numpy as np

    done = Completion(np.arange(2), np.zeros(2, np.float32), np.zeros(2, np.int32), "said", "eos")
    groups = [Group(item, (done,)) for item in prompts if isinstance(item, PromptItem)]
    with RewardPool([PluginSpec(f"seen.py:{name}", signature=signature)], file.parent, 0) as pool:  # type: ignore[arg-type]
        result = pool.score_sync(samples_of(groups))
    assert not result.failures, result.failures
    return [info[name]["row"] for info in result.infos]


def same(one: Any, other: Any) -> bool:
    """Equal, and of the same types all the way down: 1 is not 1.0."""
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return all(map(same, one, other)) and len(one) == len(other) if isinstance(one, list) else bool(one == other)


def test_columns_of_json_lines_are_what_the_lines_say(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    for seen, row in zip(rows_seen(file, tokenizer, "ours", "align"), ROWS, strict=True):
        assert same(seen, row), (seen, row)
    names = {name for row in ROWS for name in row} - {"prompt"}
    for seen, row in zip(rows_seen(file, tokenizer, "theirs", "trl"), ROWS, strict=True):
        assert same(seen, {name: row.get(name) for name in names} | {}), (seen, row)


def test_columns_of_parquet_keep_nulls_and_what_json_does_not_have(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    file = tmp_path / "rows.parquet"
    when = datetime.datetime(2024, 5, 6, 7, 8, 9, 10)
    columns = {
        "prompt": ["one", "two"],
        "int": pyarrow.array([1, None], pyarrow.int64()),
        "float": pyarrow.array([1.0, None], pyarrow.float64()),
        "short": pyarrow.array([7, 8], pyarrow.int8()),
        "when": pyarrow.array([when, None], pyarrow.timestamp("us")),
        "exact": pyarrow.array([when, None], pyarrow.timestamp("ns")),
        "long": pyarrow.array([datetime.timedelta(seconds=1.5), None], pyarrow.duration("us")),
        "list": pyarrow.array([[1, None], None], pyarrow.list_(pyarrow.int32())),
        "object": pyarrow.array([{"a": None, "b": 2.0}, None]),
    }
    pyarrow.parquet.write_table(pyarrow.table(columns), file)
    first, second = rows_seen(file, tokenizer, "ours", "align")
    expected = {
        "prompt": "one",
        "int": 1,
        "float": 1.0,
        "short": 7,
        "when": when,
        "exact": when,
        "long": datetime.timedelta(seconds=1.5),
        "list": [1, None],
        "object": {"a": None, "b": 2.0},
    }
    assert same(first, expected), first
    assert second == dict.fromkeys(expected) | {"prompt": "two", "short": 8}
