"""Rows of every kind of file, with the line each begins at."""

from __future__ import annotations

import csv
import gzip
import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as pq
import pytest

from align.data.audit import Refusal
from align.data.formats import layouts_of
from align.data.rows import Row
from align.data.sources import apply_columns, is_hub_id, open_source
from align.errors import DataError, ModelError, PluginError
from align.hub import resolve_model_folder
from tests.unit.data.build import source, write_jsonl

ROWS = [{"q": "one", "a": "1"}, {"q": "two\u2028zwei", "a": "2"}]


def rows_of(path: Path, **options: object) -> list[Row | Refusal]:
    return list(open_source(source(path, **options)).rows())


def test_jsonl_rows_know_their_line_also_behind_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(["\ufeff" + json.dumps(ROWS[0]), "", json.dumps(ROWS[1], ensure_ascii=False)]), "utf-8")
    first, second = rows_of(path)
    assert (first, second) == (Row(ROWS[0], f"{path}:1", 0), Row(ROWS[1], f"{path}:3", 1))


def test_a_line_that_is_no_json_is_refused_with_its_place_and_reading_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"q": "one"}\n{"q": \n[1]\n{"q": "\xff"}\n{"q": "five"}\n')
    one, broken, array, latin, five = rows_of(path)
    assert isinstance(one, Row) and isinstance(five, Row) and five.origin == f"{path}:5"
    assert [r.origin for r in (broken, array, latin)] == [f"{path}:{n}" for n in (2, 3, 4)]
    assert isinstance(broken, Refusal) and "not valid JSON" in broken.reason
    assert isinstance(array, Refusal) and "got a list" in array.reason
    assert isinstance(latin, Refusal) and "UTF-8" in latin.reason


@pytest.mark.parametrize("indent", [None, 2])
def test_json_arrays_give_the_line_where_each_object_begins(tmp_path: Path, indent: int | None) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps(ROWS, indent=indent), "utf-8")
    found = rows_of(path)
    assert [r.values for r in found] == ROWS
    assert [r.origin for r in found] == ([f"{path}:2", f"{path}:6"] if indent else [f"{path}:1"] * 2)


def test_json_lines_under_the_name_json_are_read(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.json", ROWS)
    assert [(r.values, r.origin) for r in rows_of(path)] == [(ROWS[0], f"{path}:1"), (ROWS[1], f"{path}:2")]


@pytest.mark.parametrize(
    ("content", "line", "says"),
    [
        ('[\n {"a": 1},\n {"a" 2}\n]', 3, "not valid JSON"),
        ('[\n {"a": 1}', 2, "not closed"),
        ("hello", 1, "neither a JSON array nor JSON objects"),
        ("", 1, "neither"),
    ],
)
def test_broken_json_is_an_error_at_its_line(tmp_path: Path, content: str, line: int, says: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(content)
    with pytest.raises(DataError, match=says) as error:
        rows_of(path)
    assert error.value.where == f"{path}:{line}" and error.value.remedy


def test_csv_rows_know_the_line_they_begin_at_and_cells_stay_text(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    with path.open("w", newline="") as f:
        csv.writer(f).writerows([["prompt", "label"], ["two\nlines", "True"], ["x", ""], ["too", "many", "cells"]])
    first, second, third = rows_of(path)
    assert first == Row({"prompt": "two\nlines", "label": "True"}, f"{path}:2", 0)
    assert second == Row({"prompt": "x", "label": None}, f"{path}:4", 1)
    assert third == Refusal(f"{path}:5", 2, "3 cells, but the header has 2")


def test_parquet_arrow_stream_and_feather_rows_are_numbered(tmp_path: Path) -> None:
    table = pa.Table.from_pylist(ROWS)
    pq.write_table(table, tmp_path / "a.parquet")
    feather.write_feather(table, str(tmp_path / "b.arrow"))
    with pa.OSFile(str(tmp_path / "c.arrow"), "wb") as f, pa.ipc.new_stream(f, table.schema) as writer:
        writer.write_table(table)
    for name in ("a.parquet", "b.arrow", "c.arrow"):
        path = tmp_path / name
        assert [(r.values, r.origin) for r in rows_of(path)] == [(ROWS[i], f"{path} row {i}") for i in (0, 1)]


def test_a_damaged_binary_file_is_an_error_naming_it(tmp_path: Path) -> None:
    for name in ("a.parquet", "a.arrow", "a.jsonl.gz"):
        (tmp_path / name).write_bytes(b"PAR1 is not enough")
        with pytest.raises(DataError) as error:
            rows_of(tmp_path / name)
        assert error.value.where == str(tmp_path / name)


def test_gzip_is_read_through(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"q": "one"}\n'))
    assert [r.values for r in rows_of(path)] == [{"q": "one"}]


def test_a_folder_is_read_in_order_of_name_and_split_chooses(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train-00001.jsonl", [{"n": 2}])
    write_jsonl(tmp_path / "train-00000.jsonl", [{"n": 1}])
    assert [r.values["n"] for r in rows_of(tmp_path)] == [1, 2]
    assert [r.number for r in open_source(source(tmp_path)).rows(limit=2)] == [0, 1]
    write_jsonl(tmp_path / "test-00000.jsonl", [{"n": 3}])
    assert [r.values["n"] for r in rows_of(tmp_path, split="test")] == [3]
    with pytest.raises(DataError, match="holds the splits test, train"):
        rows_of(tmp_path)
    with pytest.raises(DataError, match="no data files of split 'dev'"):
        rows_of(tmp_path, split="dev")


def test_a_folder_saved_by_datasets_is_read(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict({"train": rows, "test": rows.select([1])}).save_to_disk(str(tmp_path / "saved"))
    assert [r.values for r in rows_of(tmp_path / "saved", split="train")] == ROWS
    assert [r.values for r in rows_of(tmp_path / "saved", split="test")] == ROWS[1:]
    with pytest.raises(DataError, match="splits test, train"):
        rows_of(tmp_path / "saved")


def test_what_is_not_there_or_not_understood_is_named_with_a_remedy(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", ROWS)
    cases = {
        tmp_path / "trian.jsonl": "did you mean",
        tmp_path / "nowhere" / "a.jsonl": "does not exist either",
        tmp_path / "zzzzzzzzz.csv": "check `data.path`",
    }
    for path, remedy in cases.items():
        with pytest.raises(DataError, match="no such file") as error:
            open_source(source(path))
        assert remedy in str(error.value)
    (tmp_path / "notes.md").write_text("hello")
    with pytest.raises(DataError, match=r"unknown kind of data file '\.md'"):
        open_source(source(tmp_path / "notes.md"))
    with pytest.raises(DataError, match="on a single file"):
        open_source(source(tmp_path / "train.jsonl", split="train"))
    with pytest.raises(DataError, match="on files"):
        open_source(source(tmp_path / "train.jsonl", options={"n": 1}))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no data files"):
        open_source(source(tmp_path / "empty"))


def test_hub_data_sets_are_read_by_name_and_split(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(path: str, split: str | None = None, **options: object) -> object:
        asked.append((path, split, options))
        rows = datasets.Dataset.from_list(ROWS)
        return rows if split else datasets.DatasetDict({"train": rows, "test": rows})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    opened = open_source(source("org/name", split="train", options={"name": "main"}))
    assert [(r.values, r.origin) for r in opened.rows()] == [(ROWS[i], f"org/name row {i}") for i in (0, 1)]
    assert asked == [("org/name", "train", {"name": "main"})] and len(opened.digest()) == 64
    with pytest.raises(DataError, match="splits train, test"):
        open_source(source("org/name"))


def test_a_hub_data_set_that_cannot_be_loaded_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")

    def load_dataset(*args: object, **options: object) -> object:
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError, match="ConnectionError: no network") as error:
        open_source(source("org/name"))
    assert error.value.where == "org/name"


def test_only_names_without_a_data_suffix_can_be_hub_ids() -> None:
    assert is_hub_id("openai/gsm8k") and is_hub_id("imdb")
    assert not is_hub_id("data/train.jsonl") and not is_hub_id("/abs/path") and not is_hub_id("a/b/c")


def test_columns_rename_and_leave_the_rest(tmp_path: Path) -> None:
    rows = [Row({"question": "q", "answer": "a", "prompt": "another", "level": 3}, "x:1", 0)]
    named = apply_columns(rows, source("x", columns={"prompt": "question", "completion": "answer"}))
    assert named == [{"prompt": "q", "completion": "a", "level": 3}]
    with pytest.raises(DataError, match="no column 'frage'"):
        apply_columns(rows, source("x", columns={"prompt": "frage"}))


def test_what_is_there_and_is_no_file_is_called_what_it_is(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "loop.jsonl").symlink_to("loop.jsonl")
    for name, what in (("pipe", "no file and no folder"), ("loop", "a link to nothing, or to itself")):
        with pytest.raises(DataError, match=f"this is {what}"):
            open_source(source(tmp_path / f"{name}.jsonl"))


def test_the_home_of_nobody_is_a_place_where_nothing_is(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no such file"):
        open_source(source("~no-such-user/rows.jsonl"), folder=tmp_path)
    with pytest.raises(PluginError):
        layouts_of("~no-such-user/mine.py:LAYOUT")
    with pytest.raises(ModelError, match="no such folder"):
        resolve_model_folder("~no-such-user/model")


@pytest.mark.parametrize("name, mark", [("rows.csv", ";"), ("rows.csv", "\t"), ("rows.csv", "|"), ("rows.tsv", ",")])
def test_columns_that_another_mark_divides_are_refused_by_it(tmp_path: Path, name: str, mark: str) -> None:
    """Read as one column they fit no layout, and the message would be about layouts."""
    (tmp_path / name).write_text(f"prompt{mark}completion\na{mark}b\n")
    with pytest.raises(DataError, match="its columns are divided by") as error:
        list(open_source(source(f"{tmp_path}/{name}")).rows())
    assert repr(mark) in error.value.what and error.value.where == f"{tmp_path}/{name}:1"
    (tmp_path / name).write_text("the text, as it is\na\n" if name == "rows.tsv" else "text; or none\na\n")
    assert len(list(open_source(source(f"{tmp_path}/{name}")).rows())) == 1


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet", "rows.csv"])
def test_a_pointer_of_git_lfs_is_no_data(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 12\n")
    with pytest.raises(DataError, match="a pointer of Git LFS") as error:
        list(open_source(source(f"{tmp_path}/{name}")).rows())
    assert "git lfs pull" in str(error.value.remedy)


def test_a_list_in_a_file_of_lines_is_told_where_lists_go(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('[{"prompt": "a", "completion": "b"}]\n' * 2)
    refusal, _ = open_source(source(f"{tmp_path}/rows.jsonl")).rows()
    assert isinstance(refusal, Refusal)
    assert "got a list of objects: a file that is one list is named .json" in refusal.reason
