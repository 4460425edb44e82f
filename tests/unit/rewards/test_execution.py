"""Several processes, rates, the cache of scores, and what is told about time."""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import sqlite3
from pathlib import Path

import pytest

from rewards import PluginError, Sample
from rewards.api import per_second
from rewards.cache import ScoreCache, plugin_key, sample_key
from rewards.plugin import PluginSpec
from rewards.pool import PoolResult, RewardPool
from rewards.team import Gate

pytestmark = pytest.mark.slow

PLUGINS = """
import asyncio, os, time
from pathlib import Path
from rewards import reward, Score

@reward(batch=1, processes=3)
def slow(samples):
    time.sleep(0.3)
    if samples[0].completion == "crash":
        os._exit(3)
    return [Score(1.0, info={"pid": os.getpid()}) for _ in samples]

@reward(batch=4, concurrency=8, processes=2)
async def paired(samples):
    Path("inside").open("a").write(f"{os.getpid()}+\\n")
    await asyncio.sleep(0.1)
    Path("inside").open("a").write(f"{os.getpid()}-\\n")
    return [1.0 for _ in samples]

@reward(batch=1, rate="1200/min")
async def paced(samples):
    return [time.time() for _ in samples]

@reward(cache=True, max_error_rate=1.0, retries=0)
def counted(samples, *, bonus: float = 0.0):
    with Path("calls").open("a") as file:
        file.write("x" * len(samples))
    if any(s.completion == "bad" for s in samples):
        raise RuntimeError("bad")
    return [Score(len(s.completion) + bonus, info={"text": s.completion}) for s in samples]

@reward(cache=True, scope="group")
def ranked(samples):
    with Path("calls").open("a") as file:
        file.write("x" * len(samples))
    order = sorted(len(s.completion) for s in samples)
    return [float(order.index(len(s.completion))) for s in samples]
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "mine.py").write_text(PLUGINS)
    return tmp_path


def score(
    folder: Path, name: str, texts: list[str], *, cache: bool = False, share: int = 1, **spec: object
) -> PoolResult:
    store = folder / "cache" / "rewards.sqlite" if cache else None
    one = PluginSpec(f"mine.py:{name}", **spec)  # type: ignore[arg-type]
    samples = [Sample(text, group_id=i // 2, sample_id=i % 2, row={"n": i // 2}) for i, text in enumerate(texts)]
    with RewardPool([one], folder, seed=0, cache=store, share=share) as pool:
        return pool.score_sync(samples)


def asked(folder: Path) -> int:
    """Samples that the plugin was asked for since the last time."""
    path = folder / "calls"
    count = len(path.read_text()) if path.exists() else 0
    path.unlink(missing_ok=True)
    return count


# ------------------------------------------------------------------------------------------------- processes, rates


def test_a_plugin_that_computes_runs_in_several_processes_at_once(folder: Path) -> None:
    result = score(folder, "slow", ["a", "b", "crash", "d", "e", "f"], options={"retries": 0, "max_error_rate": 1.0})
    assert [row[0] for row in result.scores] == [1.0, 1.0, None, 1.0, 1.0, 1.0]
    assert len({info["slow"]["pid"] for info in result.infos if info}) >= 3
    assert result.metrics["reward/slow/seconds"] < 0.3 * 6 * 0.9, "one after another it would be 1.8 s and more"
    assert result.metrics["reward/slow/restarts"] >= 1


def test_the_processes_of_a_plugin_share_its_concurrency(folder: Path) -> None:
    score(folder, "paired", ["x"] * 32)
    assert _most_inside(folder) == 2, "concurrency 8 in batches of 4 is two calls: one in each process"


def test_a_pool_that_is_one_of_several_keeps_to_its_share_of_concurrency_and_rate(folder: Path) -> None:
    score(folder, "paired", ["x"] * 16, share=2, options={"processes": 1})
    assert _most_inside(folder) == 1
    result = score(folder, "paced", ["x"] * 5, share=4, options={"rate": 20})
    assert result.metrics["reward/paced/seconds"] >= 4 / (20 / 4)


def _most_inside(folder: Path) -> int:
    inside = most = 0
    for line in (folder / "inside").read_text().splitlines():
        inside += 1 if line.endswith("+") else -1
        most = max(most, inside)
    (folder / "inside").unlink()
    return most


def test_a_rate_spaces_samples_evenly(folder: Path) -> None:
    result = score(folder, "paced", ["x"] * 12)
    times = sorted(row[0] for row in result.scores if row[0] is not None)
    assert times[-1] - times[0] >= 11 * 0.05 - 0.15, "1200/min is one every 0.05 s"
    assert result.metrics["reward/paced/seconds"] >= 0.55


@pytest.mark.parametrize(("rate", "value"), [(5, 5.0), (0.5, 0.5), ("600/min", 10.0), ("36 / h", 0.01), ("7/s", 7.0)])
def test_rates_are_read(rate: float | str, value: float) -> None:
    assert per_second(rate) == pytest.approx(value)


@pytest.mark.parametrize("rate", [0, -1, "fast", "5/day", "", True])
def test_rates_that_are_none_are_refused(rate: float | str) -> None:
    with pytest.raises(PluginError, match="rate"):
        per_second(rate)


def test_a_gate_serves_in_order_and_forgets_who_gave_up() -> None:
    async def run() -> list[str]:
        gate, done, hold = Gate(1, 2), [], asyncio.Event()

        async def call(name: str, alone: bool = False) -> None:
            async with gate.enter(alone):
                done.append(name)
                if name.startswith("hold"):
                    await hold.wait()

        tasks = [asyncio.create_task(call(n, n == "alone")) for n in ("hold-1", "hold-2", "alone", "gone", "last")]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert done == ["hold-1", "hold-2"]
        tasks[3].cancel()
        hold.set()
        await asyncio.gather(*tasks, return_exceptions=True)
        return done

    assert asyncio.run(run()) == ["hold-1", "hold-2", "alone", "last"]


def test_of_what_waits_only_the_samples_are_in_memory(folder: Path) -> None:
    async def run() -> int:
        pool = RewardPool([PluginSpec("mine.py:paired", options={"batch": 1, "processes": 1})], folder, 0)
        try:
            await pool.start()
            before = len(asyncio.all_tasks())
            scoring = asyncio.create_task(pool.score([Sample("x")] * 80))
            most = 0
            while not scoring.done():
                most = max(most, len(asyncio.all_tasks()) - before)
                await asyncio.sleep(0.005)
            assert all(row == [1.0] for row in scoring.result().scores)
            return most
        finally:
            pool.close()

    most = asyncio.run(run())
    assert 8 <= most < 8 * 4, "calls are at most twice the eight that run at once, each with a time limit of its own"


def test_seconds_of_every_call_are_told(folder: Path) -> None:
    result = score(folder, "slow", ["a", "b", "c", "d"])
    latencies = result.series["reward/slow/latency"]
    assert len(latencies) == 4 == result.metrics["reward/slow/calls"]
    assert all(0.3 <= seconds < 3 for seconds in latencies)


# ------------------------------------------------------------------------------------------------- cache


def test_scores_are_asked_for_once_and_their_infos_kept(folder: Path) -> None:
    first = score(folder, "counted", ["a", "bb", "ccc"], cache=True)
    assert asked(folder) == 3 and first.metrics["reward/counted/cache_hits"] == 0
    again = score(folder, "counted", ["a", "bb", "dddd"], cache=True)
    assert asked(folder) == 1 and again.metrics["reward/counted/cache_hits"] == 2
    assert again.scores == [[1.0], [2.0], [4.0]]
    assert [info["counted"]["text"] for info in again.infos] == ["a", "bb", "dddd"]
    score(folder, "counted", ["a", "bb"], cache=True, options={"cache": False})
    assert asked(folder) == 2, "a recipe may do without"
    score(folder, "counted", ["a", "bb"], cache=False)
    assert asked(folder) == 2, "and so does a pool that was given no file"


def test_arguments_version_source_and_row_each_make_another_score(folder: Path) -> None:
    score(folder, "counted", ["a"], cache=True)
    score(folder, "counted", ["a"], cache=True, args={"bonus": 1.0})
    assert asked(folder) == 2
    score(folder, "counted", ["x", "y", "a"], cache=True)
    assert asked(folder) == 3, "the third sample has the text of the first and another row"
    (folder / "mine.py").write_text(PLUGINS + "# another file\n")
    score(folder, "counted", ["a"], cache=True)
    assert asked(folder) == 1
    described = {"sha256": "s", "args": {}, "objectives": {}}
    keys = {plugin_key(PluginSpec("f.py:a"), described | {"version": v}) for v in ("1", "2")}
    assert len(keys) == 2


def test_failures_are_not_kept(folder: Path) -> None:
    for _ in range(2):
        result = score(folder, "counted", ["a", "bad"], cache=True)
        assert result.errors == {"counted": 1} and [row[0] for row in result.scores] == [1.0, None]
    asked(folder)
    result = score(folder, "counted", ["a", "bad"], cache=True)
    assert asked(folder) == 1 and result.metrics["reward/counted/cache_hits"] == 1


def test_of_a_group_plugin_whole_groups_are_kept(folder: Path) -> None:
    score(folder, "ranked", ["a", "bb", "ccc", "d"], cache=True)
    asked(folder)
    result = score(folder, "ranked", ["a", "bb", "ccc", "eeeeee"], cache=True)
    assert asked(folder) == 2 and [row[0] for row in result.scores] == [0.0, 1.0, 0.0, 1.0]


def test_a_plugin_without_source_cannot_be_cached(folder: Path) -> None:
    (folder / "odd.py").write_text("from rewards import reward\nexec('def f(samples): return [1.0]')\n")
    spec = PluginSpec("odd.py:f", options={"cache": True})
    with RewardPool([spec], folder, 0) as pool, pytest.raises(PluginError, match="its source is not known"):
        pool.score_sync([Sample("a")])


def test_the_file_of_the_cache_stays_within_its_bound_and_loses_the_oldest(tmp_path: Path) -> None:
    limit = 200_000

    async def fill() -> dict[bytes, object]:
        cache = ScoreCache(tmp_path / "c.sqlite", limit)
        keys = [sample_key(b"p", [Sample(str(n))]) or b"" for n in range(2000)]
        for key in keys:
            cache.put(key, {"values": [[1.0]], "infos": [{"reply": "x" * 300}]})
        await cache.flush()
        found = await cache.get(keys)
        cache.close()
        assert keys[-1] in found and keys[0] not in found
        return found

    found = asyncio.run(fill())
    assert 100 < len(found) < 600
    assert (tmp_path / "c.sqlite").stat().st_size < 3 * limit


def test_several_processes_write_one_cache_at_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_write, args=(tmp_path / "c.sqlite", n)) for n in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [w.exitcode for w in writers] == [0, 0, 0]
    with sqlite3.connect(tmp_path / "c.sqlite") as connection:
        assert connection.execute("SELECT count(*) FROM scores").fetchone() == (3 * 300,)


def _write(path: Path, number: int) -> None:
    async def run() -> None:
        cache = ScoreCache(path)
        for n in range(300):
            cache.put(f"{number}/{n}".encode(), {"values": [[1.0]], "infos": [{}]})
            if n % 10 == 0:
                await cache.flush()
        await cache.flush()
        assert cache.usable and len(await cache.get([f"{number}/{n}".encode() for n in range(300)])) == 300
        cache.close()

    asyncio.run(run())


def test_a_cache_that_is_no_database_costs_a_warning_and_no_score(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (folder / "cache").mkdir()
    (folder / "cache" / "rewards.sqlite").write_text("this is no database, " * 100)
    result = score(folder, "counted", ["a", "bb"], cache=True)
    assert result.scores == [[1.0], [2.0]] and not result.failures
    assert "no longer cached" in caplog.text


def test_what_is_kept_is_plain_json(folder: Path) -> None:
    score(folder, "counted", ["a"], cache=True)
    with sqlite3.connect(folder / "cache" / "rewards.sqlite") as connection:
        [(value,)] = connection.execute("SELECT value FROM scores").fetchall()
    assert json.loads(value) == {"values": [[1.0]], "infos": [{"text": "a"}]}


def test_a_kept_score_that_was_changed_is_had_anew_and_said(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert score(folder, "counted", ["a", "bb"], cache=True).scores == [[1.0], [2.0]]
    with sqlite3.connect(folder / "cache" / "rewards.sqlite") as connection:
        connection.execute("UPDATE scores SET value = replace(value, '[[2.0]]', '[[7.0]]')")
    assert score(folder, "counted", ["a", "bb"], cache=True).scores == [[1.0], [2.0]]
    assert "1 scores are not what was written" in caplog.text
    with sqlite3.connect(folder / "cache" / "rewards.sqlite") as connection:
        values = {value for (value,) in connection.execute("SELECT value FROM scores")}
    assert len(values) == 2 and not any("7.0" in value for value in values)


def test_a_score_under_another_key_is_not_taken(folder: Path) -> None:
    score(folder, "counted", ["a", "bb"], cache=True)
    with sqlite3.connect(folder / "cache" / "rewards.sqlite") as connection:
        (one, first), (two, second) = connection.execute("SELECT key, value FROM scores").fetchall()
        connection.executemany("UPDATE scores SET value = ? WHERE key = ?", [(second, one), (first, two)])
    assert score(folder, "counted", ["a", "bb"], cache=True).scores == [[1.0], [2.0]]


def test_a_cache_of_a_version_without_digests_is_begun_anew(folder: Path) -> None:
    (folder / "cache").mkdir()
    with sqlite3.connect(folder / "cache" / "rewards.sqlite") as connection:
        connection.execute(
            "CREATE TABLE scores (number INTEGER PRIMARY KEY, key BLOB NOT NULL UNIQUE, value TEXT NOT NULL)"
        )
        connection.execute("INSERT INTO scores (key, value) VALUES (x'00', '{}')")
    assert score(folder, "counted", ["a"], cache=True).scores == [[1.0]]
    with sqlite3.connect(folder / "cache" / "rewards.sqlite") as connection:
        assert connection.execute("SELECT count(*) FROM scores WHERE digest IS NOT NULL").fetchone() == (1,)
