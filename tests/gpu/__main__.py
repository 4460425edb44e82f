"""All that is worth knowing from a GPU that is had for minutes, in order of worth.

    python -m tests.gpu --minutes 8 --wheels FOLDER     on that machine; the wheels: tests/gpu/wheels.py
    python -m tests.gpu --toy                           every step at toy sizes on a CPU
    python -m tests.gpu --list                          the steps, with their limits
    python -m tests.gpu --only attention,parts

Each step runs in a process of its own, which is ended at its limit. Results (<date>-gpu.json) and the steps' output
(<date>-gpu.log) are written into --out as they come; without it, into $OUT, or tests/gpu/results. Exit status: 0 where
every step passed or lacked a package, 1 where one failed, was ended or found no time, 2 where there is no GPU.
"""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.bench.common import columns
from tests.gpu import versions, wheels
from tests.gpu.runner import Results, Step, run_all
from tests.gpu.steps import STEPS, TOY_LIMIT


def main(argv: Sequence[str] | None = None) -> int:
    started = time.monotonic()
    arguments = parse(argv)
    steps = chosen(arguments.only)
    if arguments.list:
        print(columns([[step.name, f"{step.limit:.0f} s", step.about] for step in steps]))
        return 0
    device = device_of(arguments.toy)
    if device is None:
        print("error: torch sees no GPU here; `--toy` runs every step at a toy size on the CPU", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the step in progress is ended too
    if arguments.toy:
        steps = [replace(step, limit=TOY_LIMIT * step.limit) for step in steps]
    with (
        tempfile.TemporaryDirectory(prefix="tests-gpu-") as temporary,
        tempfile.TemporaryDirectory(prefix="tests-gpu-models-", dir=roomy(arguments.toy)) as work,
    ):
        site = None
        if arguments.wheels is not None:
            site = Path(temporary) / "site"
            wheels.install(arguments.wheels, site)
        have = versions.installed(site)
        off = versions.warnings_of(have, versions.TOLD)
        for line in off:
            print(f"warning: {line}")
        about = {
            "device": device,
            "toy": arguments.toy,
            "minutes": arguments.minutes,
            "versions": {name: have[name] for name in versions.TOLD if name in have},
            "warnings": off,
        }
        results = Results.new(arguments.out, about)
        left = arguments.minutes * 60 - (time.monotonic() - started)
        passed = run_all(
            steps, results, seconds=left, work=Path(work), toy=arguments.toy, site=site, temporary=Path(temporary)
        )
    print(table(results.steps))
    print(f"written: {results.path} and {results.log}")
    return 0 if passed else 1


def device_of(toy: bool) -> str | None:
    if toy:
        return "cpu"
    torch: Any = importlib.import_module("torch")
    return str(torch.cuda.get_device_name()) if torch.cuda.is_available() else None


def roomy(toy: bool) -> Path | None:
    """A folder in memory for models, where there is enough of it; None: wherever temporary files are."""
    memory, least = Path("/dev/shm"), 40 << 30
    if toy or not memory.is_dir():
        return None
    found = os.statvfs(memory)
    return memory if found.f_bavail * found.f_frsize > least else None


def chosen(only: str | None) -> list[Step]:
    names = [step.name for step in STEPS] if only is None else only.split(",")
    by_name = {step.name: step for step in STEPS}
    unknown = [name for name in names if name not in by_name]
    if unknown:
        raise SystemExit(f"error: no step {', '.join(unknown)}; there are {', '.join(by_name)}")
    return [by_name[name] for name in names]


def table(steps: Mapping[str, Mapping[str, Any]]) -> str:
    """A line a step, and one for each comparison in it."""
    rows = [["step", "seconds", "state", "", "ratio", "MFU", "GiB"]]
    for name, found in steps.items():
        rows.append([name, f"{found['seconds']:.0f}", found["state"]])
        for length, case in ((found["figures"] or {}).get("cases") or {}).items():
            (mine, theirs), (ours, other) = case["sides"].values(), case["sides"]
            mfu = f"{mine['share_of_peak']:.1%} / {theirs['share_of_peak']:.1%}"
            memory = f"{mine['peak_memory_gib']:.1f} / {theirs['peak_memory_gib']:.1f}"
            rows.append(["", "", f"  at {length}", f"{ours} / {other}", f"{case['ratio']['median']:.2f}x", mfu, memory])
    return columns(rows)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    here = Path(__file__).resolve().parent / "results"
    parser = argparse.ArgumentParser(
        prog="python -m tests.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=60.0, help="of all steps together")
    parser.add_argument("--only", help="names of steps, with commas between, in this order")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("--wheels", type=Path, help="a folder of wheels to unpack for the steps")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT") or here))
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
