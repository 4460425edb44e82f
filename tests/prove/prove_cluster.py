"""Nodes and ranks of a cluster are killed (SIGKILL) during runs on vLLM; each run ends right.

    python -m tests.prove cluster

Two raylets on this machine with resources of their own: the trainer on node A, engines and rewards on node B.

- onto_the_other: B's raylet is killed; engine and rewards start again on A, which has room by then.
- onto_a_new_one: they need a resource that only B has; B is killed, and a new node that has it joins.
- trainer: the process of the trainer is killed; the run goes on from its last checkpoint, equal bit for bit.
- rank_and_node: of two ranks one is on B, whose raylet is killed; a new node joins, and the run is equal bit for bit.

Right: every completion is trained exactly once, losses are finite, the artefact is there, nothing is left behind.
"""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.prove.entry import CHECKOUT, conclude
from tests.ray_nodes import Nodes, nodes
from tests.runs import (
    folders_of,
    grpo,
    metrics,
    rollouts,
    run,
    sft,
    started,
    timeless,
    wait_until,
    weights,
    write_data,
    write_recipe,
)

STEPS, GROUPS, GROUP_SIZE = 8, 8, 4
KILLED_AT = 4
TRAINER = {"cpus": 0.8, "threads": 1, "resources": {"train": 0.5}}
ENGINE = {"cpus": 1.0, "threads": 1}
REWARDS = {"cpus": 0.2}
HOLD = """
import sys, ray
ray.init(address=sys.argv[1], log_to_driver=False, logging_level="ERROR")
from ray.util.placement_group import placement_group
group = placement_group([{"CPU": 1.1, "train": 0.1}])
assert group.wait(60)
print("held", flush=True)
sys.stdin.readline()
"""


def stage(**changes: Any) -> dict[str, Any]:
    rollout = {"max_tokens": 12, "truncated": "keep"}
    lora = {"kind": "lora", "rank": 4, "alpha": 8}
    plain = {"from": None, "adapter": lora, "rollout": rollout, "steps": STEPS, "save": {"every": 3}, "eval": None}
    return grpo(**{**plain, **changes})


@contextmanager
def held(address: str) -> Iterator[subprocess.Popen[str]]:
    """Most of node A is somebody else's, until this block's process ends."""
    command = [sys.executable, "-c", HOLD, address]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=CHECKOUT) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            process.kill()


def judged(folder: Path, pid: int) -> dict[str, Any]:
    """What the records of an online run say of it, and the checks that it ended right."""
    lines, rows = metrics(folder, "grpo"), rollouts(folder, "grpo")
    whole = {(group, sample) for group in range(STEPS * GROUPS) for sample in range(GROUP_SIZE)}
    trained = Counter((row["group_id"], row["sample"]) for row in rows)
    return {
        "engine_restarts": sum(line["rollout/restarts"] for line in lines),
        "reward_restarts": sum(line["reward/restarts"] for line in lines),
        "reissued_groups": sum(line["rollout/reissued"] for line in lines),
        "seconds_without_an_engine": round(sum(line["time/engine_lost"] for line in lines), 1),
        "checks": {
            "every_step_once": [line["step"] for line in lines] == list(range(1, STEPS + 1)),
            "every_completion_once": trained.keys() == whole and set(trained.values()) == {1},
            "losses_finite": all(math.isfinite(line["loss/total"]) for line in lines),
            "artefact": bool(weights(folder, "grpo")),
            "no_folder_left": folders_of(pid) == [],
        },
    }


def on(node: Any, cluster: Nodes) -> bool:
    return bool(cluster.workers(node, "ray::EngineWorker") and cluster.workers(node, "ray::RewardActor"))


def onto_the_other(folder: Path) -> dict[str, Any]:
    placement = {"trainer": TRAINER, "rollout": ENGINE, "rewards": REWARDS}
    recipe, made = write_recipe(folder, "other", [stage()], placement=placement), folder / "runs" / "other"
    with nodes(2, train=1) as cluster, held(cluster.address) as other:
        b = cluster.add(2)
        with started(recipe, "--address", cluster.address) as process:
            wait_until(lambda: len(metrics(made, "grpo")) >= KILLED_AT, process, recipe.with_suffix(".log"))
            began_on_b = on(b, cluster) and not on(cluster.head, cluster)
            other.kill()
            cluster.kill(b)
            wait_until(lambda: on(cluster.head, cluster), process, recipe.with_suffix(".log"))
            code = process.wait()
        found = judged(made, process.pid)
    found["checks"] |= {"began_on_b": began_on_b, "exit_code_0": code == 0, "engine_back": found["engine_restarts"] > 0}
    return found


def onto_a_new_one(folder: Path) -> dict[str, Any]:
    sample = {"resources": {"sample": 1}}
    placement = {"trainer": TRAINER, "rollout": {**ENGINE, **sample}, "rewards": {**REWARDS, **sample}}
    recipe, made = write_recipe(folder, "new", [stage()], placement=placement), folder / "runs" / "new"
    with nodes(2, train=1) as cluster:
        b = cluster.add(2, sample=2)
        with started(recipe, "--address", cluster.address) as process:
            wait_until(lambda: len(metrics(made, "grpo")) >= KILLED_AT, process, recipe.with_suffix(".log"))
            began_on_b = on(b, cluster)
            cluster.kill(b)
            time.sleep(10)  # without a place for them, for a while
            steps = len(metrics(made, "grpo"))
            waited = process.poll() is None and steps < STEPS
            new = cluster.add(2, sample=2)
            wait_until(lambda: on(new, cluster), process, recipe.with_suffix(".log"))
            code = process.wait()
        found = judged(made, process.pid)
    checks = {"began_on_b": began_on_b, "waited": waited, "exit_code_0": code == 0}
    found["checks"] |= {**checks, "one_restart_each": found["engine_restarts"] == found["reward_restarts"] == 1}
    return found


def equal(folder: Path, name: str, stage_id: str, whole: Path) -> dict[str, Any]:
    made = folder / "runs" / name
    noted = json.loads((made / "run.json").read_text())["restarts"]
    counted = json.loads((made / "summary.json").read_text())["stages"][stage_id]["restarts"]
    return {
        "restarts": [{"step": n["step"], "cause": n["cause"]} for n in noted],
        "checks": {
            "same_metrics": timeless(whole, stage_id) == timeless(made, stage_id),
            "same_weights": weights(whole, stage_id) == weights(made, stage_id),
            "restart_in_run_and_summary": len(noted) == counted == 1,
        },
    }


def trainer(folder: Path) -> dict[str, Any]:
    placement = {"trainer": TRAINER, "rollout": ENGINE, "rewards": REWARDS}
    with nodes(2, train=1) as cluster:
        cluster.add(2)
        run(write_recipe(folder, "whole", [stage()], placement=placement), "--address", cluster.address)
        recipe, made = write_recipe(folder, "killed", [stage()], placement=placement), folder / "runs" / "killed"
        with started(recipe, "--address", cluster.address) as process:
            wait_until(lambda: len(metrics(made, "grpo")) >= KILLED_AT + 1, process, recipe.with_suffix(".log"))
            [actor] = cluster.workers(cluster.head, "ray::PolicyActor")
            actor.send_signal(signal.SIGKILL)
            code = process.wait()
    found = equal(folder, "killed", "grpo", folder / "runs" / "whole")
    found["checks"]["exit_code_0"] = code == 0
    return found


def rank_and_node(folder: Path) -> dict[str, Any]:
    placement = {"trainer": {"ranks": 2, "cpus": 0.5, "threads": 1, "resources": {"train": 1}}}
    stages = [sft(steps=12, save={"every": 4})]
    with nodes(1, train=1) as cluster:
        b = cluster.add(1, train=1)
        run(write_recipe(folder, "both", stages, placement=placement), "--address", cluster.address)
        recipe, made = write_recipe(folder, "half", stages, placement=placement), folder / "runs" / "half"
        with started(recipe, "--address", cluster.address) as process:
            wait_until(lambda: len(metrics(made, "sft")) >= 7, process, recipe.with_suffix(".log"))
            cluster.kill(b)
            cluster.add(1, train=1)
            code = process.wait()
    found = equal(folder, "half", "sft", folder / "runs" / "both")
    found["checks"]["exit_code_0"] = code == 0
    return found


def main() -> int:
    begun, figures = time.monotonic(), {}
    for part in (onto_the_other, onto_a_new_one, trainer, rank_and_node):
        with tempfile.TemporaryDirectory(prefix="cluster-proof-") as name:
            folder = Path(name)
            write_data(folder)
            began = time.monotonic()
            figures[part.__name__] = {**part(folder), "seconds": round(time.monotonic() - began, 1)}
            print(part.__name__, json.dumps(figures[part.__name__]), flush=True)
    return conclude(
        "cluster",
        claim="a node with engines and rewards that is killed costs a restart of theirs, on another node or a new one, "
        "and the run ends right; a killed trainer, or the node of one of its ranks, ends in a resume that is bit-equal",
        command="python -m tests.prove cluster",
        figures=figures,
        begun=begun,
    )


if __name__ == "__main__":
    sys.exit(main())
