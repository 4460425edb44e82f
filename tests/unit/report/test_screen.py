"""Texts of others are shown on a terminal and not obeyed, whichever way they come there."""

from __future__ import annotations

import io
import logging
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from align.cli.main import main
from align.report.screen import LINE, Screen, cut, screened, shown

ATTACKS = {
    "colour": ("\x1b[31mred\x1b[0m", "\\x1b[31mred\\x1b[0m"),
    "title": ("\x1b]0;owned\x07", "\\x1b]0;owned\\x07"),
    "link": ("\x1b]8;;http://x\x1b\\text\x1b]8;;\x1b\\", "\\x1b]8;;http://x\\x1b\\text\\x1b]8;;\\x1b\\"),
    "clipboard": ("\x1b]52;c;cm0gLXJm\x07", "\\x1b]52;c;cm0gLXJm\\x07"),
    "carriage return": ("real\rfake", "real\\x0dfake"),
    "backspace": ("real\b\b\b\bfake", "real\\x08\\x08\\x08\\x08fake"),
    "bell and null": ("\a\0", "\\x07\\x00"),
    "C1": ("\x9b31m\x9d0;t\x9c", "\\x9b31m\\x9d0;t\\x9c"),
    "delete": ("\x7f", "\\x7f"),
    "bidi": ("a\u202etxt.exe\u2066b\u2069", "a\\u202etxt.exe\\u2066b\\u2069"),
    "line separator": ("a\u2028b", "a\\u2028b"),
    "hidden": ("a\u200b\ufeffb\U000e0041", "a\\u200b\\ufeffb\\U000e0041"),
    "half a character": ("a\ud800", "a\\ud800"),
}


@pytest.mark.parametrize("way", ATTACKS)
def test_what_a_terminal_would_obey_is_shown(way: str) -> None:
    text, expected = ATTACKS[way]
    assert shown(text) == expected and shown(expected) == expected


def test_other_text_stays_as_it_is() -> None:
    text = "tab\tline\nGrüße 漢字 עברית \U0001f469\u200d\U0001f52c e\u0301 \\x1b"
    assert shown(text) == text


def test_long_lines_and_lines_without_end_are_cut_and_counted() -> None:
    assert cut("short\nlines") == "short\nlines"
    assert cut("x" * 5000) == "x" * (LINE - 3) + "... (5,000 characters)"
    assert cut("a\n" * 5000).endswith("... (5,001 lines)") and len(cut("a\n" * 5000)) < 1000


def test_a_terminal_without_a_character_shows_its_number() -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    Screen(stream).write("Grüße\x1b\n")  # type: ignore[arg-type]
    stream.flush()
    assert stream.buffer.getvalue() == b"Gr\\xfc\\xdfe\\x1b\n"  # type: ignore[attr-defined]


def test_prints_logs_and_tracebacks_go_through_the_screen(capsys: pytest.CaptureFixture[str]) -> None:
    with screened(), screened():
        print("\x1b[2J", "\x9b2J", file=sys.stderr)
        print("\x1b[2J")
        logging.lastResort.emit(logging.LogRecord("a", logging.WARNING, "f", 1, "\x1b[2J %s", ("\r",), None))  # type: ignore[union-attr]
        sys.excepthook(ValueError, ValueError("\x1b[2J"), None)
    said = capsys.readouterr()
    assert not {"\x1b", "\x9b", "\r"} & set(said.out + said.err)
    assert (said.out + said.err).count("\\x1b[2J") == 4


PLUGIN = """
from rewards import Score, reward

@reward(retries=0)
def {name}(samples):
    if samples[0].completion.startswith("bad"):
        raise ValueError("\\x1b]0;owned\\x07" + "y" * 9000 + "\\rok")
    return [Score(1.0, info={{"why": "\\x1b[2Jfine"}}) for _ in samples]
"""


def test_a_reward_that_is_tried_cannot_write_to_the_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.py").write_text(PLUGIN.format(name="f"))
    (tmp_path / "rows\x1b[1m.jsonl").write_text('{"prompt": "p\\u001b[1m", "said": "bad\\u001b[1m\\u202e"}\n')
    monkeypatch.chdir(tmp_path)
    main(["rewards", "try", "mine.py:f", "--data", "rows\x1b[1m.jsonl", "--completion", "said"])
    main(["rewards", "try", "mine.py:f", "--data", "rows\x1b[1m.jsonl", "--completion", "\x1b[1m"])
    main(["rewards", "try", "mine.py:\x1b[1m", "--data", "rows\x1b[1m.jsonl", "--completion", "said"])
    said = capsys.readouterr()
    assert not {"\x1b", "\x07", "\r", "\u202e"} & set(said.out + said.err)
    assert (
        "\\x1b]0;owned\\x07" in said.out and "bad\\u001b[1m" in said.out and max(map(len, said.out.split("\n"))) < 4500
    )


DISPLAY = """
import sys
from pathlib import Path
from align.recipe.schema import Recipe, Report
from align.report.progress import Reporter
from align.report.screen import screened

with screened():
    report = Reporter(Path({folder!r}), Recipe.model_construct(name="n", report=Report()))
    report.stage_started("s", 3, "online")
    report.step("s", 1, {{"objective/\\x1b]0;owned\\x07[/x][red]/mean": 1.0}})
    report.message("note \\x1b]0;owned\\x07 [red]")
    print("print \\x1b]0;owned\\x07")
    print("error \\x1b]0;owned\\x07", file=sys.stderr)
    report.close()
"""


def test_a_run_shows_its_names_and_notes_on_a_terminal_without_obeying_them(tmp_path: Path) -> None:
    """With the live display, which draws by control characters of its own, and to which rich redirects prints."""
    ours, theirs = pty.openpty()
    code = DISPLAY.format(folder=str(tmp_path))
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "200"}
    process = subprocess.Popen([sys.executable, "-c", code], stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    said = b""
    while True:
        try:
            part = os.read(ours, 1 << 16)
        except OSError:  # its end
            break
        if not part:
            break
        said += part
    os.close(ours)
    assert process.wait() == 0, said.decode()
    assert b"\x1b]0;" not in said and b"\x07" not in said
    for what in (b"note", b"print", b"error"):
        assert what + b" \\x1b]0;owned\\x07" in said, said
    assert b"[red]" in said and b"\x1b[" in said, "the display itself draws"
