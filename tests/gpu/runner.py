"""Steps one after another, each in a process of its own that is ended at its limit, the results written after each.

A step is a function of a `Context`, which writes what it has found so far whenever there is more; a step that is ended
leaves that. Results and log are two files, rewritten and appended as they come: a machine that is taken away in the
middle leaves everything up to then.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
LEAST = 5.0  # seconds: with less left no step begins
POLL = 0.2


@dataclass(frozen=True)
class Step:
    """function: "module:name", called with a Context; limit: seconds; needs: packages that it imports."""

    name: str
    about: str
    function: str
    limit: float
    options: Mapping[str, Any] = field(default_factory=dict)
    needs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Context:
    """What a step is given. found: where it writes its figures; work: a folder for models, kept between steps; earlier:
    the figures of the steps before, by name."""

    found: Path
    work: Path
    toy: bool
    options: Mapping[str, Any]
    earlier: Mapping[str, Any]

    @property
    def device(self) -> str:
        return "cpu" if self.toy else "cuda"

    def write(self, figures: Mapping[str, Any]) -> None:
        """Figures so far, whole or not at all. "checks": {words: whether it holds} decides whether the step passes."""
        aside = self.found.with_suffix(".partial")
        aside.write_text(json.dumps(figures, indent=1), encoding="utf-8")
        aside.replace(self.found)


@dataclass
class Results:
    """The file of a run: what it ran on, and of each step its state, seconds and figures."""

    path: Path
    about: dict[str, Any]
    steps: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def new(cls, folder: Path, about: dict[str, Any]) -> Results:
        folder.mkdir(parents=True, exist_ok=True)
        today, number = datetime.datetime.now(datetime.UTC).date().isoformat(), 1
        while (path := folder / f"{today}-gpu{f'-{number}' if number > 1 else ''}.json").exists():
            number += 1
        made = cls(path, about)
        made.write()
        return made

    @property
    def log(self) -> Path:
        return self.path.with_suffix(".log")

    def set(self, step: Step, state: str, seconds: float, figures: Any) -> None:
        self.steps[step.name] = {"state": state, "seconds": round(seconds, 1), "about": step.about, "figures": figures}
        self.write()

    def write(self) -> None:
        aside = self.path.with_suffix(".partial")
        aside.write_text(json.dumps({**self.about, "steps": self.steps}, indent=1) + "\n", encoding="utf-8")
        aside.replace(self.path)

    @property
    def passed(self) -> bool:
        """Nothing failed, was ended or found no time; what lacks a package is named and fails nothing."""
        return all(found["state"] == "passed" or found["state"].startswith("skipped") for found in self.steps.values())


def run_all(
    steps: Sequence[Step],
    results: Results,
    *,
    seconds: float,
    work: Path,
    toy: bool,
    site: Path | None = None,
    temporary: Path | None = None,
) -> bool:
    """Run them in order until `seconds` are over; whether all passed. site: a folder of packages carried along;
    temporary: where the steps' temporary files go (compiled kernels: no folder that nothing may be run from)."""
    until = time.monotonic() + seconds
    for step in steps:
        missing = [name for name in step.needs if not installed(name, site)]
        left = until - time.monotonic()
        if missing:
            results.set(step, f"skipped: no {', '.join(missing)} here", 0, None)
        elif left < LEAST:
            results.set(step, "not run: no time left", 0, None)
        else:
            variables = environment(site, temporary)
            run_one(step, results, limit=min(step.limit, left), work=work, toy=toy, environment=variables)
        found = results.steps[step.name]
        print(f"{step.name}: {found['state']} ({found['seconds']:.0f} s)", flush=True)
    return results.passed


def run_one(
    step: Step, results: Results, *, limit: float, work: Path, toy: bool, environment: Mapping[str, str]
) -> None:
    started = time.monotonic()
    begun_at = results.log.stat().st_size if results.log.exists() else 0
    found = work / f"{step.name}.json"
    found.unlink(missing_ok=True)
    context = Context(found, work, toy, step.options, results.steps)
    told = work / f"{step.name}.context.json"
    told.write_text(json.dumps({**asdict(context), "found": str(found), "work": str(work)}), encoding="utf-8")
    with results.log.open("a", encoding="utf-8") as log:
        print(f"\n=== {step.name}: {step.about} (at most {limit:.0f} s)", file=log, flush=True)
        child = subprocess.Popen(
            [sys.executable, "-m", "tests.gpu.child", step.function, str(told)], cwd=ROOT, env=environment,
            stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            seen = 0
            while (in_time := time.monotonic() - started < limit) and not _over(child):
                time.sleep(POLL)
                if found.exists() and (written := found.stat().st_mtime_ns) != seen:
                    seen = written
                    results.set(step, "running", time.monotonic() - started, _read(found))
        finally:
            # before it is waited for, so that its number is still its own; what it started goes with it
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            code = child.wait()
    ended = f"failed (exit status {code})" if in_time else f"ended at its limit, {limit:.0f} s"
    state = "passed" if code == 0 and in_time else ended
    results.set(step, state, time.monotonic() - started, _read(found))
    if state != "passed":
        with results.log.open(encoding="utf-8", errors="replace") as log:
            log.seek(begun_at)
            print("\n".join(f"  | {line}" for line in log.read().splitlines()[-12:]), flush=True)


def _over(child: subprocess.Popen[bytes]) -> bool:
    """Whether it has ended, without taking its number from it."""
    return os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _read(found: Path) -> Any:
    return json.loads(found.read_text(encoding="utf-8")) if found.exists() else None


def environment(site: Path | None, temporary: Path | None) -> dict[str, str]:
    before = [str(site)] if site else []
    path = [*before, str(ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path),
        **({"TMPDIR": str(temporary)} if temporary else {}),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
    }


def installed(name: str, site: Path | None) -> bool:
    carried = site is not None and PathFinder.find_spec(name, [str(site)]) is not None
    return carried or importlib.util.find_spec(name) is not None
