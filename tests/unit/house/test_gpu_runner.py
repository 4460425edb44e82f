"""The runner for a GPU that is had for minutes: what it writes when, and what it does with steps that hang or fail."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from tests.gpu import __main__ as command
from tests.gpu import versions, wheels
from tests.gpu.runner import Context, Results, Step, run_all
from tests.gpu.steps import STEPS

HERE = "tests.unit.house.test_gpu_runner"


def hang(context: Context) -> None:
    """Writes the number of a process that it starts, and never ends."""
    child = subprocess.Popen(["sleep", "600"])
    context.write({"child": child.pid, "checks": {"begun": True}})
    time.sleep(600)


def quick(context: Context) -> None:
    context.write({"earlier": sorted(context.earlier), "option": context.options["option"], "checks": {"ran": True}})


def wrong(context: Context) -> None:
    context.write({"checks": {"equal": False, "ran": True}})


def silent(context: Context) -> None:
    """Checks nothing."""


def broken(context: Context) -> None:
    context.write({"half": 1})
    raise ValueError("what broke")


def step(name: str, **more: object) -> Step:
    made = Step(name, f"about {name}", f"{HERE}:{name}", 60, {"option": 7})
    return replace(made, **more)  # type: ignore[arg-type]


def run(folder: Path, *steps: Step, seconds: float = 120) -> tuple[bool, dict[str, dict]]:
    (folder / "work").mkdir()
    results = Results.new(folder / "out", {"device": "none"})
    passed = run_all(steps, results, seconds=seconds, work=folder / "work", toy=True)
    return passed, json.loads(results.path.read_text())["steps"]


def alive(number: int) -> bool:
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{number}/stat").read_text().split()[2] != "Z"


@pytest.mark.slow
def test_a_step_that_hangs_is_ended_with_what_it_started_and_the_next_one_runs(tmp_path: Path) -> None:
    passed, found = run(tmp_path, step("hang", limit=20), step("quick"))
    assert not passed
    assert found["hang"]["state"] == "ended at its limit, 20 s" and 20 <= found["hang"]["seconds"] < 60
    assert found["hang"]["figures"]["checks"] == {"begun": True}
    assert not alive(found["hang"]["figures"]["child"])
    assert found["quick"]["state"] == "passed"
    assert found["quick"]["figures"] == {"earlier": ["hang"], "option": 7, "checks": {"ran": True}}


@pytest.mark.slow
def test_what_fails_is_told_with_its_last_lines_and_what_it_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    passed, found = run(tmp_path, step("broken"), step("wrong"), step("silent"))
    assert not passed
    assert [one["state"] for one in found.values()] == ["failed (exit status 1)"] * 3
    assert found["broken"]["figures"] == {"half": 1} and found["silent"]["figures"] is None
    printed = capsys.readouterr().out
    assert "  | ValueError: what broke" in printed and "  |   FAILED: equal" in printed


def test_a_step_without_its_package_is_skipped_and_one_without_time_is_not_run(tmp_path: Path) -> None:
    passed, found = run(tmp_path, step("quick", needs=("json", "no_such_package")), seconds=0)
    assert passed and found["quick"]["state"] == "skipped: no no_such_package here"
    (tmp_path / "other").mkdir()
    passed, found = run(tmp_path / "other", step("quick"), seconds=0)
    assert not passed and found["quick"]["state"] == "not run: no time left"


@pytest.mark.slow
def test_a_toy_run_of_a_cheap_step_writes_its_results_and_the_log(tmp_path: Path) -> None:
    arguments = ["--toy", "--only", "parts", "--out", str(tmp_path)]
    assert command.main(arguments) == 0
    [path] = tmp_path.glob("*-gpu.json")
    found = json.loads(path.read_text())
    assert found["device"] == "cpu" and found["toy"] and found["versions"]["torch"]
    parts = found["steps"]["parts"]
    assert parts["state"] == "passed" and set(parts["figures"]["errors"]) == {
        "head",
        "feed-forward",
        "norm",
        "rotation",
    }
    assert "=== parts: " in path.with_suffix(".log").read_text()


def test_without_a_gpu_it_says_so_and_exits_with_2() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.gpu"], capture_output=True, text=True, timeout=120,
        cwd=Path(__file__).resolve().parents[3], env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "") and "`--toy`" in done.stderr


def test_steps_are_listed_and_an_unknown_one_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [one.name for one in STEPS]
    with pytest.raises(SystemExit, match="no step fast; there are attention, parts"):
        command.main(["--only", "fast"])


def test_versions_that_are_off_are_named_and_others_are_not() -> None:
    have = {"torch": "2.11.0", "transformers": "5.17.0", "pydantic": "2.14.4", "triton": "3.6.0"}
    assert versions.warnings_of(have, [*have, "peft"]) == [
        f"torch 2.11.0, verified with {versions.wanted()['torch']}",
        f"transformers 5.17.0, verified with {versions.wanted()['transformers']}",
    ]


def test_wheels_that_cannot_be_carried_are_refused(tmp_path: Path) -> None:
    for name, size in (("small", 1 << 20), ("large", 63 << 20)):
        with (tmp_path / f"{name}-1-py3-none-any.whl").open("wb") as wheel:
            wheel.truncate(size)
        if name == "small":
            assert wheels.size_of(tmp_path) == 1 << 20
    with pytest.raises(SystemExit, match=r"64\.0 MiB together, at most 64"):
        wheels.size_of(tmp_path)
    with pytest.raises(SystemExit, match="no wheels in"):
        wheels.install(tmp_path / "nowhere", tmp_path / "site")
