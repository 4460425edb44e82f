"""What a test run leaves behind is seen, and what others do is not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import leftovers

SLEEP = [sys.executable, "-c", "import time; print('up', flush=True); time.sleep(60)"]


@pytest.fixture
def note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A note of what is there now, in a temporary folder of this test's own; this run is called "mine"."""
    monkeypatch.setattr(leftovers, "GRACE_S", 1.0)
    monkeypatch.setattr(leftovers, "files", lambda: {str(path) for path in (tmp_path / "scratch").iterdir()})
    monkeypatch.setattr(leftovers, "TITLES", ())
    monkeypatch.setenv(leftovers.MARK, "mine")
    (tmp_path / "scratch").mkdir()
    path = tmp_path / "note.json"
    assert leftovers.main("start", path) == 0
    return path


def sleeper(mark: str) -> subprocess.Popen[str]:
    environment = {**os.environ, leftovers.MARK: mark}
    process = subprocess.Popen(SLEEP, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    assert process.stdout.readline() == "up\n"
    return process


def test_nothing_left_is_success(note: Path) -> None:
    with sleeper("another run's") as stranger:
        assert leftovers.main("check", note) == 0
        stranger.kill()


def test_a_process_of_this_run_is_named(note: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with sleeper("mine") as left:
        assert leftovers.main("check", note) == 1
        left.kill()
    assert f"left behind: process {left.pid}: {sys.executable}" in capsys.readouterr().err


def test_a_file_of_this_run_is_named(note: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (note.parent / "scratch" / "align-ray-1").mkdir()
    assert leftovers.main("check", note) == 1
    assert "align-ray-1" in capsys.readouterr().err
