from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from align.errors import CheckpointError
from align.stages.checkpoint import discard_after, find_latest, list_checkpoints, prune, verify, write_checkpoint

CONTENT = b"weights" * 1000


async def save(folder: Path) -> None:
    (folder / "adapter").mkdir()
    (folder / "adapter" / "a.bin").write_bytes(CONTENT)
    (folder / "optimizer.bin").write_bytes(CONTENT[::-1])


def written(folder: Path, *steps: int) -> list[Path]:
    return [asyncio.run(write_checkpoint(folder, step, {"step": step}, save)) for step in steps]


def test_a_checkpoint_comes_back_as_it_was_written(tmp_path: Path) -> None:
    [path] = written(tmp_path, 100)
    assert path.name == "step-000100"
    checkpoint = verify(path)
    assert (checkpoint.step, checkpoint.state) == (100, {"step": 100})
    assert (checkpoint.trainer / "adapter" / "a.bin").read_bytes() == CONTENT


def test_the_latest_is_the_highest_step_and_not_the_newest_file(tmp_path: Path) -> None:
    written(tmp_path, 1000000, 20)
    latest, refused = find_latest(tmp_path)
    assert latest is not None and latest.step == 1000000 and refused == []


@pytest.mark.parametrize(
    ("damage", "cause"),
    [
        (lambda p: (p / "manifest.json").unlink(), "never completed"),
        (lambda p: os.truncate(p / "trainer" / "optimizer.bin", 10), "10 bytes"),
        (lambda p: (p / "trainer" / "optimizer.bin").write_bytes(CONTENT), "damaged"),
        (lambda p: (p / "trainer" / "adapter" / "a.bin").unlink(), "a.bin"),
        (lambda p: (p / "trainer" / "strange.bin").write_bytes(b"x"), "strange.bin"),
        (lambda p: (p / "manifest.json").write_text("{"), "cannot be read"),
        (lambda p: (p / "manifest.json").write_text("[]"), "cannot be read"),
        (lambda p: os.truncate(p / "state.json", 3), "state.json has 3 bytes"),
    ],
    ids=["no manifest", "truncated", "flipped bytes", "missing file", "foreign file", "torn manifest", "list", "state"],
)
def test_a_damaged_checkpoint_is_never_the_latest(tmp_path: Path, damage, cause: str) -> None:
    old, new = written(tmp_path, 10, 20)
    damage(new)
    latest, refused = find_latest(tmp_path)
    assert latest is not None and latest.path == old
    assert len(refused) == 1 and cause in str(refused[0]) and "step-000020" in str(refused[0])


def test_a_renamed_checkpoint_is_refused(tmp_path: Path) -> None:
    [path] = written(tmp_path, 10)
    path.rename(tmp_path / "step-000099")
    with pytest.raises(CheckpointError, match="speaks of step 10"):
        verify(tmp_path / "step-000099")


def test_a_failing_save_leaves_the_older_checkpoint_of_that_step(tmp_path: Path) -> None:
    async def fail(folder: Path) -> None:
        (folder / "half.bin").write_bytes(CONTENT)
        raise OSError("no space left on device")

    [path] = written(tmp_path, 10)
    with pytest.raises(OSError, match="no space"):
        asyncio.run(write_checkpoint(tmp_path, 10, {}, fail))
    assert verify(path).state == {"step": 10}
    assert [p.name for p in tmp_path.iterdir()] == ["step-000010"]


def test_a_save_that_writes_nothing_is_an_error(tmp_path: Path) -> None:
    async def nothing(folder: Path) -> None: ...

    with pytest.raises(CheckpointError, match="no file"):
        asyncio.run(write_checkpoint(tmp_path, 10, {}, nothing))
    assert list_checkpoints(tmp_path) == []


def test_a_kill_while_writing_leaves_no_checkpoint_and_the_next_start_cleans_up(tmp_path: Path) -> None:
    written(tmp_path, 5)
    script = f"""
import asyncio, os, signal
from pathlib import Path
from align.stages.checkpoint import write_checkpoint

async def save(folder):
    (folder / "a.bin").write_bytes(b"x" * 1000)
    os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(write_checkpoint(Path({str(tmp_path)!r}), 6, {{}}, save))
"""
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == -signal.SIGKILL
    assert any(p.name.startswith(".writing-") for p in tmp_path.iterdir())
    latest, refused = find_latest(tmp_path)
    assert latest is not None and latest.step == 5 and refused == []
    discard_after(tmp_path, 5)
    assert [p.name for p in tmp_path.iterdir()] == ["step-000005"]


def test_pruning_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    written(tmp_path, 10, 20, 30, 40)
    prune(tmp_path, keep=2, best=10)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-000010", "step-000030", "step-000040"]
    prune(tmp_path, keep=1, best=None)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-000040"]


def test_going_on_from_an_older_step_removes_the_newer_ones(tmp_path: Path) -> None:
    written(tmp_path, 10, 20)
    discard_after(tmp_path, 10)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-000010"]


def test_the_manifest_lists_every_file_with_size_and_hash(tmp_path: Path) -> None:
    [path] = written(tmp_path, 10)
    files = json.loads((path / "manifest.json").read_text())["files"]
    assert set(files) == {"state.json", "trainer/optimizer.bin", "trainer/adapter/a.bin"}
    assert files["trainer/optimizer.bin"]["bytes"] == len(CONTENT)
    assert len(files["trainer/optimizer.bin"]["sha256"]) == 64
