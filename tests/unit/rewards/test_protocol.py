"""Whatever comes from a plugin's process, and however the task that listens to it ends: nobody waits for ever."""

from __future__ import annotations

import asyncio
import datetime
import decimal
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from rewards import PluginError, Sample, wire
from rewards.plugin import PluginSpec
from rewards.pool import PoolResult, RewardPool

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
BOUND = 60.0  # seconds, on a busy machine: far less than for ever
WAYS = [
    "garbage", "huge", "begun", "no json", "no object", "no text", "deep", "empty", "no id", "another's id",
    "an id of text", "unknown kind", "too few", "no numbers", "infinite", "strange metrics", "strange errors",
    "an error of numbers", "unknown tag", "closed", "half closed",
]  # fmt: skip


def within(work: object) -> PoolResult:
    async def run() -> PoolResult:
        return await asyncio.wait_for(work, BOUND)  # type: ignore[arg-type]

    return asyncio.run(run())


async def scored(spec: PluginSpec, samples: list[Sample], folder: Path = HERE) -> PoolResult:
    pool = RewardPool([spec], folder, seed=0)
    try:
        return await pool.score(samples)
    finally:
        pool.close()


@pytest.mark.slow
def test_what_is_no_answer_costs_its_sample_and_ends_no_wait() -> None:
    samples = [s for n, way in enumerate(WAYS) for s in (Sample(way, group_id=n), Sample("fine", group_id=n))]
    result = within(scored(PluginSpec("garbler.py:garbles"), samples))
    causes = {samples[f.index].completion: f.cause for f in result.failures}
    assert set(causes) == set(WAYS)
    assert [way for way, cause in causes.items() if cause == "timeout"] == ["begun"], "what is begun may still come"
    assert {way for way, cause in causes.items() if cause == "crashed"} == {"closed", "half closed"}
    assert [row[0] for row in result.scores] == [None, 1.0] * len(WAYS)
    assert all("its process sent" in f.message for f in result.failures if f.cause == "protocol")


def test_an_async_plugin_may_write_what_it_likes_too() -> None:
    ways = ["garbage", "huge", "no json", "unknown kind", "closed"]
    result = within(scored(PluginSpec("garbler.py:garbles_async"), [Sample(way) for way in (*ways, "fine")]))
    assert [row[0] for row in result.scores] == [None] * 5 + [1.0]


def test_a_second_answer_to_one_call_ends_the_process_and_not_the_next_call() -> None:
    result = within(scored(PluginSpec("garbler.py:garbles", options={"retries": 1}), [Sample("twice"), Sample("fine")]))
    assert result.scores[1] == [1.0], result.failures


def test_what_is_written_while_a_plugin_is_imported_is_told_with_its_name(tmp_path: Path) -> None:
    source = (HERE / "garbler.py").read_text()
    for number, written in enumerate(
        ('b"importing...\\n" * 3', "frame(b'{\"ready\": {}}')", "frame(b'{\"ready\": 1}')", "frame(b'{\"broken\": 2}')")
    ):
        (tmp_path / f"early{number}.py").write_text(f"{source}\nos.write(protocol_fd(), {written})\n")
        with pytest.raises(PluginError, match=r"its process sent .* while importing it"):
            within(scored(PluginSpec(f"early{number}.py:garbles"), [Sample("fine")], tmp_path))


def test_calls_are_answered_where_the_task_that_listens_ends(tmp_path: Path) -> None:
    """As by an error that nobody foresaw: here the task is ended from outside."""
    (tmp_path / "slow.py").write_text("import time\ndef slow(samples):\n    time.sleep(30)\n    return [1.0]\n")

    async def run() -> PoolResult:
        pool = RewardPool([PluginSpec("slow.py:slow", options={"max_error_rate": 1.0, "retries": 0})], tmp_path, 0)
        try:
            await pool.start()
            scoring = asyncio.create_task(pool.score([Sample("a")]))
            [worker] = pool._teams[0].workers
            while not (worker._connection and worker._connection._pending):
                await asyncio.sleep(0.01)
            assert worker._connection._listener is not None
            worker._connection._listener.cancel()
            return await scoring
        finally:
            pool.close()

    started = time.monotonic()
    result = within(run())
    assert [f.cause for f in result.failures] == ["crashed"] and time.monotonic() - started < 25


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_process_that_is_killed_or_stopped_under_a_call_ends_it(tmp_path: Path, how: signal.Signals) -> None:
    (tmp_path / "slow.py").write_text(
        "import time\nfrom rewards import reward\n"
        "@reward(timeout_s=2, retries=0, max_error_rate=1.0)\ndef slow(samples):\n    time.sleep(1)\n    return [1.0]\n"
    )

    async def run() -> PoolResult:
        pool = RewardPool([PluginSpec("slow.py:slow")], tmp_path, 0)
        try:
            await pool.start()
            [worker] = pool._teams[0].workers
            assert worker._connection is not None
            os.kill(worker._connection.process.pid, how)
            return await pool.score([Sample("a")])
        finally:
            pool.close()

    result = within(run())
    assert [f.cause for f in result.failures] in (["crashed"], ["timeout"]) or result.scores == [[1.0]]


def test_rows_arrive_as_they_were(tmp_path: Path) -> None:
    """Whatever their keys are called, tagged values and numbers of both kinds included."""
    row = {
        "none": None, "int": 3, "float": 3.0, "text": "3", "true": True, "big": 2**80, "small": -0.0, "list": [1, 1.0],
        "bytes": b"\x00\xff", "date": datetime.date(2020, 1, 2), "when": datetime.datetime(2020, 1, 2, 3, 4, 5, 6),
        "long": datetime.timedelta(days=-1, microseconds=3), "exact": decimal.Decimal("1.10"),
        "__wire__": {"__wire__": ["bytes", "YQ=="]}, "___wire__": "bytes", "lone": "\ud800", "weight": 2,
        "nested": {"weight": 0.5, "null": None},
    }  # fmt: skip
    for one in (row, {"__wire__": "bytes"}, {'a"__wire__': b"x"}):
        sent = wire.decode(wire.encode({"row": one})[wire.HEADER.size :])["row"]
        assert sent == one and list(map(type, sent.values())) == list(map(type, one.values()))
    assert wire.decode(wire.encode({"n": np.float32(0.5), "a": np.arange(2)})[8:]) == {"n": 0.5, "a": [0, 1]}

    class Stamp(datetime.datetime):
        """As pandas' Timestamp, which pyarrow makes of nanoseconds."""

    assert wire.decode(wire.encode({"t": Stamp(2020, 1, 2)})[8:]) == {"t": datetime.datetime(2020, 1, 2)}


def test_a_row_that_cannot_be_sent_is_a_failure_of_its_sample(tmp_path: Path) -> None:
    deep: list[object] = []
    for _ in range(100_000):
        deep = [deep]
    (tmp_path / "ones.py").write_text("def ones(samples):\n    return [1.0] * len(samples)\n")
    samples = [Sample("a", row={"deep": deep}), Sample("b", row={"what": object()}), Sample("c")]
    spec = PluginSpec("ones.py:ones", options={"max_error_rate": 1.0})
    result = within(scored(spec, samples, tmp_path))
    assert [row[0] for row in result.scores] == [None, None, 1.0]
    assert {f.cause for f in result.failures} == {"wrong_type"}


def test_what_a_plugin_tells_and_nobody_can_keep_is_a_failure_with_its_reason(tmp_path: Path) -> None:
    (tmp_path / "tells.py").write_text(
        "from rewards import Score, reward\n"
        "@reward(batch=1, retries=0, max_error_rate=1.0)\n"
        "def tells(samples):\n"
        "    info = {'deep': []}\n"
        "    for _ in range(100_000 if samples[0].completion == 'deep' else 0):\n"
        "        info = {'deep': info}\n"
        "    if samples[0].completion == 'large':\n"
        "        info = {'text': 'x' * (1 << 28)}\n"
        "    return [Score(1.0, info=info)]\n"
    )
    result = within(scored(PluginSpec("tells.py:tells"), [Sample("deep"), Sample("large"), Sample("fine")], tmp_path))
    assert [row[0] for row in result.scores] == [None, None, 1.0]
    assert all("info or columns cannot be kept" in f.message for f in result.failures)
