"""How many solutions the reward `code` judges in a second, through the reward pool. The goal is 20 on two cores.

python -m tests.bench.sandbox [--rounds 3 --concurrency N]
    [--data FOLDER]    the folder of real data sets; default: shared/data beside the checkout
    [--record]         write the figures to tests/bench/results/
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

from rewards import Sample
from rewards.plugin import PluginSpec
from rewards.pool import RewardPool
from tests.bench import common
from tests.unit.rewards import humaneval

GOAL = 20.0
DATA = Path(__file__).resolve().parents[3] / "shared" / "data"


def main(words: list[str]) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--concurrency", type=int, default=len(os.sched_getaffinity(0)), help="solutions at once")
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--record", action="store_true")
    arguments = parser.parse_args(words)
    started = time.perf_counter()
    rows = humaneval.rows(arguments.data)
    samples = [Sample(row["canonical_solution"], row=row) for row in rows]
    options = {"concurrency": arguments.concurrency, "on_error": "fail"}
    rates = []
    with RewardPool([PluginSpec("code", options=options)], Path("/"), 0) as pool:
        pool.score_sync(samples[:4])
        for number in range(arguments.rounds):
            begun = time.perf_counter()
            result = pool.score_sync(samples)
            rates.append(len(samples) / (time.perf_counter() - begun))
            passed = sum(s == [1.0] for s in result.scores)
            print(f"round {number + 1}: {rates[-1]:.1f} solutions/s, {passed} of {len(samples)} pass")
    met = median(rates) >= GOAL and passed == len(samples)
    print(f"{median(rates):.1f} solutions/s; goal {GOAL:g}: {'met' if met else 'missed'}")
    figures = {
        "solutions": len(samples), "passed": passed, "concurrency": arguments.concurrency,
        "solutions_per_s": {"median": median(rates), "min": min(rates), "max": max(rates)},
    }  # fmt: skip
    if arguments.record:
        common.write_result(
            "sandbox",
            goal=f"HumanEval's canonical solutions are judged at {GOAL:g} a second or more, and all pass",
            met=met,
            figures=figures,
            started=started,
        )
    return figures


if __name__ == "__main__":
    main(sys.argv[1:])
