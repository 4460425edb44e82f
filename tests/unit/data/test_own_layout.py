"""A layout of a user's that is not what a layout is, and one whose code fails: the plugin's name, or the row's."""

from __future__ import annotations

from pathlib import Path

import pytest

from align.cli.main import main
from align.data.formats import described, layouts_of
from align.data.formats.choosing import choose
from align.data.records import RowError
from align.errors import DataError, PluginError
from tests.unit.check.workshop import open_workshop

TEXT = """
from align.data.formats.base import Layout, text_of
from align.data.records import Conversation, Message, assistant

def read(row):
    return Conversation((), (Message("user", text_of(row, "q")), *assistant(text_of(row, "a"))))

MINE = Layout("mine", ("mine",), "conversation", frozenset({"q", "a"}), read)
"""
ROW = {"q": "What?", "a": "That."}


def own(folder: Path, old: str = "", new: str = "") -> str:
    assert old in TEXT
    (folder / "mine.py").write_text(TEXT.replace(old, new) if old else TEXT)
    return f"{folder}/mine.py:MINE"


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('"conversation"', '"conversations"', "is of kind 'conversations', which no stage reads"),
        ('frozenset({"q", "a"})', '["q", "a"]', "`required` of the layout 'mine' is ['q', 'a']"),
        ('frozenset({"q", "a"})', '"q"', "`required` of the layout 'mine' is 'q'"),
        ("read)\n", "read, optional='z')\n", "`optional` of the layout 'mine' is 'z'"),
        ("read)\n", "None)\n", "`read` of the layout 'mine' is no function"),
        ("read)\n", "read, fits=True)\n", "`fits` of the layout 'mine' is no function"),
        ('Layout("mine"', "Layout(None", "a layout's `name` is a text"),
    ],
)
def test_a_layout_that_is_none_is_refused_before_a_row_is_read(tmp_path: Path, old: str, new: str, words: str) -> None:
    name = own(tmp_path, old, new)
    with pytest.raises(PluginError) as caught:
        described(name)
    assert words in caught.value.what and caught.value.where == name and caught.value.remedy


@pytest.mark.parametrize(
    ("failure", "words"),
    [
        ("raise OSError('no disk')", "`read` of the layout mine failed: OSError: no disk"),
        ("assert False", "failed: AssertionError"),
        ("raise SystemExit(0)", "failed: SystemExit: 0"),
        ("row['zzz']", "failed: KeyError: 'zzz'"),
    ],
)
def test_what_its_code_raises_at_a_row_is_the_row_s(tmp_path: Path, failure: str, words: str) -> None:
    name = own(tmp_path, "    return Conv", f"    {failure}\n    return Conv")
    [layout] = layouts_of(name)[0]
    with pytest.raises(RowError) as caught:
        layout.convert(ROW)
    assert words in str(caught.value) and f"({tmp_path}/mine.py:6)" in str(caught.value)


def test_a_role_that_nobody_knows_is_refused_as_in_layouts_of_ours(tmp_path: Path) -> None:
    [layout] = layouts_of(own(tmp_path, '"user"', '"human"'))[0]
    with pytest.raises(RowError, match="unknown role 'human'"):
        layout.convert(ROW)


def test_whether_it_fits_is_the_plugin_s_to_say(tmp_path: Path) -> None:
    name = own(tmp_path, "read)\n", "read, fits=lambda row: row['zzz'])\n")
    layouts, chosen = layouts_of(name)
    with pytest.raises(PluginError, match="`fits` of the layout mine failed: KeyError: 'zzz'") as caught:
        choose(layouts, "conversation", [ROW], where="rows.jsonl", format=chosen)
    assert caught.value.where == name and caught.value.remedy == f"look at {tmp_path}/mine.py:8"


def test_one_of_another_kind_than_the_stage_is_named(tmp_path: Path) -> None:
    layouts, chosen = layouts_of(own(tmp_path))
    with pytest.raises(DataError) as caught:
        choose(layouts, "pair", [ROW], where="rows.jsonl", format=chosen)
    assert "a layout of a pair; yours: mine (of a conversation)" in str(caught.value)


def test_an_exit_in_a_layout_does_not_end_the_check_as_if_all_were_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    shop = open_workshop(tmp_path)
    (tmp_path / "mine.py").write_text(TEXT.replace("    return Conv", "    raise SystemExit(0)\n    return Conv"))
    shop.write("own.jsonl", [ROW])
    old, new = "    data: sft.jsonl\n    batch", '    data: {path: own.jsonl, format: "mine.py:MINE"}\n    batch'
    shop.change(old, new)
    assert main(["check", "recipe.yaml"]) == 2
    assert "own.jsonl:1: `read` of the layout mine failed: SystemExit: 0" in capsys.readouterr().err
