from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from align.stages import owned, processes
from align.stages.owned import owned_folder, sweep
from align.stages.processes import ProcessId, is_alive, this_process
from align.stages.publication import PublicationFolder


@pytest.fixture
def sleeper():
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    yield child
    child.kill()
    child.wait()


def identity(child: subprocess.Popen) -> ProcessId:
    found = processes.describe(child.pid, "sleeper")
    assert found is not None
    return found


def test_a_process_is_told_from_a_stranger_with_its_number(sleeper) -> None:
    process = identity(sleeper)
    assert is_alive(process)
    assert not is_alive(ProcessId(process.pid, process.started - 100.0))


def test_ending_leaves_a_stranger_with_a_reused_number_alone(sleeper) -> None:
    stranger = ProcessId(sleeper.pid, identity(sleeper).started - 100.0, "ours, long gone")
    assert processes.end([stranger]) == [] and sleeper.poll() is None
    ours = identity(sleeper)
    assert processes.end([ours]) == [ours]
    assert not is_alive(ours)


def test_a_process_that_ignores_sigterm_is_killed(tmp_path: Path) -> None:
    script = (
        "import signal, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
        "open(sys.argv[1], 'w').close(); time.sleep(60)"
    )
    child = subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "up")])
    while not (tmp_path / "up").exists():
        time.sleep(0.01)
    stubborn = identity(child)
    assert processes.end([stubborn], grace_s=0.3) == [stubborn]
    assert not is_alive(stubborn)
    child.wait()


def test_a_zombie_counts_as_dead() -> None:
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    process = ProcessId(child.pid, psutil.Process(child.pid).create_time())
    while psutil.Process(child.pid).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    assert not is_alive(process)
    child.wait()


def test_children_of_children_are_listed(tmp_path: Path) -> None:
    script = (
        "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']);"
        "open(sys.argv[1], 'w').close(); time.sleep(60)"
    )
    before = set(processes.descendants("test"))  # a cluster that other tests of this process share
    child = subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "up")])
    try:
        while not (tmp_path / "up").exists():
            time.sleep(0.01)
        found = set(processes.descendants("test")) - before
        assert child.pid in {p.pid for p in found} and len(found) == 2
    finally:
        processes.end([p for p in processes.descendants("test") if p not in before])
        child.wait()
    assert set(processes.descendants("test")) <= before


def test_a_living_owners_folder_stays_and_a_dead_ones_goes(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(owned, "MEMORY", tmp_path / "none")
    mine, dead, foreign, strange = (owned_folder(tmp_path) for _ in range(4))
    for folder, change in ((dead, {"started": 1.0}), (foreign, {"started": 1.0, "namespace": "pid:[1]"})):
        owner = json.loads((folder / "owner.json").read_text())
        (folder / "owner.json").write_text(json.dumps({**owner, **change}))
    (strange / "owner.json").unlink()
    assert sweep(tmp_path) == [dead]
    assert {p.name for p in tmp_path.iterdir()} == {mine.name, foreign.name, strange.name}
    assert ProcessId.from_json(json.loads((mine / "owner.json").read_text())) == this_process()


def test_sweeping_ends_who_has_a_file_open_in_a_dead_owners_folder(tmp_path: Path, monkeypatch, sleeper) -> None:
    monkeypatch.setattr(owned, "MEMORY", tmp_path / "none")
    dead = owned_folder(tmp_path)
    owner = json.loads((dead / "owner.json").read_text())
    (dead / "owner.json").write_text(json.dumps({**owner, "started": 1.0}))
    script = "import sys, time; f = open(sys.argv[1], 'w'); time.sleep(60)"
    user = subprocess.Popen([sys.executable, "-c", script, str(dead / "agent.log")])
    while not (dead / "agent.log").exists():
        time.sleep(0.01)
    process = identity(user)
    assert sweep(tmp_path) == [dead] and not dead.exists()
    assert not is_alive(process) and sleeper.poll() is None
    user.wait()


def test_a_superseded_version_is_deleted_and_the_folder_ends_with_the_run(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("align.stages.publication.MEMORY", tmp_path / "none")
    publications = PublicationFolder(tmp_path)
    assert publications.root.parent == tmp_path
    paths = [publications.folder("grpo", version) for version in range(3)]
    assert len(set(paths)) == 3 and not any(p.exists() for p in paths)
    for path in paths:
        path.mkdir()
    publications.supersede(paths[2])
    assert [p.exists() for p in paths] == [False, False, True]
    publications.close()
    assert not publications.root.exists()


def test_the_memory_file_system_is_used_unless_engines_are_elsewhere(tmp_path: Path, monkeypatch) -> None:
    memory = tmp_path / "memory"
    memory.mkdir()
    monkeypatch.setattr("align.stages.publication.MEMORY", memory)
    assert PublicationFolder(tmp_path / "run").root.parent == memory
    assert PublicationFolder(tmp_path / "run", shared=True).root.parent == tmp_path / "run"
    assert os.listdir(memory) != []
