"""One driver in a run folder: real processes that start at once, that are killed, and that live elsewhere."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from align.errors import RunFolderError
from align.stages import lock, processes
from align.stages.lock import STALE_S, FolderLock, require_free
from align.stages.runfolder import RunFolder
from tests.unit.stages.test_runfolder import recipe

TAKES = """
import sys, time
from pathlib import Path
from align.errors import RunFolderError
from align.stages.runfolder import RunFolder
from tests.unit.stages.test_runfolder import recipe

resume = sys.argv[2] == "resume"
for line in sys.stdin:
    folder = Path(sys.argv[1]) / line.split()[0]
    r = recipe(folder)
    while time.time() < float(line.split()[1]):
        pass
    try:
        run = RunFolder.open(r, "name: run\\n", resume=resume, cwd=folder)
    except RunFolderError as error:
        print("refused", str(error).replace("\\n", " "), flush=True)
        continue
    print("opened", flush=True)
    sys.stdin.readline()
    if sys.argv[2] != "leave":
        run.ended()
    print("done", flush=True)
"""


def driver(folder: Path, how: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", TAKES, str(folder), how]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def ask(child: subprocess.Popen[str], line: str) -> None:
    assert child.stdin is not None
    child.stdin.write(line + "\n")
    child.stdin.flush()


def answer(child: subprocess.Popen[str]) -> str:
    assert child.stdout is not None
    return child.stdout.readline().strip()


def end(children: list[subprocess.Popen[str]]) -> None:
    for child in children:
        child.kill()
        child.communicate()


def prepared(folder: Path, *, begun: bool) -> Path:
    folder.mkdir(parents=True)
    if begun:
        RunFolder.open(recipe(folder), "name: run\n", resume=False, cwd=folder).ended()
    return folder


@pytest.mark.parametrize("how", ["fresh", "resume"])
def test_of_many_drivers_that_start_at_once_one_opens_and_the_others_are_told_who(tmp_path: Path, how: str) -> None:
    """Twelve rounds of four processes that leave a barrier within microseconds."""
    children = [driver(tmp_path, how) for _ in range(4)]
    try:
        for number in range(12):
            prepared(tmp_path / f"r{number}", begun=how == "resume")
            when = time.time() + (2.0 if number == 0 else 0.05)
            for child in children:
                ask(child, f"r{number} {when}")
            answers = [answer(child) for child in children]
            [winner] = [child for child, said in zip(children, answers, strict=True) if said == "opened"]
            others = [said for said in answers if said != "opened"]
            assert all(f"process {winner.pid} on " in said and "last heartbeat" in said for said in others), others
            ask(winner, "end")
            assert answer(winner) == "done"
    finally:
        end(children)


def test_a_killed_drivers_folder_is_taken_by_the_next_at_once(tmp_path: Path) -> None:
    prepared(tmp_path / "r", begun=True)
    first, second = driver(tmp_path, "resume"), driver(tmp_path, "resume")
    try:
        ask(first, "r 0")
        assert answer(first) == "opened"
        ask(second, "r 0")
        assert f"process {first.pid} on " in answer(second)
        first.kill()
        first.wait()
        ask(second, "r 0")
        assert answer(second) == "opened"
    finally:
        end([first, second])


def test_a_stopped_driver_keeps_its_folder_for_it_may_go_on(tmp_path: Path) -> None:
    prepared(tmp_path / "r", begun=True)
    first = driver(tmp_path, "resume")
    try:
        ask(first, "r 0")
        assert answer(first) == "opened"
        os.kill(first.pid, signal.SIGSTOP)
        age(newest(tmp_path / "r" / "runs" / "run"), 10 * STALE_S)
        with pytest.raises(RunFolderError, match=f"process {first.pid} on "):
            RunFolder.open(recipe(tmp_path / "r"), "", resume=True, cwd=tmp_path)
    finally:
        os.kill(first.pid, signal.SIGCONT)
        end([first])


def newest(folder: Path) -> Path:
    return max(folder.glob(".lock.*"))


def age(path: Path, seconds: float) -> None:
    os.utime(path, (time.time() - seconds,) * 2)


def of_another_host(folder: Path, **changes: object) -> Path:
    """A lock as a driver elsewhere left it: it has this very process' number, which means nothing there."""
    held = FolderLock.take(folder)
    held.release()
    said = {**held.holder.to_json(), "host": "node7", "where": "another-boot/pid:[1]", "released": False, **changes}
    newest(folder).write_text(json.dumps(said))
    return newest(folder)


def test_a_driver_on_another_host_holds_while_its_heartbeat_is_fresh(tmp_path: Path) -> None:
    path = of_another_host(tmp_path)
    age(path, STALE_S - 30)
    with pytest.raises(RunFolderError) as caught:
        FolderLock.take(tmp_path)
    said = str(caught.value)
    assert f"process {os.getpid()} on node7" in said and "since 20" in said and "last heartbeat 90 s ago" in said
    assert "its lock is free 31 s from now" in said
    age(path, STALE_S + 5)
    taken = FolderLock.take(tmp_path)
    assert taken.note is not None and "on node7, which gave no sign of life for 125 s" in taken.note
    taken.release()


def test_the_other_hosts_clock_is_not_asked(tmp_path: Path) -> None:
    path = of_another_host(tmp_path, since=time.time() + 1e6, started=1.0)
    age(path, 1.0)
    with pytest.raises(RunFolderError, match="node7"):
        FolderLock.take(tmp_path)


def test_the_same_number_in_another_container_is_another_process(tmp_path: Path) -> None:
    boot = processes.here().partition("/")[0]
    of_another_host(tmp_path, where=f"{boot}/pid:[17]", pid=2**22 - 1)
    with pytest.raises(RunFolderError, match="is working"):
        FolderLock.take(tmp_path)


@pytest.mark.parametrize("since", [1e300, -1e18, float("nan"), float("inf")])
def test_a_holder_of_a_time_that_no_clock_shows_is_a_lock_that_cannot_be_read(tmp_path: Path, since: float) -> None:
    path = of_another_host(tmp_path, since=since)
    for look in (FolderLock.take, require_free):
        with pytest.raises(RunFolderError, match="cannot be read"):
            look(tmp_path)
    age(path, STALE_S + 1)
    FolderLock.take(tmp_path).release()


def test_a_pipe_in_the_place_of_a_lock_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / ".lock.000001")
    with pytest.raises(RunFolderError, match="cannot be read"):
        FolderLock.take(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 9999, b'{"pid": -1}', b"null"])
def test_a_lock_that_cannot_be_read_holds_until_it_is_stale(tmp_path: Path, content: bytes) -> None:
    path = of_another_host(tmp_path)
    path.write_bytes(content)
    with pytest.raises(RunFolderError, match="cannot be read"):
        FolderLock.take(tmp_path)
    age(path, STALE_S + 1)
    FolderLock.take(tmp_path).release()


def test_where_hard_links_are_refused_an_exclusive_file_does(tmp_path: Path, monkeypatch) -> None:
    def refuse(source: object, target: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(lock.os, "link", refuse)
    held = FolderLock.take(tmp_path)
    with ThreadPoolExecutor(1) as pool, pytest.raises(RunFolderError, match=f"process {os.getpid()} on "):
        pool.submit(FolderLock.take, tmp_path).result()
    held.release()


def test_an_answer_that_a_server_lost_is_no_refusal(tmp_path: Path, monkeypatch) -> None:
    """NFS: the link was made, the answer was lost, and the second try finds it there."""
    link = os.link

    def twice(source: object, target: object) -> None:
        link(source, target)
        link(source, target)

    monkeypatch.setattr(lock.os, "link", twice)
    FolderLock.take(tmp_path).release()


def test_threads_of_one_process_are_kept_apart_too(tmp_path: Path) -> None:
    barrier, won, refused = threading.Barrier(6), [], []

    def take() -> None:
        barrier.wait()
        try:
            won.append(FolderLock.take(tmp_path))
        except RunFolderError as error:
            refused.append(error)

    threads = [threading.Thread(target=take) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1 and len(refused) == 5
    won[0].release()
    FolderLock.take(tmp_path).release()


def test_a_driver_that_lost_its_folder_writes_nothing_more(tmp_path: Path) -> None:
    prepared(tmp_path / "r", begun=False)
    run = RunFolder.open(recipe(tmp_path / "r"), "", resume=False, cwd=tmp_path)
    assert run.lock is not None
    other = run.path / f".lock.{int(newest(run.path).suffix[1:]) + 1:06d}"
    other.write_bytes(newest(run.path).read_bytes())
    before = (run.path / "run.json").read_bytes()
    with pytest.raises(RunFolderError, match="another driver has taken it"):
        run.record([], {"trainer": 3})
    run.ended()
    assert (run.path / "run.json").read_bytes() == before


def test_the_one_that_beats_tells_when_its_folder_is_gone(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(lock, "BEAT_S", 0.02)
    (tmp_path / "r").mkdir()
    held, told = FolderLock.take(tmp_path / "r"), threading.Event()
    held.on_lost = lambda error: told.set()
    beaten = newest(tmp_path / "r").stat().st_mtime_ns
    deadline = time.monotonic() + 5
    while newest(tmp_path / "r").stat().st_mtime_ns == beaten and time.monotonic() < deadline:
        time.sleep(0.01)
    assert newest(tmp_path / "r").stat().st_mtime_ns > beaten
    for path in (tmp_path / "r").iterdir():
        path.unlink()
    (tmp_path / "r").rmdir()
    assert told.wait(5) and "was removed" in str(held.lost)


def test_a_folder_that_is_no_run_is_left_without_a_trace(tmp_path: Path) -> None:
    folder = recipe(tmp_path).run_folder
    folder.mkdir(parents=True)
    (folder / "thesis.txt").write_text("mine")
    with pytest.raises(RunFolderError, match="no run"):
        RunFolder.open(recipe(tmp_path), "", resume=True, cwd=tmp_path)
    assert os.listdir(folder) == ["thesis.txt"]


def test_old_locks_do_not_pile_up(tmp_path: Path) -> None:
    for _ in range(5):
        FolderLock.take(tmp_path).release()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock.000004", ".lock.000005"]
