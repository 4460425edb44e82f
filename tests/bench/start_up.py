"""Seconds of `align run` that are no training: whole runs of one step on a model of a few thousand parameters, by this
tree and by another checkout or commit.

    python -m tests.bench.start_up --against COMMIT [--repeats 3] [--record]

sft: one update. online: one step with vLLM. exam: two models of the same run, judged with vLLM. Almost all of it is
processes that start and load their libraries; trees take turns, and the ratio is per round.
"""

from __future__ import annotations

import argparse
import functools
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests import runs
from tests.bench import common
from tests.prove import entry

GOAL = 1.3
KINDS = ("sft", "online", "exam")


def stages(kind: str) -> list[dict[str, Any]]:
    learn = runs.sft(steps=1, eval=None)
    if kind == "sft":
        return [learn]
    if kind == "online":
        return [runs.grpo(**{"from": None}, steps=1, eval=None)]
    exam = {
        "id": "exam", "kind": "evaluate", "of": ["sft", "again"], "data": "sums.jsonl",
        "rewards": [{"use": "rewards.py:correct"}], "rollout": {"max_tokens": 8, "temperature": 0.0},
    }  # fmt: skip
    return [learn, runs.sft(id="again", steps=1, eval=None), exam]


def one_run(tree: Path, folder: Path, kind: str) -> None:
    """`align run` by the code of `tree`."""
    recipe = runs.write_recipe(folder, kind, stages(kind))
    environment = os.environ | {"PYTHONPATH": str(tree)}
    command = [sys.executable, "-m", "align.cli.main", "run", str(recipe)]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"refused: {kind} by {tree.name} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    shutil.rmtree(folder / "runs" / kind)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run and print; returns what is recorded."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", required=True, help="another checkout's folder, or a commit of this one")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--record", action="store_true", help="write the result")
    arguments = parser.parse_args(argv)
    started = time.perf_counter()
    figures: dict[str, Any] = {"against": arguments.against}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        other = entry.unpacked(arguments.against, folder / "other")
        runs.write_data(folder)
        for kind in arguments.kinds:
            sides = {
                side: functools.partial(one_run, tree, folder, kind)
                for side, tree in (("ours", entry.CHECKOUT), ("before", other))
            }
            rounds = common.alternate(sides, arguments.repeats)
            ratio = rounds.ratio("ours", "before")
            print(f"{kind}: {rounds.median('ours'):.1f} s, before {rounds.median('before'):.1f} s: ", end="")
            print(common.describe_ratio(ratio))
            figures[kind] = {"seconds": rounds.seconds, "ratio": ratio}
    if arguments.record:
        met = all(figures[kind]["ratio"]["median"] >= GOAL for kind in arguments.kinds)
        goal = f"whole runs of one step start and end {GOAL} times as fast as before"
        common.write_result("start-up", goal=goal, met=met, figures=figures, started=started)
    return figures


if __name__ == "__main__":
    main()
