"""`align run --address`: on a Ray cluster that somebody else started, that stays, and that may lose nodes."""

from __future__ import annotations

import json
import math
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.ray_local import local_ray
from tests.ray_nodes import Nodes, nodes, two_nodes
from tests.runs import (
    dpo,
    grpo,
    metrics,
    rollouts,
    run,
    run_any,
    sft,
    started,
    wait_until,
    weights,
    write_data,
    write_recipe,
)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    import ray

    with local_ray():
        yield ray


@pytest.fixture(scope="module")
def address(cluster: Any) -> str:
    return str(cluster.get_runtime_context().gcs_address)


def test_a_run_joins_a_cluster_uses_it_and_leaves_it_as_it_was(cluster: Any, address: str, tmp_path: Path) -> None:
    write_data(tmp_path)
    before = cluster.available_resources()["CPU"]
    run(write_recipe(tmp_path, "joined", [sft(steps=4)]), "--address", address)
    assert len(metrics(tmp_path / "runs" / "joined", "sft")) == 5, "the evaluation before the first step, and four"
    deadline = time.monotonic() + 20
    while cluster.available_resources().get("CPU", 0.0) < before and time.monotonic() < deadline:
        time.sleep(0.2)
    assert cluster.available_resources()["CPU"] == before


def test_a_cluster_without_room_is_refused_in_half_a_minute_with_the_resource_named(
    cluster: Any, address: str, tmp_path: Path
) -> None:
    from ray.util.placement_group import placement_group, remove_placement_group

    write_data(tmp_path)
    held = placement_group([{"CPU": 2.0}])
    assert held.wait(20)
    try:
        begun = time.monotonic()
        code, text = run_any(write_recipe(tmp_path, "crowded", [sft(steps=4)]), "--address", address)
        seconds = time.monotonic() - begun
    finally:
        remove_placement_group(held)
    assert code == 2
    message = text[text.rindex("error:") :]
    assert "CPU" in message and "30 s" in message and "->" in message and "Traceback" not in message
    assert seconds < 75, "30 s for the placement, the rest for starting up"


def test_an_address_where_no_cluster_is_says_so(tmp_path: Path) -> None:
    write_data(tmp_path)
    code, text = run_any(write_recipe(tmp_path, "lost", [sft(steps=4)]), "--address", "127.0.0.1:1")
    assert code == 2
    message = text[text.rindex("error:") :]
    assert "127.0.0.1:1" in message and "Traceback" not in message


# ------------------------------------------------------------------------------------------------- nodes that are lost


@pytest.fixture(scope="module")
def two() -> Iterator[tuple[Nodes, Any]]:
    with two_nodes() as found:
        yield found


def test_engines_and_rewards_of_a_lost_node_start_again_on_a_new_one(two: tuple[Nodes, Any], tmp_path: Path) -> None:
    cluster, b = two
    write_data(tmp_path)
    placement = {
        "trainer": {"cpus": 0.5, "threads": 1, "resources": {"home": 1}},
        "rollout": {"cpus": 0.5, "threads": 1, "resources": {"sample": 1}},
        "rewards": {"resources": {"sample": 0.5}},
    }
    stage = grpo(
        **{"from": None}, adapter={"kind": "lora", "rank": 4, "alpha": 8}, eval=None, steps=5, save={"every": 5},
        rollout={"name": "transformers", "max_tokens": 8, "truncated": "keep"},
    )  # fmt: skip
    recipe, folder = write_recipe(tmp_path, "moved", [stage], placement=placement), tmp_path / "runs" / "moved"
    with started(recipe, "--address", cluster.address) as process:
        wait_until(lambda: len(metrics(folder, "grpo")) >= 2, process, recipe.with_suffix(".log"))
        assert cluster.workers(b, "ray::EngineWorker") and cluster.workers(b, "ray::RewardActor")
        cluster.kill(b)
        new = cluster.add(1, sample=2)
        wait_until(lambda: bool(cluster.workers(new, "ray::EngineWorker")), process, recipe.with_suffix(".log"))
        assert process.wait(120) == 0, recipe.with_suffix(".log").read_text()
    lines = metrics(folder, "grpo")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    assert all(math.isfinite(line["loss/total"]) for line in lines)
    for restarts in (sum(line[f"{what}/restarts"] for line in lines) for what in ("rollout", "reward")):
        # the first of two was sent to the lost node, whose loss the cluster had not noticed yet
        assert 1 <= restarts <= 2
    trained = Counter((row["group_id"], row["sample"]) for row in rollouts(folder, "grpo"))
    assert len(trained) == 5 * 8 * 4 and set(trained.values()) == {1}, "each once"
    assert weights(folder, "grpo")
    summary = json.loads((folder / "summary.json").read_text())["stages"]["grpo"]
    assert summary["restarts"] == 0, "the trainer was not touched"


def test_a_placement_that_no_node_can_hold_is_refused_at_once_with_what_is_missing(
    two: tuple[Nodes, Any], tmp_path: Path
) -> None:
    write_data(tmp_path)
    placement = {"trainer": {"cpus": 0.5, "resources": {"fast": 1}}}
    recipe = write_recipe(tmp_path, "picky", [sft(steps=4)], placement=placement)
    code, text = run_any(recipe, "--address", two[0].address)
    assert code == 2
    message = text[text.rindex("error:") :]
    assert "no node has 1 fast" in message and "ray start" in message and "Traceback" not in message


@pytest.fixture
def one() -> Iterator[Nodes]:
    """One node: nodes that share a machine share the folder into which Ray unpacks what a job sent, and each unpacks it
    anew, below the feet of a process that reads it."""
    with nodes(2) as cluster:
        yield cluster


def test_a_submitted_recipe_runs_as_a_job_with_its_own_plugin(one: Nodes, tmp_path: Path) -> None:
    """Ray's job manager runs it in a copy of what was sent; its error is the exit code of `align submit` too."""
    laptop, shared = tmp_path / "laptop", tmp_path / "shared"
    laptop.mkdir()
    write_data(laptop)
    pairs = dpo(**{"from": None}, steps=2, save={"every": 2}, rewards=[{"use": "rewards.py:brevity"}])
    pairs["loss"] = {"name": "modpo", "preference_weight": 0.5}
    recipe = write_recipe(laptop, "sent", [pairs], placement={"trainer": {"cpus": 0.5, "threads": 1}})
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.job_server", one.address, str(port)],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    command = [sys.executable, "-m", "align.cli.main", "submit", recipe.name, "--address", f"http://127.0.0.1:{port}"]
    try:
        assert server.stdout is not None and server.stdout.readline() == "serving\n"
        done = subprocess.run([*command, f"output={shared}"], cwd=laptop, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        again = subprocess.run([*command, f"output={shared}"], cwd=laptop, capture_output=True, text=True)
    finally:
        server.terminate()
        server.wait()
    assert len(metrics(shared / "sent", "dpo")) == 2 and weights(shared / "sent", "dpo")
    assert "curves in" in done.stdout, "its log was followed"
    assert not (laptop / "runs").exists()
    assert again.returncode == 2 and "the run folder exists" in again.stdout
