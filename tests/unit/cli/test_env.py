"""`align env try`: an environment played before a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from align.cli.main import main
from tests.runs import write_jsonl
from tests.tiny_vlms import write_tiny_vlm
from tests.unit.episodes.album import ALBUM
from tests.unit.episodes.album import call as album_call
from tests.unit.episodes.stage import CALCULATOR, call, write


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write(tmp_path, CALCULATOR)
    write_jsonl(tmp_path / "rows.jsonl", [{"prompt": [{"role": "user", "content": "1 + 2?"}], "answer": "3"}])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def tried(capsys: pytest.CaptureFixture[str], status: int, *words: str) -> str:
    code = main(["env", "try", "world.py:Calculator", "--data", "rows.jsonl", *words])
    captured = capsys.readouterr()
    assert code == status, captured.out + captured.err
    return captured.out + captured.err


def test_written_replies_are_played_and_every_token_is_shown(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "replies.jsonl").write_text(json.dumps([call(a=1, b=2), "3"]) + "\n")
    said = tried(capsys, 0, "--replies", "replies.jsonl")
    assert "tool add: Add two numbers." in said and '"required": ["a", "b"]' in said
    assert "sampled" in said and "added" in said and "| <|im_start|>tool\n                | 3<|im_end|>" in said
    assert (
        'scores: {"calculator": 1.0}' in said and "1 episode, 0 lost, 0 problems" in said and "over before" not in said
    )
    (here / "replies.jsonl").write_text(json.dumps([call(a=1, b=2), "3", "4", "5"]) + "\n")
    assert "over before its written replies were: 2 had no turn" in tried(capsys, 0, "--replies", "replies.jsonl")


def test_what_a_template_writes_again_is_shown_apart(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "replies.jsonl").write_text(json.dumps(["<think>hm</think>" + call(a=1, b=2), "3"]) + "\n")
    words = ["--replies", "replies.jsonl"]
    assert "again" not in tried(capsys, 0, *words)
    said = tried(capsys, 0, *words, "--set", "history=template")
    again = said.partition("again")[2]
    assert "forks 1" in said and "hm</think>" in said and "hm" not in again and '"add"' in again
    assert 'scores: {"calculator": 1.0}' in said


def test_a_close_that_fails_is_a_problem(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "replies.jsonl").write_text(json.dumps(["3"]) + "\n")
    write(here, CALCULATOR + "    def close(self):\n        raise OSError('no such session')\n")
    assert "rows.jsonl:1: close: OSError: no such session" in tried(capsys, 1, "--replies", "replies.jsonl")


def test_budgets_hold_for_written_replies_too_and_classes_for_trl_are_played(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "replies.jsonl").write_text(json.dumps([call(a=1, b=2), "3"]) + "\n")
    write(here, CALCULATOR.replace("seed, 0\n", 'seed, 0\n        self.said = ""\n', 1))
    words = ["--replies", "replies.jsonl"]
    assert "ended by turn: turns 1" in tried(capsys, 0, *words, "--max-tokens", "5")
    assert "ended by tokens: turns 1" in tried(capsys, 0, *words, "--set", "max_tokens=5")
    theirs = (
        CALCULATOR.replace("@environment", "").replace("def reward(", "def get_reward(").replace("row, seed", "answer")
    )
    write(here, theirs.replace('row["answer"]', "answer").replace("seed, 0", "1, 0").split("    def respond")[0] + (
        "    def get_reward(self):\n        return float(self.calls)\n"
    ))  # fmt: skip
    assert "signature: trl" in tried(capsys, 2, *words)
    assert 'scores: {"calculator": 1.0}' in tried(capsys, 0, *words, "--signature", "trl")


def test_resets_that_differ_for_one_seed_and_lost_episodes_are_problems(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "replies.jsonl").write_text('"3"\n')
    write(here, CALCULATOR.replace("seed, 0\n", "seed, 0\n        import os; return f'begin {os.getpid()}'\n", 1))
    assert "two resets with the same row and seed differ" in tried(capsys, 1, "--replies", "replies.jsonl")
    write(
        here,
        CALCULATOR.replace(
            "def reset(self, row, seed):", "def reset(self, row, seed):\n        raise ValueError('no')"
        ),
    )
    said = tried(capsys, 1, "--replies", "replies.jsonl")
    assert "lost: raised: reset: ValueError: no" in said


def test_a_score_that_is_none_and_what_is_drawn_from_the_wrong_seed_are_problems(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "replies.jsonl").write_text('"3"\n')
    words = ["--replies", "replies.jsonl"]
    write(here, CALCULATOR.replace("return float(self.said == self.answer)", 'return {"right": 1}["wrong"]'))
    said = tried(capsys, 1, *words)
    assert "no score: raised: reward: KeyError: 'wrong' (" in said and "world.py:" in said and "1 problem" in said
    drawn = CALCULATOR.replace("row, seed", "row, seed, episode_seed")
    write(here, drawn.replace("seed, 0\n", "seed, 0\n        return str(episode_seed)\n", 1))
    assert "draw what they read from `seed`" in tried(capsys, 1, *words)


def test_an_episode_that_was_lost_shows_how_it_came_to_that(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "replies.jsonl").write_text(json.dumps([call(a=1, b=2), call(a=3, b=4), "3"]) + "\n")
    write(here, CALCULATOR.replace("return str(a + b)", "return str(a + b) if a == 1 else __import__('os')._exit(7)"))
    said = tried(capsys, 1, "--replies", "replies.jsonl")
    assert (
        "1 + 2?" in said
        and '"a": 3' in said
        and "lost: died: add" in said
        and "status 7" in said
        and "so far: turns 2" in said
    )
    assert "1 episode, 1 lost" in said
    (here / "replies.jsonl").write_text(json.dumps([call(a=1, b=2)]) + "\n")
    said = tried(capsys, 0, "--replies", "replies.jsonl")
    assert "not at its end: the written replies end here" in said and "1 episode, 0 lost" in said


def test_settings_that_are_none_are_refused_in_the_words_of_a_recipe(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "replies.jsonl").write_text('"3"\n')
    for setting, words in {
        "max_turnz=3": "did you mean `max_turns`?",
        "max_turns=0": "must be greater than 0, got 0",
        "as=..": "letters, digits",
    }.items():
        said = tried(capsys, 2, "--replies", "replies.jsonl", "--set", setting)
        assert words in said and "pydantic" not in said, said
    for option, value in (("--max-tokens", "0"), ("--limit", "-1"), ("--temperature", "-1"), ("--temperature", "nan")):
        said = tried(capsys, 2, "--replies", "replies.jsonl", option, value)
        assert f"argument {option}: '{value}' is no" in said


def test_images_are_shown_as_a_word_and_how_many_tokens_they_have(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tiny_vlm(here / "model", "qwen2_5_vl")
    write(here, ALBUM)
    replies = [album_call(1, "parts"), album_call(2, "damaged"), "nothing", "nothing"]
    (here / "replies.jsonl").write_text(json.dumps(replies) + "\n")
    words = ["--model", "model", "--set", "tools_in=prompt", "max_turns=3", "--args", "opens=true"]
    code = main(["env", "try", "world.py:Album", "--data", "rows.jsonl", "--replies", "replies.jsonl", *words])
    said = capsys.readouterr().out
    assert code == 0, said
    assert said.count("[image: ") == 3 and "Page one: <|vision_start|>[image: " in said
    assert "Before: <|vision_start|>[image: " in said and "<|image_pad|>" not in said and "base64" not in said
    assert "images 3, refused_images 1" in said


def test_somebody_must_play(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--replies FILE, or --model FOLDER" in tried(capsys, 2)
    (here / "empty").touch()
    assert "there are no replies" in tried(capsys, 2, "--replies", "empty")
