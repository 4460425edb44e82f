"""A row is a row's problem: whatever it holds, it is refused with its place, the others are kept, and none decides for
another."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from align.data import readers
from align.data.prepare import prepare
from align.data.rows import Row
from align.data.scratch import train_tokenizer
from align.data.sources import open_source
from align.data.tokenizer import ChatTokenizer
from align.errors import DataError
from align.recipe.inputs import TokenizerFromScratch
from align.recipe.labels import Labels
from tests.unit.data.build import UNMARKED_CHATML, prepared, source, text, turns, with_template, write_jsonl

GOOD = {"prompt": "p", "completion": "a bc"}


def refused(path: Path, kind: Any, tokenizer: ChatTokenizer, **options: Any) -> tuple[int, dict[str, str]]:
    """(rows kept, reasons by place without the folder) under `on_bad_row: skip`."""
    report = prepare((source(path, on_bad_row="skip", **options),), kind, tokenizer, seed=0).report.sources[0]
    return report.kept, {r.origin.removeprefix(f"{path.parent}/"): r.reason for r in report.refused}


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"prompt": "p", "completion": "x \\ud83d y"}', "half a character, \\ud83d"),
        (b'{"prompt": "p", "completion": "x", "\\udc00": 1}', "half a character"),
        (b'{"prompt": "p", "completion": ["a", {"b": "\\udbff"}]}', "half a character"),
        (b'{"prompt": "p", "completion": "caf\xe9"}', "not UTF-8 text"),
        (b'{"prompt": "p", "completion": "\xed\xa0\xbd"}', "not UTF-8 text"),
        (b'{"prompt": "p", "completion": ' + b"[" * 5000 + b"]" * 5000 + b"}", "nested more than 100 levels"),
        (b'{"prompt": "p", "completion": ' + b'{"a":' * 150 + b"1" + b"}" * 151, "nested more than 100 levels"),
        (b'{"prompt": "p", "completion": ' + b"9" * 5000 + b"}", "a number of 5000 digits"),
        (b'{"prompt": "p", "completion": "a", "completion": "b"}', "the key 'completion' stands twice"),
        (b'{"prompt": "p", "completion": "a"} {"prompt": "p"}', "more than one value at column 36"),
        (b'{"prompt": "p", "completion": "a", "weight": 1' + b"0" * 400 + b"}", "`weight` must be a number"),
        (b'{"prompt": "p", "completion": "a", "weight": NaN}', "`weight` must be a number"),
        (b"\x00{}", "not valid JSON"),
        (b"{'prompt': 'p'}", "not valid JSON"),
        (b"null", "a row must be a JSON object, got null"),
        (b'{"prompt": "p", "completion": "a"', "not valid JSON: it ends before it is complete"),
        (b'{"prompt": [], "completion": []}', "the completion has no message"),
    ],
)
def test_a_line_that_no_tokenizer_could_take_is_that_lines_refusal(
    tmp_path: Path, tokenizer: ChatTokenizer, line: bytes, reason: str
) -> None:
    path = tmp_path / "a.jsonl"
    good = json.dumps(GOOD).encode()
    path.write_bytes(b"\n".join([good, line, good]))
    kept, why = refused(path, "conversation", tokenizer)
    assert kept == 2 and list(why) == ["a.jsonl:2"] and reason in why["a.jsonl:2"]
    with pytest.raises(DataError) as error:
        prepare((source(path),), "conversation", tokenizer, seed=0)
    assert error.value.where == f"{path}:2"
    json.dumps(error.value.what).encode(), error.value.what.encode()  # can be shown


def test_an_emoji_written_as_two_escapes_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"q": "\\ud83d\\ude00 \\u00e9"}\n')
    assert [r.values for r in open_source(source(path)).rows()] == [{"q": "😀 é"}]  # type: ignore[union-attr]


@pytest.mark.parametrize("bad", ["caf\\ud83d", [[["x"] * 3] * 2] * 2])
def test_rows_of_json_arrays_are_refused_one_by_one_too(tmp_path: Path, tokenizer: ChatTokenizer, bad: Any) -> None:
    path = tmp_path / "a.json"
    deep = "[" * 3000 + "]" * 3000
    value = json.dumps(bad) if isinstance(bad, str) else deep
    path.write_text(f'[\n{json.dumps(GOOD)},\n{{"prompt": "p", "completion": {value}}},\n{json.dumps(GOOD)}\n]')
    path.write_bytes(path.read_bytes().replace(b"caf\\\\ud83d", b"caf\xe9"))
    kept, why = refused(path, "conversation", tokenizer)
    assert kept == 2 and list(why) == ["a.json:3"]


def test_a_broken_line_of_json_lines_called_json_is_that_lines_refusal(
    tmp_path: Path, tokenizer: ChatTokenizer
) -> None:
    path = tmp_path / "a.json"
    path.write_text(f"{json.dumps(GOOD)}\n{{broken\n{json.dumps(GOOD)}\n")
    kept, why = refused(path, "conversation", tokenizer)
    assert kept == 2 and list(why) == ["a.json:2"]
    path.write_text(json.dumps([GOOD]) + json.dumps([GOOD]))
    with pytest.raises(DataError, match="more text behind the end of the JSON array"):
        prepare((source(path),), "conversation", tokenizer, seed=0)


def test_what_makes_a_whole_file_unreadable_is_said_with_its_line_and_a_way_out(tmp_path: Path) -> None:
    whole = b"".join(json.dumps({"n": n, "x": "y" * 50}).encode() + b"\n" for n in range(3000))
    cut = gzip.compress(whole)[:-3000]
    (tmp_path / "cut.jsonl.gz").write_bytes(cut)
    (tmp_path / "flipped.jsonl.gz").write_bytes(gzip.compress(whole)[:400] + b"\xff" * 40 + gzip.compress(whole)[440:])
    for name, encoding in (("wide.jsonl", "utf-16"), ("wide.csv", "utf-16"), ("wide.json", "utf-32")):
        (tmp_path / name).write_bytes('[{"a": 1}]\n'.encode(encoding))
    table = pa.table({"prompt": ["x" * 100] * 500})
    pq.write_table(table, tmp_path / "cut.parquet")
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "cut.parquet").read_bytes()[:-40])
    (tmp_path / "twice.csv").write_text("a,b,a\n1,2,3\n")
    for name, says in {
        "cut.jsonl.gz": "damaged", "flipped.jsonl.gz": "damaged", "wide.jsonl": "UTF-16", "wide.csv": "UTF-16",
        "wide.json": "UTF-32", "cut.parquet": "not a readable .parquet", "twice.csv": "two columns are called 'a'",
    }.items():  # fmt: skip
        with pytest.raises(DataError, match=says) as error:
            list(open_source(source(tmp_path / name)).rows())
        assert str(tmp_path / name) in str(error.value.where) and error.value.remedy
    with pytest.raises(DataError) as error:
        list(open_source(source(tmp_path / "cut.jsonl.gz")).rows())
    assert int(str(error.value.where).rpartition(":")[2]) > 1, "the lines before the damage were read"


def test_a_line_without_end_is_refused_without_being_held(
    tmp_path: Path, tokenizer: ChatTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "LONGEST_LINE", 1 << 20)
    path = tmp_path / "a.jsonl"
    long = json.dumps({"prompt": "p", "completion": "x" * (3 << 20)})
    path.write_text(f"{long}\n{json.dumps(GOOD)}\n{long}")
    kept, why = refused(path, "conversation", tokenizer)
    assert kept == 1 and list(why) == ["a.jsonl:1", "a.jsonl:3"] and "longer than 1 MiB" in why["a.jsonl:1"]


def test_values_of_parquet_that_python_cannot_hold_are_their_rows_refusal(
    tmp_path: Path, tokenizer: ChatTokenizer
) -> None:
    binary = pa.array([b"good", b"caf\xe9", b"good"], pa.binary())
    when = pa.array([0, 1 << 62, 0], pa.timestamp("us"))
    for n, column in enumerate((binary.cast(pa.string(), safe=False), pa.array(["x", "y", "x"]))):
        path = tmp_path / f"{n}.parquet"
        text = column if n == 0 else pa.array(["a", "b", "c"])
        pq.write_table(pa.table({"prompt": ["p"] * 3, "completion": text, "when": when if n else pa.nulls(3)}), path)
        kept, why = refused(path, "conversation", tokenizer)
        assert kept == 2 and list(why) == [f"{n}.parquet row 1"]


def test_a_generators_row_that_is_no_json_is_refused_alone(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    (tmp_path / "gen.py").write_text(
        "def rows():\n"
        "    deep = []\n"
        "    for _ in range(5000): deep = [deep]\n"
        "    for value in ('a', float('nan'), {1, 2}, 'x\\ud83d', deep, 'b'):\n"
        "        yield {'prompt': 'p', 'completion': 'c', 'extra': value}\n"
    )
    kept, why = refused(Path(f"{tmp_path / 'gen.py'}:rows"), "conversation", tokenizer)
    assert kept == 2 and list(why) == [f"gen.py:rows row {n}" for n in (1, 2, 3, 4)]
    assert "no JSON" in why["gen.py:rows row 1"] and "half a character" in why["gen.py:rows row 3"]


# ------------------------------------------------------------------------------------------------- layouts


@pytest.mark.parametrize("at", [0, 2, 4])
@pytest.mark.parametrize(
    ("odd", "reason"),
    [
        ({"messages": []}, "has no message"),
        ({"messages": None}, "no `messages`"),
        ({"messages": "hello"}, "must be a list of messages"),
        ({"messages": [{"from": "human", "value": "x"}, {"from": "gpt", "value": "y"}]}, "another layout"),
        ({"prompt": "p", "completion": "c"}, "no `messages`"),
        ({"messages": turns("x", "y"), "prompt": "p", "completion": "c"}, "another layout"),
        ({}, "no `messages`"),
    ],
)
def test_no_row_decides_how_the_others_are_read(
    tmp_path: Path, tokenizer: ChatTokenizer, odd: dict[str, Any], reason: str, at: int
) -> None:
    rows: list[dict[str, Any]] = [{"messages": turns("x", "y")} for _ in range(4)]
    rows.insert(at, odd)
    kept, why = refused(write_jsonl(tmp_path / "a.jsonl", rows), "conversation", tokenizer)
    assert kept == 4 and list(why) == [f"a.jsonl:{at + 1}"] and reason in why[f"a.jsonl:{at + 1}"]


def test_a_pair_with_its_own_prompt_is_not_read_without_it(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    bare = {"chosen": "Q: a? A: b", "rejected": "Q: a? A: c"}
    path = write_jsonl(tmp_path / "a.jsonl", [bare, bare, {**bare, "prompt": "Q: d?"}])
    kept, why = refused(path, "pair", tokenizer)
    assert kept == 2 and "columns of another layout" in why["a.jsonl:3"]


# ------------------------------------------------------------------------------------------------- text stays text

CELLS = ["true", "False", "null", "NaN", "007", "1e5", "2024-01-01", "1,5", "-0", "[]", '{"a": 1}', " x "]


def test_cells_of_a_csv_are_text_whatever_they_look_like(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    path = tmp_path / "a.csv"
    path.write_text("prompt,completion\n" + "".join(f'p,"{cell.replace(chr(34), chr(34) * 2)}"\n' for cell in CELLS))
    made = prepare((source(path),), "conversation", tokenizer, seed=0)
    assert [text(tokenizer, t.trunk) for t in made.items] == [f"p{cell}<|im_end|>" for cell in CELLS]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_one_value_of_another_type_changes_no_other_row(tmp_path: Path, tokenizer: ChatTokenizer, suffix: str) -> None:
    rows = [{"prompt": "p", "completion": cell, "answer": cell} for cell in CELLS]
    path = tmp_path / f"a.{suffix}"
    if suffix == "jsonl":
        write_jsonl(path, [*rows, {"prompt": "p", "completion": 7, "answer": 7}])
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    kept, why = refused(path, "conversation", tokenizer)
    assert kept == len(CELLS) and list(why.values()) == (["`completion` must be text, got 7"] if why else [])
    found = [r for r in open_source(source(path)).rows() if isinstance(r, Row)]
    assert [r.values["answer"] for r in found[: len(CELLS)]] == CELLS


def test_labels_called_true_and_false_are_names_in_their_own_order(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    """Read as a truth value, `true` would be index 1: the label `false` of this order."""
    path = tmp_path / "a.csv"
    path.write_text("text,label\nx,true\ny,false\nz,TRUE\n")
    labels = Labels(("true", "false"), "single_label")
    made = prepare((source(path, on_bad_row="skip"),), "labelled", tokenizer, seed=0, labels=labels)
    assert [list(item.trunk.columns.values()) for item in made.items] == [[0.0], [1.0]]
    assert [r.reason[:20] for r in made.report.refused] == ["unknown label 'TRUE'"]
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "x", "label": True}, {"text": "y", "label": False}])
    made = prepare((source(path),), "labelled", tokenizer, seed=0, labels=labels)
    assert [list(item.trunk.columns.values()) for item in made.items] == [[0.0], [1.0]]


def test_a_csv_still_says_which_completion_is_good_and_what_it_weighs(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    path = tmp_path / "a.csv"
    path.write_text("prompt,completion,label,weight\np,a,True,0.5\np,b,false,2\np,c,1,1\np,d,true,much\n")
    made = prepare((source(path, on_bad_row="skip"),), "unpaired", tokenizer, seed=0)
    (first,), (second,) = (item.branches for item in made.items)
    assert (first.columns["desirable"], first.columns["weight"]) == (1.0, 0.5)
    assert (second.columns["desirable"], second.columns["weight"]) == (0.0, 2.0)
    assert [r.origin for r in made.report.refused] == [f"{path}:4", f"{path}:5"]


def test_a_long_cell_and_a_quote_that_is_never_closed(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    path = tmp_path / "a.csv"
    path.write_text(f'prompt,completion\np,"{"x " * 100_000}"\np,"ab"c\np,fine\np,"never closed\np,lost\n')
    kept, why = refused(path, "conversation", tokenizer, max_length=300_000)
    assert kept == 2 and list(why) == ["a.csv:3", "a.csv:5"]
    assert "to line 6" in why["a.csv:5"] and "a quote that opens a cell must close it" in why["a.csv:5"]


def test_other_values_than_json_are_passed_on_as_they_are(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    rows = [{"prompt": "p", "answer": value} for value in ("007", 7, None, True, [1, "1"], {"a": None})]
    made = prepared(tmp_path, rows, "prompt", tokenizer)
    assert [item.row["answer"] for item in made.items] == [row["answer"] for row in rows]


def test_a_tokenizer_is_not_trained_past_a_row_that_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "abc"}\n{broken\n')
    with pytest.raises(DataError, match="not valid JSON") as error:
        train_tokenizer(TokenizerFromScratch(train_on=str(path)), tmp_path / "tokenizer")
    assert error.value.where == f"{path}:2"


def test_plain_rows_among_conversations_are_counted_and_hide_no_note_on_the_template(
    tmp_path: Path, folder: Path
) -> None:
    clock = with_template(folder, "{% set today = strftime_now('%Y') %}" + UNMARKED_CHATML)
    pairs = [{"prompt": "p", "chosen": "a", "rejected": "b"}]
    talk = {"prompt": turns("p"), "chosen": turns("", "a")[1:], "rejected": turns("", "b")[1:]}
    plain = prepared(tmp_path, pairs, "pair", clock).report.sources[0].notes
    both = prepared(tmp_path, [*pairs, talk, talk], "pair", clock).report.sources[0].notes
    assert [note for note in plain if "template" in note] == [
        "plain text: no chat template is applied (use message, query or instruction columns for it)"
    ]
    assert any("no chat template is applied to 1 rows, and one to the others" in note for note in both)
    assert any("prints today's date" in note for note in both)
