"""The warm process: started anew when it dies, ends with its parent, leaks nothing over hundreds of episodes."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from rewards import PluginError
from rewards.environments.host import Host
from rewards.environments.live import Live
from rewards.environments.spec import EnvironmentSpec
from tests.unit.environments.stage import GUESS, begun, hosted, within, write

GUESSES = "env.py:GuessNumber"
LEFT = """
import os, subprocess
class Env:
    def start(self) -> str:
        subprocess.Popen(["sleep", "613"], start_new_session=True)
        open(os.path.join(os.environ["TMPDIR"], "file"), "w").close()
        return os.environ["TMPDIR"]
"""


def alive(pids: list[int]) -> list[int]:
    found = []
    for pid in pids:
        with contextlib.suppress(psutil.NoSuchProcess):
            if psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                found.append(pid)
    return found


def gone(pids: list[int], seconds: float = 10.0) -> bool:
    deadline = time.monotonic() + seconds
    while alive(pids) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not alive(pids)


def test_a_dead_warm_process_is_started_anew_and_its_episodes_are_lost(tmp_path: Path) -> None:
    async def play() -> None:
        async with hosted(write(tmp_path, GUESS), GUESSES) as host:
            live = await begun(host, {"secret": 1})
            [zygote] = [p for p in psutil.Process(live.pid).parents() if p.ppid() == os.getpid()]
            zygote.send_signal(signal.SIGKILL)
            assert await asyncio.to_thread(gone, [live.pid])
            assert (await live.calls([("guess", {"number": 1})], 5))[0].lost
            others = await asyncio.gather(*(begun(host, {"secret": 2}) for _ in range(8)))
            assert (await others[0].calls([("guess", {"number": 2})], 5))[0].value == "right"
            assert host.starts == 2

    within(play)


def test_a_file_that_changes_under_a_run_is_noticed(tmp_path: Path) -> None:
    async def play() -> None:
        async with hosted(write(tmp_path, GUESS), GUESSES) as host:
            live = await host.open()
            [zygote] = [p for p in psutil.Process(live.pid).parents() if p.ppid() == os.getpid()]
            write(tmp_path, GUESS.replace("right", "RIGHT"))
            zygote.send_signal(signal.SIGKILL)
            assert await asyncio.to_thread(gone, [live.pid])
            with pytest.raises(PluginError, match="changed while the run goes on"):
                await host.open()

    within(play)


def test_hundreds_of_episodes_leave_nothing_and_take_milliseconds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    seconds: list[float] = []

    async def play() -> None:
        async with hosted(write(tmp_path, LEFT)) as host:
            [zygote] = [p for p in psutil.Process().children() if "zygote" in " ".join(p.cmdline())]

            async def one() -> None:
                started = time.monotonic()
                live = await host.open()
                seconds.append(time.monotonic() - started)
                await live.reset({}, 0, 0, 10)
                [outcome] = await live.calls([("start", {})], 10)
                await live.close(10)
                assert not os.path.exists(outcome.value)

            async def some(count: int) -> None:
                for _ in range(count):
                    await one()

            await some(10)
            own, descriptors = psutil.Process().memory_info().rss, psutil.Process().num_fds()
            memory, theirs = zygote.memory_info().rss, zygote.num_fds()
            await asyncio.gather(*(some(75) for _ in range(4)))
            assert psutil.Process().num_fds() == descriptors and zygote.num_fds() <= theirs + 1
            assert psutil.Process().memory_info().rss - own < 20 << 20
            assert zygote.memory_info().rss - memory < 5 << 20
            await asyncio.sleep(0.2)
            assert len(zygote.children(recursive=True)) == 0, "also no zombie"

    threads = threading.active_count()
    within(play, 120)
    assert sorted(seconds)[len(seconds) // 10] < 0.5, "a fork, where nobody else computes"
    assert list((tmp_path / "temporary").iterdir()) == []
    assert [p.pid for p in psutil.process_iter(["cmdline"]) if p.info["cmdline"] == ["sleep", "613"]] == []
    assert threading.active_count() <= threads + 1  # the one that starts processes, of all plugins


PARENT = """
import asyncio, sys
from pathlib import Path
from rewards.environments.host import Host
from rewards.environments.live import Live
from rewards.environments.spec import EnvironmentSpec

async def main():
    host = Host(EnvironmentSpec("env.py:Env"), Path(sys.argv[1]), 0)
    await host.start()
    for _ in range(3):
        live = await host.open()
        await live.reset({}, 0, 0, 10)
        await live.calls([("start", {})], 10)
    print("ready", flush=True)
    await live.calls([("hang", {})], 600)

asyncio.run(main())
"""


def test_the_parents_end_is_everybodys(tmp_path: Path) -> None:
    hang = "    def hang(self):\n        import collections, itertools\n"
    hang += "        collections.deque(itertools.repeat(0), maxlen=0)\n"
    write(tmp_path, LEFT + hang)
    (tmp_path / "temporary").mkdir()
    environ = {**os.environ, "TMPDIR": str(tmp_path / "temporary")}
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(tmp_path)], stdout=subprocess.PIPE, env=environ)
    assert parent.stdout is not None and parent.stdout.readline() == b"ready\n"
    family = [p.pid for p in psutil.Process(parent.pid).children(recursive=True)]
    assert len(family) == 1 + 3 * 3  # the warm one; of each episode its keeper, itself and what it started
    parent.kill()
    parent.communicate()
    assert gone(family)
    deadline = time.monotonic() + 5
    while list((tmp_path / "temporary").iterdir()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert list((tmp_path / "temporary").iterdir()) == []


def test_a_host_that_is_closed_under_a_request_answers_it(tmp_path: Path) -> None:
    text = "import time\nclass Env:\n    def hang(self):\n        time.sleep(600)\n"

    async def play() -> None:
        async with hosted(write(tmp_path, text)) as host:
            live = await begun(host)
            asked = asyncio.create_task(live.calls([("hang", {})], 600))
            await asyncio.sleep(0.1)
            host.close()
            [outcome] = await asked
            assert outcome.lost and "the host was closed" in outcome.message
            assert gone([live.pid], 0.1)

    within(play)


def test_the_files_of_a_host_may_be_read_elsewhere_and_another_interpreter_runs_it(tmp_path: Path) -> None:
    """One that has none of our packages: a virtual environment of its own."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "other"], check=True)
    text = "import sys\ntry:\n    import torch\nexcept ModuleNotFoundError:\n    torch = None\n"
    text += "class Env:\n    def where(self) -> list:\n        return [sys.prefix, torch is None]\n"

    async def play() -> None:
        async with hosted(write(tmp_path, text), python="other/bin/python") as host:
            live = await begun(host)
            [outcome] = await live.calls([("where", {})], 5)
            assert outcome.value == f'["{tmp_path / "other"}", true]'

    within(play)

    async def none() -> None:
        host = Host(EnvironmentSpec("env.py:Env", python="nowhere/python"), tmp_path, 0)
        try:
            await host.start()
        finally:
            host.close()

    with pytest.raises(PluginError, match="nowhere/python"):
        within(none)


def test_what_importing_started_ends_with_the_host_and_not_before(tmp_path: Path) -> None:
    text = "import subprocess\nserver = subprocess.Popen(['sleep', '614'], start_new_session=True)\n"
    text += "class Env:\n    def server(self) -> int:\n        return server.pid\n"

    async def play() -> int:
        async with hosted(write(tmp_path, text)) as host:
            live = await begun(host)
            [outcome] = await live.calls([("server", {})], 5)
            await live.close(5)
            await asyncio.sleep(0.2)
            assert alive([int(outcome.value)])
            return int(outcome.value)

    assert gone([within(play)], 0.5)


def test_an_import_that_hangs_is_ended_with_what_it_printed(tmp_path: Path) -> None:
    text = "import collections, itertools\nprint('loading')\ncollections.deque(itertools.repeat(0), maxlen=0)\n"

    async def play() -> None:
        async with hosted(write(tmp_path, text), start_s=1.0):
            pass

    with pytest.raises(PluginError, match="took more than 1 s") as caught:
        within(play)
    assert "loading" in str(caught.value.remedy) and "belongs into `reset`" in str(caught.value.remedy)


def test_episodes_that_all_die_at_once_and_a_warm_process_that_dies_between(tmp_path: Path) -> None:
    text = "import os\nclass Env:\n    def end(self):\n        os._exit(1)\n"

    async def play() -> None:
        async with hosted(write(tmp_path, text)) as host:
            for _ in range(3):
                opening = [asyncio.create_task(begun(host)) for _ in range(32)]
                await asyncio.sleep(0.02)
                [warm] = [p for p in psutil.Process().children() if "zygote" in " ".join(p.cmdline())]
                warm.kill()
                found = await asyncio.gather(*opening, return_exceptions=True)
                lives = [live for live in found if isinstance(live, Live)]
                assert not [error for error in found if isinstance(error, PluginError)], "opened anew, unasked"
                outcomes = await asyncio.gather(*(live.calls([("end", {})], 5) for live in lives))
                assert all(outcome.kind == "died" and outcome.lost for [outcome] in outcomes)
                await asyncio.gather(*(live.close(5) for live in lives))
            assert (await (await begun(host)).reward(5)).kind == "raised"

    within(play)


def test_a_memory_limit_counts_what_an_episode_takes(tmp_path: Path) -> None:
    text = "held = bytes(200_000_000)\nclass Env:\n    def take(self, mb: int) -> int:\n"
    text += "        self.mine = bytearray(mb << 20)\n        return len(self.mine) >> 20\n"

    async def play() -> None:
        async with hosted(write(tmp_path, text), memory_mb=128) as host:
            live = await begun(host)
            assert (await live.calls([("take", {"mb": 64})], 5))[0].value == "64"
            [refused] = await live.calls([("take", {"mb": 256})], 5)
            assert refused.kind == "raised" and "MemoryError" in refused.message
            assert (await live.calls([("take", {"mb": 32})], 5))[0].value == "32"

    within(play)
