"""Rows from a user's function, in a process of their own."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from align.data import generators
from align.data.sources import open_source
from align.errors import PluginError
from tests.unit.data.build import source

CODE = """
import json as _json
import helper

def rows(count=3, word="x"):
    print("a print of the user's must not matter")
    for i in range(count):
        yield {"prompt": f"{word}{i}", "answer": helper.double(i)}

def wrong():
    yield ["not", "a", "row"]

def broken():
    raise RuntimeError("the disk is on fire")
    yield {}

def leaves():
    import os, sys
    for i in range(5000):
        if i == 4000:
            os._exit(0)
        yield {"prompt": "p" * 20, "answer": i}

def none():
    yield from ()

def endless():
    while True:
        pass
    yield {}
"""


@pytest.fixture
def plugin(tmp_path: Path) -> Path:
    (tmp_path / "helper.py").write_text("def double(i):\n    return 2 * i\n")
    (tmp_path / "made.py").write_text(CODE)
    return tmp_path / "made.py"


def test_rows_are_made_once_and_kept_by_content(plugin: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    given = source(f"{plugin}:rows", options={"count": 2, "word": "w"})
    rows = list(open_source(given, cache=cache).rows())
    assert [r.values for r in rows] == [{"prompt": "w0", "answer": 0}, {"prompt": "w1", "answer": 2}]
    [kept] = cache.iterdir()
    before = kept.stat().st_mtime_ns
    assert list(open_source(given, cache=cache).rows()) == rows and kept.stat().st_mtime_ns == before
    assert rows[1].origin == f"{plugin}:rows row 1"
    assert list(open_source(given).rows()) == rows
    (plugin.parent / "helper.py").write_text("def double(i):\n    return 3 * i\n")
    changed = list(open_source(given, cache=cache).rows())
    assert [r.values["answer"] for r in changed] == [0, 3]
    assert len(list(cache.iterdir())) == 2


@pytest.mark.parametrize("changed", ["raw.csv", "more/given.txt", "tables/deep/read.py", "lab/lab.py"])
def test_rows_are_made_again_where_what_the_generator_names_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: str
) -> None:
    """A file that its source or its options name, a package beside it, a library that is being worked on."""
    texts = {"raw.csv": "a", "more/given.txt": "b", "tables/deep/read.py": "C = 'c'\n", "lab/lab.py": "D = 'd'\n"}
    texts |= {"tables/__init__.py": "", "tables/deep/__init__.py": "", "unread.csv": ""}
    texts["made.py"] = (
        "from pathlib import Path\nimport lab\nfrom tables.deep import read\nHERE = Path(__file__).parent\n"
        "def rows(given):\n"
        "    yield {'prompt': (HERE / 'raw.csv').read_text() + (HERE / given).read_text() + read.C + lab.D}\n"
    )
    for name, text in texts.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "lab"), prepend=":")
    monkeypatch.syspath_prepend(str(tmp_path / "lab"))

    def rows() -> list[str]:
        given = source(f"{tmp_path}/made.py:rows", options={"given": "more/given.txt"})
        return [row.values["prompt"] for row in open_source(given, cache=tmp_path / "cache").rows()]

    assert rows() == ["abcd"]
    (tmp_path / "unread.csv").write_text("another\n")
    assert rows() == ["abcd"] and len(list((tmp_path / "cache").iterdir())) == 1
    letter = "abcd"[["raw.csv", "more/given.txt", "tables/deep/read.py", "lab/lab.py"].index(changed)]
    (tmp_path / changed).write_text(texts[changed].replace(letter, "changed"))
    assert rows() == ["abcd".replace(letter, "changed")]


def test_a_limit_stops_the_generator(plugin: Path) -> None:
    rows = list(open_source(source(f"{plugin}:rows", options={"count": 10**12}), limit=2).rows())
    assert len(rows) == 2


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("wrong", "a generator yields dicts"),
        ("broken", "the disk is on fire"),
        ("missing", "has no function 'missing'"),
    ],
)
def test_a_generator_that_fails_is_named_with_its_error(plugin: Path, name: str, says: str) -> None:
    with pytest.raises(PluginError, match=says) as error:
        open_source(source(f"{plugin}:{name}"))
    assert error.value.where == str(plugin)


def test_a_generator_that_hangs_is_ended(plugin: Path, tmp_path: Path) -> None:
    begun = time.monotonic()
    with pytest.raises(PluginError, match="did not finish in 1 s"):
        generators.run(source(f"{plugin}:endless"), cache=tmp_path / "cache", timeout_s=1.0)
    assert time.monotonic() - begun < 20
    assert not (tmp_path / "cache").exists()


def test_rows_of_a_generator_that_leaves_before_its_end_are_not_taken_for_all(plugin: Path, tmp_path: Path) -> None:
    with pytest.raises(PluginError, match="ended its process before its rows were complete"):
        list(open_source(source(f"{plugin}:leaves"), cache=tmp_path / "cache").rows())
    assert not (tmp_path / "cache").exists()
    assert list(open_source(source(f"{plugin}:none")).rows()) == []


def test_a_generator_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(PluginError, match="no such generator file"):
        open_source(source(f"{tmp_path}/none.py:rows"))


def test_kept_rows_that_were_changed_are_made_again_and_said(
    plugin: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache, given = tmp_path / "cache", source(f"{plugin}:rows")
    rows = list(open_source(given, cache=cache).rows())
    [kept] = cache.iterdir()
    kept.write_bytes(kept.read_bytes().replace(b'"answer": 2', b'"answer": 3'))
    assert list(open_source(given, cache=cache).rows()) == rows
    assert "are not what was written" in caplog.text and str(kept) in caplog.text
    [again] = cache.iterdir()
    assert b'"answer": 3' not in again.read_bytes()


def test_rows_that_cannot_be_kept_are_used_all_the_same(
    plugin: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "cache").write_text("a file has the folder's place")
    assert len(list(open_source(source(f"{plugin}:rows"), cache=tmp_path / "cache").rows())) == 3
    assert "are not kept" in caplog.text
