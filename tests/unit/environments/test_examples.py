"""The examples of environments, played."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from align.cli.main import main
from tests.runs import write_jsonl

EXAMPLES = Path(__file__).resolve().parents[3] / "examples"


def played(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], use: str, rows: list[dict[str, object]], replies: list[str]
) -> str:
    write_jsonl(tmp_path / "rows.jsonl", rows)
    (tmp_path / "replies.jsonl").write_text(json.dumps(replies) + "\n")
    words = ["--data", str(tmp_path / "rows.jsonl"), "--replies", str(tmp_path / "replies.jsonl")]
    code = main(["env", "try", f"{EXAMPLES / use}", *words])
    said = capsys.readouterr()
    assert code == 0, said.out + said.err
    return said.out


def test_a_game_with_gymnasium_s_interface_is_ten_lines_of_respond(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {"prompt": [{"role": "user", "content": "Cross the lake."}]}
    said = played(tmp_path, capsys, "gym_game.py:Lake", [row], ["jump", *["right", "down"] * 4])
    assert "XFFF" in said or "X" in said.partition("prompt")[2]
    assert "one of left, down, right, up" in said and "ended by done" in said and 'scores: {"lake": ' in said


def test_the_shop_of_the_guide_sells(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = {"prompt": [{"role": "user", "content": "Tea, please."}], "stock": {"tea": 2}, "wanted": "tea"}

    def call(name: str, **arguments: object) -> str:
        return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"

    replies = [
        call("count", article="tea"),
        call("sell", article="tea", pieces=3),
        call("sell", article="tea"),
        "Here.",
    ]
    said = played(tmp_path, capsys, "shop.py:Shop", [row], replies)
    assert "there are only 2" in said and 'scores: {"shop": 1.0}' in said
