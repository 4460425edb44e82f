"""kill -9 of one of two engines, ten times at random moments of an online stage: the run ends right.

    python -m tests.prove engine_failures

Right: every group of every turn is trained exactly once, none is older than `staleness` allows, trainer and engines
agree on every token, and nothing is left behind. A kill costs less than two engine start-ups of time, measured in the
same run. ALIGN_PROVE_KILLS sets the kills (default 10), ALIGN_PROVE_STALENESS what is proved (default 0,1).
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
PATIENCE_S = 300.0


def stage(steps: int, staleness: int) -> dict[str, Any]:
    rollout = {"workers": 2, "max_tokens": 8, "heartbeat_s": 10}
    changes = {"from": None, "adapter": {"kind": "lora", "rank": 4, "alpha": 8}, "staleness": staleness}
    return grpo(**changes, rollout=rollout, steps=steps, save={"every": steps}, eval=None)


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


def run_with_kills(recipe: Path, folder: Path, kills: int, chance: random.Random) -> tuple[float, int, int]:
    """(seconds, kills done, processes and folders left behind) of a run whose engines are killed one after another."""
    begun, done = time.monotonic(), 0
    with started(recipe) as process:
        while process.poll() is None and done < kills:
            steps = len(metrics(folder, "grpo"))
            if steps and len(alive := engines(process.pid)) == 2:
                time.sleep(chance.uniform(0.0, 10.0))
                if process.poll() is None and set(alive) == set(engines(process.pid)):
                    os.kill(chance.choice(alive), signal.SIGKILL)
                    done += 1
                    _wait_for_steps(folder, len(metrics(folder, "grpo")) + 2, process)
            time.sleep(0.2)
        below = family(process) if process.poll() is None else []
        code = process.wait()
    assert code == 0, recipe.with_suffix(".log").read_text()
    seconds = time.monotonic() - begun
    deadline = time.monotonic() + GONE_S
    while (left := _left(below, process.pid)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return seconds, done, left


def _wait_for_steps(folder: Path, steps: int, process: Any) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while process.poll() is None and len(metrics(folder, "grpo")) < steps:
        assert time.monotonic() < deadline, f"no step within {PATIENCE_S:.0f} s of a kill"
        time.sleep(0.1)


def _left(below: list[Any], pid: int) -> int:
    return sum(processes.is_alive(p) for p in below) + len(folders_of(pid))


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
        "largest_mismatch_kl": max(line.get("mismatch/kl", 0.0) for line in lines),
        "restarts": sum(line.get("rollout/restarts", 0.0) for line in lines),
        "reissued_groups": sum(line.get("rollout/reissued", 0.0) for line in lines),
        "seconds_without_an_engine": sum(line.get("time/engine_lost", 0.0) for line in lines),
    }


def prove(kills: int, staleness: int) -> bool:
    """One stage undisturbed, one whose engines are killed; writes an entry."""
    steps, begun = 40 * kills, time.monotonic()
    with tempfile.TemporaryDirectory(prefix="engine-proof-") as name:
        folder = Path(name)
        write_data(folder)
        whole = write_recipe(folder, "whole", [stage(steps, staleness)])
        undisturbed = time.monotonic()
        run(whole)
        undisturbed = time.monotonic() - undisturbed
        recipe = write_recipe(folder, "killed", [stage(steps, staleness)])
        seconds, done, left = run_with_kills(recipe, folder / "runs" / "killed", kills, random.Random(staleness))
        found = judged(folder / "runs" / "killed", steps, staleness)
    start_up = found["seconds_without_an_engine"] / max(1.0, found["restarts"])
    figures = {
        **found,
        "kills": done,
        "left_behind": left,
        "seconds_undisturbed": round(undisturbed, 1),
        "seconds": round(seconds, 1),
        "lost_per_kill_s": round((seconds - undisturbed) / max(1, done), 1),
        "start_up_s": round(start_up, 1),
    }
    print(json.dumps(figures), flush=True)
    proved = (
        done == kills == found["restarts"]
        and found["steps"] == steps
        and found["each_completion_trained_once"]
        and found["fresh_enough"]
        and found["largest_mismatch_kl"] < 1e-3
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
