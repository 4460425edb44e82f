"""What a verb puts aside goes with it, however it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from align.check.scratch import scratch
from align.cli.main import main

PLUGIN = """
import os, tempfile, time
from pathlib import Path
from rewards import reward

tempfile.mkdtemp(prefix="left-at-import-")

@reward(timeout_s=60)
def untidy(samples):
    tempfile.mkdtemp(prefix="left-by-a-call-")
    if samples[0].completion == "wait":
        Path("waiting").touch()
        time.sleep(60)
    if samples[0].completion == "fail":
        raise RuntimeError("no")
    return [1.0 for _ in samples]

@reward
def broken(samples, *, needed: int):
    return [1.0 for _ in samples]
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "tmp").mkdir()
    (tmp_path / "mine.py").write_text(PLUGIN)
    for said in ("fine", "fail", "wait"):
        (tmp_path / f"{said}.jsonl").write_text(f'{{"prompt": "p", "said": "{said}"}}\n')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return tmp_path


def left(here: Path) -> list[str]:
    return sorted(path.name for path in (here / "tmp").iterdir())


def words(name: str, said: str) -> list[str]:
    return ["rewards", "try", f"mine.py:{name}", "--data", f"{said}.jsonl", "--completion", "said"]


def test_nothing_stays_where_a_trial_ends_well_or_not(here: Path) -> None:
    assert main(words("untidy", "fine")) == 0
    assert main(words("untidy", "fail")) == 0, "one of one may fail"
    assert main(words("broken", "fine")) == 2
    assert main([*words("untidy", "fine")[:-1], "other"]) == 2
    assert left(here) == [] and os.environ["TMPDIR"] == str(here / "tmp")


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_nothing_stays_where_a_trial_is_ended(here: Path, how: signal.Signals) -> None:
    process = waiting(here)
    process.send_signal(how)
    assert process.wait(120) == 130
    assert left(here) == []


def test_what_a_killed_trial_leaves_goes_with_the_next(here: Path) -> None:
    process = waiting(here)
    process.kill()
    process.wait()
    assert len(left(here)) == 1
    deadline = time.monotonic() + 20
    while left(here) and time.monotonic() < deadline:
        with scratch():
            pass
    assert left(here) == []


def waiting(here: Path) -> subprocess.Popen[bytes]:
    """A trial whose plugin waits."""
    process = subprocess.Popen(
        [sys.executable, "-m", "align.cli.main", *words("untidy", "wait")],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 60
    while not (here / "waiting").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    return process


def test_the_folder_is_the_temporary_one_of_the_block_and_of_its_children(here: Path) -> None:
    with scratch() as work:
        assert Path(tempfile.gettempdir()) == work and os.environ["TMPDIR"] == str(work)
        with scratch() as inner:
            assert inner.is_relative_to(work)
        assert Path(tempfile.gettempdir()) == work
    assert not work.exists() and Path(tempfile.gettempdir()) == here / "tmp"
