"""How long the simulator takes: 1,000 engines, 100,000 groups of 8, one staleness. The goal is a minute.

python -m tests.bench.simulator [--engines 1000 --groups 1000 --steps 100 --group-size 8 --staleness 1]
    [--failures]    each engine fails once in an hour of virtual time
    [--record]      write the figures to tests/bench/results/
"""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

from align.simulate.lengths import LogNormal
from align.simulate.stage import simulate
from align.simulate.workload import NEVER, EngineModel, Workload
from tests.bench import common

GOAL_S = 60.0


def main(words: list[str]) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", type=int, default=1000)
    parser.add_argument("--groups", type=int, default=1000, help="of a step")
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--staleness", type=int, default=1)
    parser.add_argument("--failures", action="store_true")
    parser.add_argument("--record", action="store_true")
    arguments = parser.parse_args(words)
    work = Workload(
        groups=arguments.groups,
        group_size=arguments.group_size,
        engines=arguments.engines,
        engine=EngineModel.of(50.0, 4000.0, 128, prompt_s=0.05),
        lengths=LogNormal(1000, 1.0, limit=8192, group_size=arguments.group_size),
        reward_s=1.0,
        train_s=60.0,
        publish_s=2.0,
        between_failures_s=3600.0 if arguments.failures else NEVER,
        restart_s=60.0,
    )
    started = time.perf_counter()
    found = simulate(work, arguments.staleness, turns=arguments.steps)
    seconds = time.perf_counter() - started
    groups = arguments.groups * arguments.steps
    print(f"{groups} groups on {arguments.engines} engines: {seconds:.1f} s, {1e3 * seconds / groups:.3f} ms a group")
    print(f"goal: {GOAL_S:g} s: {'met' if seconds <= GOAL_S else 'missed'}")
    figures = {**vars(arguments), "wall_s": seconds, "virtual_s": found.step_s * found.steps, "totals": found.totals}
    if arguments.record:
        common.write_result(
            "simulator",
            goal=f"{groups} groups on {arguments.engines} engines are simulated within {GOAL_S:g} s",
            met=seconds <= GOAL_S,
            figures=figures,
            started=started,
        )
    return figures


if __name__ == "__main__":
    main(sys.argv[1:])
