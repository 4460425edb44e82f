"""Environments that go wrong in every way that code can: one episode's loss at most, said as what it was."""

from __future__ import annotations

import asyncio
import os
import resource
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.unit.environments.stage import begun, hosted, within, write

HOSTILE = """
import asyncio, collections, ctypes, itertools, json, os, signal, struct, subprocess, sys, time

def sockets():
    for fd in os.listdir("/proc/self/fd"):
        try:
            if os.readlink(f"/proc/self/fd/{fd}").startswith("socket:"):
                yield int(fd)
        except OSError:
            pass

class Env:
    def reset(self, row):
        if row.get("bad"):
            raise ValueError("no such level")
        self.cleaned = False

    def fine(self) -> str:
        return "fine"

    def was_cleaned(self) -> bool:
        return self.cleaned

    def raises(self):
        raise ValueError("the door is locked")

    def exits(self):
        sys.exit(3)

    def interrupts(self):
        raise KeyboardInterrupt

    def unspeakable(self):
        class Mute(Exception):
            def __str__(self):
                raise RuntimeError
        raise Mute

    def sleeps(self):
        try:
            time.sleep(60)
        finally:
            self.cleaned = True

    def loops(self):
        while True:
            try:
                time.sleep(0.01)
            except Exception:
                pass

    def waits_for_a_program(self):
        subprocess.run(["sleep", "600"])

    def loops_and_catches_all(self):
        while True:
            try:
                time.sleep(0.01)
            except BaseException:
                pass

    def catches_and_returns(self) -> str:
        try:
            time.sleep(60)
        except BaseException:
            return "too late"

    def holds_the_gil(self):
        collections.deque(itertools.repeat(0), maxlen=0)

    def blocks_signals(self):
        signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 64))
        time.sleep(600)

    def stops(self):
        os.kill(os.getpid(), signal.SIGSTOP)

    async def blocks_the_loop(self):
        time.sleep(60)

    async def awaits_for_ever(self):
        await asyncio.Event().wait()

    async def never_cancelled(self):
        while True:
            try:
                await asyncio.sleep(0.01)
            except BaseException:
                pass

    async def exits_in_a_task(self):
        async def leave():
            sys.exit(1)
        asyncio.get_running_loop().create_task(leave())
        await asyncio.sleep(0.1)
        return "still here"

    def ends(self):
        os._exit(7)

    def is_killed(self):
        os.kill(os.getpid(), signal.SIGKILL)

    def segfaults(self):
        ctypes.string_at(0)

    def kills_its_keeper(self):
        subprocess.Popen(["sleep", "611"], start_new_session=True)
        os.kill(os.getppid(), signal.SIGKILL)
        time.sleep(60)

    def returns_much(self) -> str:
        return "x" * 100_000_000

    def returns_much_in_a_list(self) -> list:
        return ["x" * 100_000_000]

    def returns_a_circle(self) -> list:
        a = []
        a.append(a)
        return a

    def eats_memory(self) -> str:
        return bytes(4_000_000_000).decode()

    def writes_garbage(self):
        for fd in sockets():
            os.write(fd, b"garbage" * 100)
        time.sleep(60)

    def writes_a_long_header(self):
        for fd in sockets():
            os.write(fd, struct.pack("!Q", 1 << 40))
        time.sleep(60)

    def writes_strange_json(self):
        for fd in sockets():
            body = json.dumps({"id": 1, "part": 0, "kind": "value", "value": 1}).encode()
            os.write(fd, struct.pack("!Q", len(body)) + body)
        time.sleep(60)

    def closes_everything(self):
        os.closerange(0, 4096)

    def closes_everything_and_stays(self):
        os.closerange(0, 4096)
        self.loops_and_catches_all()

    def prints_without_end(self):
        while True:
            print("y" * 10_000)

    def leaves_a_daemon(self) -> str:
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                os.closerange(0, 3)
                time.sleep(612)
            os._exit(0)
        return "left"

    def forks_and_both_return(self) -> str:
        os.fork()
        return "one of us"
"""
TOLD = {  # the episode lives on
    "raises": ("raised", "ValueError: the door is locked"),
    "exits": ("raised", "SystemExit: 3"),
    "interrupts": ("raised", "KeyboardInterrupt"),
    "unspeakable": ("raised", "Mute"),
    "sleeps": ("timeout", "not done after"),
    "loops": ("timeout", "not done after"),
    "waits_for_a_program": ("timeout", "not done after"),
    "catches_and_returns": ("timeout", "not done after"),
    "blocks_the_loop": ("timeout", "not done after"),
    "awaits_for_ever": ("timeout", "not done after"),
    "returns_much": ("too_large", "4,194,304"),
    "returns_much_in_a_list": ("too_large", "4,194,304"),
    "returns_a_circle": ("raised", "Recursion"),
    "eats_memory": ("raised", "MemoryError"),
    "prints_without_end": ("timeout", "not done after"),
}
LOST = {
    "loops_and_catches_all": ("timeout", "did not end"),
    "holds_the_gil": ("timeout", "did not end"),
    "blocks_signals": ("timeout", "did not end"),
    "stops": ("timeout", "did not end"),
    "never_cancelled": ("timeout", "did not end"),
    "ends": ("died", "exited with status 7"),
    "is_killed": ("died", "SIGKILL"),
    "segfaults": ("died", "SIGSEGV"),
    "kills_its_keeper": ("died", "closed its connection"),
    "writes_garbage": ("protocol", "its process sent"),
    "writes_a_long_header": ("protocol", "1,099,511,627,776 bytes"),
    "writes_strange_json": ("protocol", "without all its fields"),
    "closes_everything": ("died", "exited with status 70"),
    "closes_everything_and_stays": ("died", "closed its connection"),
}


@pytest.fixture(autouse=True)
def nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Neither processes, nor descriptors, nor temporary folders, whatever a test did."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    before = len(os.listdir("/proc/self/fd"))
    yield
    assert len(os.listdir("/proc/self/fd")) <= before
    assert list((tmp_path / "temporary").iterdir()) == []
    assert programs() == []


def programs() -> list[int]:
    """What the environments above start, and our own processes."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        line = " ".join(process.info["cmdline"] or ())
        ours = "rewards.environments.zygote" in line and str(os.getpid()) in line.split()
        if (ours or line in ("sleep 600", "sleep 611")) and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(process.pid)
    return found


async def called(tmp_path: Path, tool: str, **options: Any) -> tuple[Any, Any]:
    """The outcome of one call, and of a harmless one after it."""
    async with hosted(write(tmp_path, HOSTILE), **options) as host:
        live = await begun(host)
        [outcome] = await live.calls([(tool, {})], 0.7)
        [after] = await live.calls([("fine", {})], 5)
        other = await begun(host)
        assert (await other.calls([("fine", {})], 5))[0].value == "fine", "another episode is not touched"
        await live.close(5)
        return outcome, after


@pytest.mark.parametrize("tool", TOLD)
def test_what_a_tool_does_wrong_is_told_and_the_episode_lives_on(tmp_path: Path, tool: str) -> None:
    outcome, after = within(lambda: called(tmp_path, tool, memory_mb=1024))
    kind, said = TOLD[tool]
    assert outcome.kind == kind and said in outcome.message and not outcome.lost, outcome
    assert after.value == "fine"


@pytest.mark.parametrize("tool", LOST)
def test_what_survives_its_deadline_or_dies_is_lost_alone(tmp_path: Path, tool: str) -> None:
    started = time.monotonic()
    outcome, after = within(lambda: called(tmp_path, tool))
    kind, said = LOST[tool]
    assert outcome.kind == kind and said in outcome.message and outcome.lost, outcome
    assert after.lost and after.kind == kind
    assert time.monotonic() - started < 15


@pytest.mark.parametrize("tool", ["exits_in_a_task", "leaves_a_daemon", "forks_and_both_return"])
def test_what_a_tool_leaves_behind_ends_with_the_episode(tmp_path: Path, tool: str) -> None:
    async def play() -> None:
        async with hosted(write(tmp_path, HOSTILE)) as host:
            live = await begun(host)
            keeper = psutil.Process(live.pid).parent()
            assert keeper is not None
            [outcome] = await live.calls([(tool, {})], 5)
            assert outcome.kind == "value" and outcome.value in ("still here", "left", "one of us")
            assert (await live.calls([("fine", {})], 5))[0].value == "fine"
            await asyncio.sleep(0.1)
            family = [p for p in keeper.children(recursive=True) if p.status() != psutil.STATUS_ZOMBIE]
            assert len(family) == (2 if tool == "leaves_a_daemon" else 1)
            await live.close(5)
            assert [p.pid for p in family if p.is_running() and p.status() != psutil.STATUS_ZOMBIE] == []

    within(play)


def test_code_that_a_deadline_ends_cleans_up(tmp_path: Path) -> None:
    async def play() -> None:
        async with hosted(write(tmp_path, HOSTILE)) as host:
            live = await begun(host)
            [slept] = await live.calls([("sleeps", {})], 0.5)
            [cleaned] = await live.calls([("was_cleaned", {})], 5)
            assert slept.kind == "timeout" and cleaned.value == "true"

    within(play)


def test_a_reset_that_fails_for_some_rows_costs_those(tmp_path: Path) -> None:
    async def play() -> None:
        async with hosted(write(tmp_path, HOSTILE)) as host:
            lives = [await host.open() for _ in range(6)]
            outcomes = await asyncio.gather(*(live.reset({"bad": n % 2}, 0, n, 5) for n, live in enumerate(lives)))
            assert [o.kind for o in outcomes] == ["value", "raised"] * 3
            assert outcomes[1].message == "ValueError: no such level" and "env.py:" in outcomes[1].where

    within(play)


def test_large_answers_and_endless_output_take_no_memory_and_little_disk(tmp_path: Path) -> None:
    async def play() -> None:
        async with hosted(write(tmp_path, HOSTILE), log_path=tmp_path / "log") as host:
            live = await begun(host)
            for tool in ("returns_much", "returns_much_in_a_list", "prints_without_end"):
                await live.calls([(tool, {})], 3)

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    within(play)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # KiB
    assert (tmp_path / "log").stat().st_size < 3 << 20
    assert "the rest is dropped" in (tmp_path / "log").read_text()


def test_one_that_hangs_delays_nobody_else(tmp_path: Path) -> None:
    async def play() -> None:
        async with hosted(write(tmp_path, HOSTILE)) as host:
            lives = await asyncio.gather(*(begun(host) for _ in range(64)))
            hung = asyncio.create_task(lives[0].calls([("holds_the_gil", {})], 25.0))
            for _ in range(3):
                found = await asyncio.gather(*(live.calls([("fine", {})], 10) for live in lives[1:]))
                assert {outcome.value for [outcome] in found} == {"fine"}
            assert not hung.done(), "the others were done while it still hung"
            await lives[0].close(1)
            assert (await hung)[0].lost
            await asyncio.gather(*(live.close(5) for live in lives))

    within(play)
