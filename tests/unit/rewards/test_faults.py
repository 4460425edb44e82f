"""A plugin can go wrong in any way it likes: it costs the samples that cause it, and nothing else."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rewards import RewardError, Sample
from rewards.plugin import PluginSpec
from rewards.pool import PoolResult, RewardPool

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
TOLERANT = {"retries": 0, "max_error_rate": 1.0}


def samples(count: int, bad: int | None = None) -> list[Sample]:
    return [
        Sample("bad" if i == bad else f"fine {i}", group_id=i // 4, sample_id=i % 4, row={"n": i}) for i in range(count)
    ]


def pool(*names: str, log_folder: Path | None = None, **options: object) -> RewardPool:
    specs = [PluginSpec(f"faulty.py:{name}", options={**TOLERANT, **options}) for name in names]
    return RewardPool(specs, HERE, seed=0, log_folder=log_folder)


def column(result: PoolResult) -> list[float | None]:
    return [row[0] for row in result.scores]


FAULTS = {
    "raises": "raised",
    "not_a_number": "not_finite",
    "infinite": "not_finite",
    "beyond_float32": "not_finite",
    "text": "wrong_type",
    "wrong_name": "unknown_objective",
    "missing_name": "missing_objective",
    "ranged": "out_of_range",
    "python_loop": "timeout",
    "loop_holding_the_gil": "timeout",
    "sleeps": "timeout",
    "exits": "crashed",
    "sys_exits": "raised",
    "segfaults": "crashed",
    "eats_memory": "raised",
    "never_awaits": "timeout",
    "awaits_forever": "timeout",
    "exits_while_others_wait": "crashed",
    "async_raises": "raised",
}


@pytest.mark.parametrize(("name", "cause"), FAULTS.items())
def test_a_fault_costs_its_sample_alone_and_the_pool_lives_on(name: str, cause: str) -> None:
    with pool(name) as rewards:
        result = rewards.score_sync(samples(4, bad=2))
        assert column(result) == [1.0, 1.0, None, 1.0]
        assert [(f.index, f.cause) for f in result.failures] == [(2, cause)]
        assert result.errors == {name: 1}
        assert result.metrics[f"reward/{name}/error_rate"] == 0.25
        assert column(rewards.score_sync(samples(4))) == [1.0] * 4


def test_a_wrong_number_of_results_costs_its_whole_call_for_nobody_knows_whose_they_are() -> None:
    with pool("wrong_length", batch=4) as rewards:
        result = rewards.score_sync(samples(8, bad=2))
        assert column(result) == [None] * 4 + [1.0] * 4
        assert {f.cause for f in result.failures} == {"wrong_length"} and result.metrics[
            "reward/wrong_length/calls"
        ] == 2


def test_one_poisoned_sample_of_64_leaves_63_scores() -> None:
    with pool("exits") as rewards:
        result = rewards.score_sync(samples(64, bad=41))
        assert [i for i, value in enumerate(column(result)) if value is None] == [41]
        assert sum(value == 1.0 for value in column(result)) == 63
        assert result.failures[0].group_id == 10 and result.failures[0].sample_id == 1


def test_a_failing_plugin_does_not_disturb_the_others() -> None:
    with pool("segfaults", "python_loop", "prints_a_lot") as rewards:
        result = rewards.score_sync(samples(4, bad=0))
        assert result.scores == [[None, None, 1.0]] + [[1.0, 1.0, 1.0]] * 3


def test_what_a_plugin_prints_goes_to_its_log_and_not_into_the_protocol(tmp_path: Path) -> None:
    with pool("prints_a_lot", log_folder=tmp_path) as rewards:
        assert column(rewards.score_sync(samples(4))) == [1.0] * 4
    assert "noise" in (tmp_path / "0-prints_a_lot.log").read_text(errors="replace")


def test_failures_are_written_with_their_sample(tmp_path: Path) -> None:
    with pool("raises", log_folder=tmp_path) as rewards:
        rewards.score_sync(samples(4, bad=3))
    line = (tmp_path / "failures.jsonl").read_text()
    assert '"completion": "bad"' in line and "the judge is out" in line and "faulty.py" in line


def test_when_everything_fails_the_run_stops_and_shows_the_first_errors() -> None:
    with pool("always_raises", max_error_rate=0.02) as rewards:
        started = time.monotonic()
        with pytest.raises(RewardError, match="nothing works") as caught:
            rewards.score_sync(samples(512))
        assert "always_raises failed on 11 of 512" in str(caught.value)
        assert str(caught.value).count("group ") == 5
        assert time.monotonic() - started < 5


def test_failures_within_the_budget_are_counted_and_one_more_stops() -> None:
    some = [Sample("bad" if i < 2 else "fine") for i in range(100)]
    with pool("not_a_number", max_error_rate=0.02) as rewards:
        assert rewards.score_sync(some).errors == {"not_a_number": 2}
        with pytest.raises(RewardError, match="3 of 100"):
            rewards.score_sync([*some[:99], Sample("bad")])


def test_a_budget_of_zero_allows_no_failure() -> None:
    with pool("not_a_number", max_error_rate=0.0) as rewards, pytest.raises(RewardError):
        rewards.score_sync(samples(4, bad=0))


def test_on_error_fail_stops_at_the_first() -> None:
    with pool("raises", on_error="fail") as rewards:
        with pytest.raises(RewardError, match="on_error is `fail`"):
            rewards.score_sync(samples(8, bad=5))
        assert column(rewards.score_sync(samples(4))) == [1.0] * 4


def test_on_error_floor_gives_its_value_and_still_counts() -> None:
    with pool("raises", on_error="floor(-2.5)") as rewards:
        result = rewards.score_sync(samples(4, bad=1))
        assert column(result) == [1.0, -2.5, 1.0, 1.0]
        assert result.errors == {"raises": 1}


def test_on_error_drop_group_takes_every_score_of_the_group() -> None:
    with pool("raises", on_error="drop_group") as rewards:
        result = rewards.score_sync(samples(12, bad=5))
        assert result.dropped == (1,)
        assert [i for i, value in enumerate(column(result)) if value is None] == [4, 5, 6, 7]


def test_a_group_plugin_sees_whole_groups_and_fails_by_group() -> None:
    with pool("group_rank") as rewards:
        mixed = [Sample("x" * (i + 1), group_id=i % 3, sample_id=i // 3) for i in range(9)]
        assert column(rewards.score_sync(mixed)) == [0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 2.0, 2.0, 2.0]
        result = rewards.score_sync(samples(8, bad=6))
        assert [f.index for f in result.failures] == [4, 5, 6, 7]
        assert None not in column(result)[:4]


def test_a_sample_that_fails_once_is_tried_again(tmp_path: Path) -> None:
    (tmp_path / "flaky.py").write_text(
        "from pathlib import Path\n"
        "def flaky(samples):\n"
        "    mark = Path('tried')\n"
        "    if not mark.exists():\n"
        "        mark.touch()\n"
        "        raise OSError('try again')\n"
        "    return [0.5] * len(samples)\n"
    )
    with RewardPool([PluginSpec("flaky.py:flaky", options={"retries": 1})], tmp_path, seed=0) as rewards:
        result = rewards.score_sync([Sample("a")])
        assert column(result) == [0.5] and not result.failures
        assert result.metrics["reward/flaky/retries"] == 1


def test_scores_can_be_asked_for_concurrently() -> None:
    async def both() -> list[PoolResult]:
        rewards = pool("exits_while_others_wait")
        try:
            return list(await asyncio.gather(*(rewards.score(samples(4, bad=b)) for b in (1, None, 2))))
        finally:
            rewards.close()

    assert [column(r) for r in asyncio.run(both())] == [[1, None, 1, 1], [1, 1, 1, 1], [1, 1, None, 1]]


def test_calls_of_one_step_share_its_error_budget_and_the_next_step_has_its_own() -> None:
    """A share of 5 % of a step of 40 samples: two may fail, in however many calls the step is scored."""

    async def calls(step: int, bad: list[int | None]) -> list[float]:
        results = [await rewards.score(samples(4, bad=b), budget=(step, 40)) for b in bad]
        return [result.metrics["reward/raises/error_rate"] for result in results]

    async def run() -> None:
        assert await calls(0, [1, None, 2]) == [0.25, 0.0, 0.25]
        assert await calls(1, [0, 3]) == [0.25, 0.25]
        with pytest.raises(RewardError, match=r"failed on 3 of 40 samples so far.*allows \(2\)"):
            await calls(0, [None, 3])

    rewards = pool("raises", max_error_rate=0.05)
    try:
        asyncio.run(run())
    finally:
        rewards.close()


def test_a_restart_is_told_by_one_of_the_calls_that_ran_together() -> None:
    async def run() -> tuple[float, int]:
        rewards = pool("exits")
        try:
            results = await asyncio.gather(*(rewards.score(samples(4, bad=b)) for b in (1, None, None)))
            return sum(r.metrics["reward/exits/restarts"] for r in results), rewards._teams[0].starts
        finally:
            rewards.close()

    told, starts = asyncio.run(run())
    assert told == starts - 1 > 0


def test_plugins_die_with_the_process_that_holds_the_pool(tmp_path: Path) -> None:
    (tmp_path / "hang.py").write_text(
        "import os, re\n"
        "from pathlib import Path\n"
        "def hang(samples):\n"
        "    Path('pid').write_text(str(os.getpid()))\n"
        "    re.match('(a+)+$', 'a' * 60 + 'b')\n"
    )
    driver = (
        "from rewards.pool import RewardPool; from rewards.plugin import PluginSpec; from rewards import Sample\n"
        f"RewardPool([PluginSpec('hang.py:hang')], {str(tmp_path)!r}, 0).score_sync([Sample('a')])"
    )
    env = {**os.environ, "TMPDIR": str(tmp_path)}  # nobody is left to remove what is temporary
    process = subprocess.Popen([sys.executable, "-c", driver], cwd=HERE.parents[2], env=env)
    deadline = time.monotonic() + 30
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        assert time.monotonic() < deadline, "the plugin never started"
        time.sleep(0.05)
    child = int((tmp_path / "pid").read_text())
    process.kill()
    process.wait()
    while os.path.exists(f"/proc/{child}") and "State:\tZ" not in Path(f"/proc/{child}/status").read_text():
        assert time.monotonic() < deadline, "the plugin outlived its parent"
        time.sleep(0.05)


def test_what_a_plugin_leaves_in_its_temporary_folder_goes_with_the_pool(tmp_path: Path) -> None:
    source = (
        "import tempfile\n"
        "from rewards import Score, reward\n"
        "@reward\n"
        "def untidy(samples):\n"
        "    folders = [tempfile.mkdtemp() for s in samples]\n"
        "    return [Score(0.0, info={'folder': folder}) for folder in folders]\n"
    )
    (tmp_path / "untidy.py").write_text(source)
    with RewardPool([PluginSpec("untidy.py:untidy")], tmp_path, seed=0) as running:
        result = running.score_sync(samples(3))
        folders = [Path(info["untidy"]["folder"]) for info in result.infos]
        assert len(set(folders)) == 3 and all(folder.is_dir() for folder in folders)
    assert not any(folder.exists() or folder.parent.exists() for folder in folders)


def test_close_ends_every_process() -> None:
    rewards = pool("raises", "never_awaits")
    rewards.score_sync(samples(4))
    pids = [w._connection.process.pid for t in rewards._teams for w in t.workers if w._connection is not None]
    assert len(pids) == 2
    rewards.close()
    assert not any(os.path.exists(f"/proc/{pid}") for pid in pids)
    rewards.close()
