"""`align run --address`: on a Ray cluster that somebody else started, and that stays."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.ray_local import local_ray
from tests.runs import metrics, run, run_any, sft, write_data, write_recipe

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
