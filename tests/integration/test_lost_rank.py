"""A rank that is killed costs a resume, which changes no bit. Apart from other tests of clusters: it takes minutes."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.ray_nodes import Nodes, two_nodes
from tests.runs import metrics, run, sft, started, timeless, wait_until, weights, write_data, write_recipe

pytestmark = pytest.mark.slow


@pytest.fixture
def two() -> Iterator[tuple[Nodes, Any]]:
    with two_nodes() as found:
        yield found


def test_a_lost_rank_ends_in_a_resume_that_is_bit_equal(two: tuple[Nodes, Any], tmp_path: Path) -> None:
    cluster, b = two
    write_data(tmp_path)
    placement = {"trainer": {"ranks": 2, "cpus": 0.5, "threads": 1, "resources": {"train": 1}}}
    stages = [sft(steps=10, save={"every": 3})]
    run(write_recipe(tmp_path, "whole", stages, placement=placement), "--address", cluster.address)
    recipe, folder = write_recipe(tmp_path, "lost", stages, placement=placement), tmp_path / "runs" / "lost"
    with started(recipe, "--address", cluster.address) as process:
        wait_until(lambda: len(metrics(folder, "sft")) >= 6, process, recipe.with_suffix(".log"))
        [rank] = cluster.workers(b, "ray::PolicyActor")
        rank.send_signal(signal.SIGKILL)
        assert process.wait(120) == 0, recipe.with_suffix(".log").read_text()
    whole = tmp_path / "runs" / "whole"
    assert timeless(whole, "sft") == timeless(folder, "sft")
    assert weights(whole, "sft") == weights(folder, "sft")
    [noted] = json.loads((folder / "run.json").read_text())["restarts"]
    assert noted["stage"] == "sft" and noted["step"] >= 5 and noted["cause"].startswith("rank ")
    assert json.loads((folder / "summary.json").read_text())["stages"]["sft"]["restarts"] == 1
