"""kill -9 of one of two engines, ten times at random moments of an online stage: the run ends right.

    python -m tests.prove engine_failures

Right: every group of every turn is trained exactly once, none is older than `staleness` allows, trainer and engines
agree on every token as they do in a run without kills, and nothing is left behind. A kill costs less than two engine
start-ups of time, measured in the same run, over steps at the pace of the run without kills. ALIGN_PROVE_KILLS sets the
kills (default 10), ALIGN_PROVE_STALENESS what is proved (default 0,1).
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil

from align.stages import processes
from tests.prove.entry import record
from tests.runs import GONE_S, family, folders_of, grpo, metrics, rollouts, run, started, write_data, write_recipe

ENGINE = "ray::EngineWorker"
GROUPS, GROUP_SIZE = 8, 4
STEPS_PER_KILL = 80  # as long as a moment's choice and an engine's start take on a busy machine
PATIENCE_S = 300.0
ROUNDING = 1e-3  # mismatch/kl


def stage(steps: int, staleness: int) -> dict[str, Any]:
    """Completions stay long enough to be killed in the middle of."""
    rollout = {"workers": 2, "max_tokens": 24, "heartbeat_s": 10, "truncated": "keep"}
    changes = {"from": None, "adapter": {"kind": "lora", "rank": 4, "alpha": 8}, "staleness": staleness}
    return grpo(**changes, rollout=rollout, optim={"lr": 1e-4}, steps=steps, save={"every": steps}, eval=None)


def engines(pid: int) -> list[int]:
    """Process ids of the run's engines that are up (Ray names an actor's process after its class)."""
    found = []
    for child in psutil.Process(pid).children(recursive=True):
        try:
            if " ".join(child.cmdline()).startswith(ENGINE) and child.status() != psutil.STATUS_ZOMBIE:
                found.append(child.pid)
        except psutil.Error:  # ended meanwhile
            continue
    return found


def run_with_kills(recipe: Path, folder: Path, kills: int, chance: random.Random) -> tuple[int, int]:
    """(kills done, processes and folders left behind) of a run whose engines are killed one after another."""
    done = 0
    with started(recipe) as process:
        while process.poll() is None and done < kills:
            lines = metrics(folder, "grpo")
            alive = engines(process.pid)
            if lines and len(alive) == 2 and returns(lines) == done:
                time.sleep(chance.uniform(0.0, 5.0))
                if process.poll() is None and set(alive) == set(engines(process.pid)):
                    os.kill(chance.choice(alive), signal.SIGKILL)
                    done += 1
                    _wait_for_steps(folder, len(metrics(folder, "grpo")) + 2, process)
            time.sleep(0.2)
        below = family(process) if process.poll() is None else []
        code = process.wait()
    assert code == 0, recipe.with_suffix(".log").read_text()
    deadline = time.monotonic() + GONE_S
    while (left := _left(below, process.pid)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return done, left


def returns(lines: list[dict[str, Any]]) -> int:
    """How often a lost engine was back at work; each time in a step of its own, where one is lost at a time."""
    return sum(line["time/engine_lost"] > 0 for line in lines)


def _wait_for_steps(folder: Path, steps: int, process: Any) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while process.poll() is None and len(metrics(folder, "grpo")) < steps:
        assert time.monotonic() < deadline, f"no step within {PATIENCE_S:.0f} s of a kill"
        time.sleep(0.1)


def _left(below: list[Any], pid: int) -> int:
    return sum(processes.is_alive(p) for p in below) + len(folders_of(pid))


def seconds_from_first_step_to_last(folder: Path) -> float:
    times = [line["time"] for line in metrics(folder, "grpo")]
    return float(times[-1] - times[0])


def largest_mismatch(folder: Path) -> float:
    """Of older weights too, at a staleness above 0."""
    return max(line["mismatch/kl"] for line in metrics(folder, "grpo"))


def judged(folder: Path, steps: int, staleness: int) -> dict[str, Any]:
    """What the run's own records say of it."""
    rows, lines = rollouts(folder, "grpo"), metrics(folder, "grpo")
    drawn = Counter((row["group_id"], row["sample"]) for row in rows)
    whole = {(group, sample) for group in range(steps * GROUPS) for sample in range(GROUP_SIZE)}
    ages = [row["step"] - 1 - row["version"] for row in rows if row["version"] is not None]
    return {
        "steps": len(lines),
        "each_completion_trained_once": drawn.keys() == whole and set(drawn.values()) == {1},
        "oldest": max(ages),
        "fresh_enough": min(ages) >= 0 and max(ages) <= staleness,
        "largest_mismatch_kl": largest_mismatch(folder),
        "restarts": sum(line["rollout/restarts"] for line in lines),
        "returns": returns(lines),
        "reissued_groups": sum(line["rollout/reissued"] for line in lines),
        "seconds_without_an_engine": sum(line["time/engine_lost"] for line in lines),
    }


def prove(kills: int, staleness: int) -> bool:
    """One stage undisturbed, one whose engines are killed; writes an entry."""
    steps, begun = STEPS_PER_KILL * kills, time.monotonic()
    fewer = max(STEPS_PER_KILL, steps // 4)
    with tempfile.TemporaryDirectory(prefix="engine-proof-") as name:
        folder = Path(name)
        write_data(folder)
        run(write_recipe(folder, "whole", [stage(fewer, staleness)]))
        undisturbed = folder / "runs" / "whole"
        pace = seconds_from_first_step_to_last(undisturbed) / (fewer - 1)
        mismatch = largest_mismatch(undisturbed)
        recipe, killed = write_recipe(folder, "killed", [stage(steps, staleness)]), folder / "runs" / "killed"
        done, left = run_with_kills(recipe, killed, kills, random.Random(staleness))
        found = judged(killed, steps, staleness)
        lost = seconds_from_first_step_to_last(killed) - (steps - 1) * pace
    start_up = found["seconds_without_an_engine"] / max(1, found["returns"])
    figures = {
        **found,
        "largest_mismatch_kl_undisturbed": mismatch,
        "kills": done,
        "left_behind": left,
        "seconds_per_step_undisturbed": round(pace, 3),
        "lost_per_kill_s": round(lost / max(1, done), 1),
        "start_up_s": round(start_up, 1),
    }
    print(json.dumps(figures), flush=True)
    proved = (
        done == kills == found["restarts"]
        and found["steps"] == steps
        and found["each_completion_trained_once"]
        and found["fresh_enough"]
        and found["largest_mismatch_kl"] < max(ROUNDING, 2 * mismatch)
        and left == 0
        and figures["lost_per_kill_s"] < 2 * start_up
    )
    record(
        "engine-failures",
        claim=f"an online stage at staleness {staleness} that loses an engine {kills} times trains every group once, "
        "none too old, and loses less than two engine start-ups of time at each",
        command=f"ALIGN_PROVE_STALENESS={staleness} python -m tests.prove engine_failures",
        figures=figures,
        proved=proved,
        seconds=time.monotonic() - begun,
    )
    return proved


def main() -> int:
    kills = int(os.environ.get("ALIGN_PROVE_KILLS", "10"))
    settings = [int(number) for number in os.environ.get("ALIGN_PROVE_STALENESS", "0,1").split(",")]
    failed = [staleness for staleness in settings if not prove(kills, staleness)]
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
