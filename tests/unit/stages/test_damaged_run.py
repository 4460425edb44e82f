"""A run folder as disks, editors and kills leave it: every start on it works, or says what is wrong with which file."""

from __future__ import annotations

import copy
import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from align.cli.main import main
from align.errors import AlignError, Interrupted, RunFolderError
from align.oserrors import described, is_known, naming
from align.recipe.schema import Recipe
from align.report.logs import MetricsFile
from align.stages.files import make_folder, remove_folder, remove_leftovers, write_json, written_aside
from align.stages.runfolder import RunFolder
from align.stages.state import read_state
from tests.unit.stages import test_pipeline
from tests.unit.stages.test_pipeline import PlainBackend, start
from tests.unit.stages.test_runfolder import finished, opened, prints
from tests.unit.stages.test_runfolder import recipe as small

recipe = test_pipeline.recipe


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def replaced_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def circular(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "cut off": cut_off,
    "empty": lambda p: p.write_bytes(b""),
    "other encoding": lambda p: p.write_bytes(b"\xff\xfe{\x00}\x00"),
    "list": lambda p: p.write_text("[]"),
    "null": lambda p: p.write_text("null"),
    "number": lambda p: p.write_text("1e999"),
    "deep": lambda p: p.write_text("[" * 100_000),
    "other keys": lambda p: p.write_text('{"stages": {"sft": 3}, "files": {"a": 1}, "artefacts": 7, "step": "x"}'),
    "folder": replaced_by_folder,
    "circle": circular,
    "gone": lambda p: p.unlink(),
}


@pytest.mark.parametrize("name", ["run.json", "summary.json"])
def test_a_damaged_file_of_a_run_is_an_error_that_names_it(tmp_path: Path, name: str) -> None:
    for damage, act in DAMAGES.items():
        folder = tmp_path / damage.replace(" ", "-")
        folder.mkdir()
        r = small(folder)
        finished(r, "sft", "dpo").ended()
        act(r.run_folder / name)
        try:
            run = opened(r, resume=True)
            marks = prints(r)
            run.compare(r, lambda stage, marks=marks: marks[stage.id])
            run.restart_from(r, "dpo")
            run.ended()
        except (AlignError, OSError) as error:
            told = error if isinstance(error, AlignError) else described(error)
            assert name in str(told), (damage, str(told))
            assert told.remedy
            continue
        assert name == "summary.json" and damage in ("gone", "circle"), damage


@pytest.mark.parametrize(
    "file", ["grpo/checkpoints/step-000002/manifest.json", "sft/artefacts.json", "dpo/adapter/w.json"]
)
def test_a_resume_on_a_damaged_folder_goes_on_or_names_the_file(recipe: Recipe, tmp_path: Path, file: str) -> None:
    with pytest.raises(Interrupted):
        start(recipe, PlainBackend(), stop_in=("grpo", 1))
    whole = shutil.copytree(recipe.run_folder, tmp_path / "whole")
    for damage in ("other encoding", "other keys", "circle"):
        shutil.rmtree(recipe.run_folder)
        shutil.copytree(whole, recipe.run_folder)
        DAMAGES[damage](recipe.run_folder / file)
        try:
            _, lines = start(recipe, PlainBackend(), resume=True)
        except AlignError as error:
            assert Path(file).parts[0] in str(error) and error.remedy, (damage, str(error))
        else:
            assert any("checkpoint ignored" in line and "step-000002" in line for line in lines.messages), damage


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a JSON value."""
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield (*path, key)
        yield from places(inner, (*path, key))


def test_whatever_stands_anywhere_in_a_run_json_is_read_or_refused_by_name(tmp_path: Path) -> None:
    r = small(tmp_path)
    run = finished(r, "sft", "dpo")
    run.state |= {"threads": {"trainer": 2}, "restarts": [{"stage": "sft", "step": 1, "time": 1.0, "cause": "x"}]}
    run.ended()
    path, right = run.path / "run.json", copy.deepcopy(run.state)
    right["processes"] = [{"pid": 10**7, "started": 1.0, "what": "ray", "where": ""}]
    refused = 0
    ours = [place for place in places(right) if place[0] not in ("versions", "command") and len(place) < 5]
    for *place, last in ours:
        for wrong in (-1, float("nan"), "x", None, [], {"x": -2}):
            state = copy.deepcopy(right)
            target: Any = state
            for key in place:
                target = target[key]
            target[last] = wrong
            path.write_text(json.dumps(state))
            try:
                found = RunFolder(run.path, read_state(path), "")
                found.compare(r, lambda stage: right["stages"][stage.id]["fingerprint"])
                for stage_id in found.finished():
                    found.require_kept(stage_id)
            except RunFolderError as error:
                assert error.remedy, error
                refused += 1
    assert refused > 100


def test_a_number_of_threads_that_no_machine_has_is_refused(tmp_path: Path) -> None:
    r = small(tmp_path)
    run = opened(r)
    run.ended()
    state = json.loads((run.path / "run.json").read_text())
    (run.path / "run.json").write_text(json.dumps({**state, "threads": {"trainer": -4}}))
    with pytest.raises(RunFolderError, match=r"run\.json: it is damaged: threads is \{'trainer': -4\}"):
        opened(r, resume=True)


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff", b"name: [", b"", b"name: x\nstages: 3\n"])
@pytest.mark.parametrize("verb", ["pareto", "rescore"])
def test_a_study_of_a_damaged_run_says_what_is_damaged(
    tmp_path: Path, content: bytes, verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    finished(small(tmp_path), "sft").ended()
    folder = small(tmp_path).run_folder
    for name in ("run.json", "recipe.yaml"):
        before = (folder / name).read_bytes() if (folder / name).exists() else None
        (folder / name).write_bytes(content)
        assert main([verb, str(folder)]) in (1, 2)
        said = capsys.readouterr().err
        assert "not foreseen" not in said and str(tmp_path) in said, said
        (folder / name).unlink() if before is None else (folder / name).write_bytes(before)


# ------------------------------------------------------------------------------------------------- places


def linked(path: Path) -> None:
    path.symlink_to(path.name)


@pytest.mark.parametrize("make", [lambda p: p.write_text("x"), linked, lambda p: p.symlink_to("/nowhere/x")])
@pytest.mark.parametrize("resume", [False, True])
def test_a_run_folder_that_is_no_folder_is_refused_by_name(tmp_path: Path, make, resume: bool) -> None:
    r = small(tmp_path)
    r.run_folder.parent.mkdir()
    make(r.run_folder)
    with pytest.raises(RunFolderError, match=r"runs/run: the run folder is no folder\n.*another name="):
        opened(r, resume=resume)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"name": "a" * 300}, "File name too long"),
        ({"output": "/proc/nothing"}, "No such file"),
        ({"output": "/dev/null"}, "Not a directory"),
        ({"name": "a\0b"}, "no file system takes this name"),
    ],
)
def test_a_place_that_the_system_refuses_is_named_with_a_remedy(tmp_path: Path, change: dict, said: str) -> None:
    with pytest.raises(AlignError, match=said) as caught:
        opened(small(tmp_path).model_copy(update=change))
    assert caught.value.where


def test_a_folder_that_was_removed_while_a_run_worked_is_told(tmp_path: Path) -> None:
    run = opened(small(tmp_path))
    shutil.rmtree(run.path)
    with pytest.raises(RunFolderError, match="removed while this driver worked in it"):
        run.record([], {})
    run.ended()


def test_what_lies_where_a_killed_writer_would_leave_a_folder_is_removed_whatever_it_is(tmp_path: Path) -> None:
    (tmp_path / ".writing-model").write_text("a file")
    (tmp_path / ".removing-x").symlink_to(tmp_path)
    (tmp_path / "model").write_text("a file")
    remove_leftovers(tmp_path)
    remove_folder(tmp_path / "model")
    assert os.listdir(tmp_path) == []


# ------------------------------------------------------------------------------------------------- full disks

full = pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")


@full
def test_a_disk_that_fills_up_names_the_file_and_says_what_to_do(tmp_path: Path) -> None:
    log = MetricsFile(tmp_path)
    (tmp_path / "sft").mkdir()
    (tmp_path / "sft" / "metrics.jsonl").symlink_to("/dev/full")
    log.open_stage("sft", 0)
    with pytest.raises(OSError) as caught:
        log.write("sft", 1, 0.0, {"loss/total": 1.0})
    said = str(described(caught.value))
    assert is_known(caught.value) and "metrics.jsonl: No space left on device" in said and "free space" in said


def test_a_full_disk_under_a_folder_that_is_written_aside_names_it(tmp_path: Path) -> None:
    """A write to an open file does not say which; nothing is left under either name."""
    with pytest.raises(OSError, match="step-000002"), written_aside(tmp_path / "step-000002"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_told_in_the_same_words_where_a_library_has_its_own(tmp_path: Path) -> None:
    """/dev/full refuses every write; safetensors and tokenizers raise no OSError for it."""
    safetensors, full = pytest.importorskip("safetensors.numpy"), Path("/dev/full")
    if not full.exists():
        pytest.skip("this system has no /dev/full")
    with pytest.raises(OSError, match="step-1") as caught, naming(tmp_path / "step-1"):
        raise ValueError("Error while serializing: I/O error: No space left on device (os error 28)")
    assert is_known(caught.value) and "free space" in str(described(caught.value))
    with pytest.raises(OSError, match="/dev/full"), naming(full), full.open("wb") as handle:
        handle.write(safetensors.save({}))
    with pytest.raises(RunFolderError, match="mine"), naming(full):
        raise RunFolderError("mine (os error 28)")
    with pytest.raises(ValueError, match="another"), naming(full):
        raise ValueError("another")


def test_a_write_that_fails_leaves_the_old_file_and_nothing_beside(tmp_path: Path, monkeypatch) -> None:
    write_json(tmp_path / "run.json", {"a": 1})

    def fail(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match=re.escape(str(tmp_path / "run.json"))):
        write_json(tmp_path / "run.json", {"a": 2})
    assert json.loads((tmp_path / "run.json").read_text()) == {"a": 1} and os.listdir(tmp_path) == ["run.json"]


def test_the_commands_last_line_for_what_the_system_refuses_has_place_and_remedy(
    monkeypatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in (errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EIO, errno.ESTALE, errno.EMFILE, errno.EDQUOT):
        error = OSError(number, os.strerror(number), "/data/runs/x")
        monkeypatch.setattr("align.cli.doctor.run", lambda arguments, error=error: (_ for _ in ()).throw(error))
        assert main(["doctor"]) == 1
        said = capsys.readouterr().err
        assert said.startswith(f"error: /data/runs/x: {os.strerror(number)}\n  -> ") and "not foreseen" not in said


def test_a_folder_in_the_place_of_another_is_made_once_by_many(tmp_path: Path) -> None:
    make_folder(tmp_path / "a" / "b")
    make_folder(tmp_path / "a" / "b")
    (tmp_path / "file").write_text("x")
    with pytest.raises(NotADirectoryError):
        make_folder(tmp_path / "file")
