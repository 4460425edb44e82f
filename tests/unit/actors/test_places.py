"""What a cluster can never hold is refused at once, with what is missing."""

from __future__ import annotations

from pathlib import Path

import pytest

from align.actors.places import _parts, check_fits
from align.errors import PlacementError, RunFolderError
from align.recipe.placement import Placement
from align.shared_files import keep_sources, require_shared, source_here
from align.stages.backend import Needs
from align.stages.roles import Role, roles_of

A = {"CPU": 4.0, "train": 1.0, "memory": 1e9}
B = {"CPU": 8.0, "GPU": 2.0, "sample": 2.0}
NODES = {"a (1f)": A, "b (2e)": B}


def roles(needs: Needs | None = None, **placement: object) -> list[Role]:
    share = Placement.model_validate(placement)
    return roles_of(needs or Needs(trainer=True, engines=2, scorers=1), share, cores=4, gpus=0, threads={})


def test_custom_resources_are_part_of_every_process_of_a_role() -> None:
    found = roles(trainer={"cpus": 1, "resources": {"train": 1}}, rollout={"cpus": 0, "resources": {"sample": 0.5}})
    assert found[0].resources == {"CPU": 1, "train": 1}
    assert [r.resources for r in found[1:3]] == [{"sample": 0.5}] * 2
    check_fits(found, NODES)


@pytest.mark.parametrize(
    ("placement", "said", "remedy"),
    [
        ({"trainer": {"cpus": 1, "resources": {"fast": 1}}}, r"no node has 1 fast; there are: a \(1f\): 4 CPU", "fast"),
        ({"trainer": {"cpus": 6, "resources": {"train": 1}}}, "no node has 6 CPU, 1 train together", "placement"),
        ({"trainer": {"cpus": 9}}, "no node has 9 CPU; .*b .2e.: 8 CPU", "cpus"),
        ({"trainer": {"ranks": 2, "cpus": 1, "resources": {"train": 1}}}, "2 train are asked for", "train"),
        ({"trainer": {"cpus": 1, "gpus": 1}, "rollout": {"cpus": 1, "gpus": 1}}, "3 GPU are asked for", "gpus"),
    ],
)
def test_what_no_node_and_not_all_of_them_have_is_named(placement: dict[str, object], said: str, remedy: str) -> None:
    with pytest.raises(PlacementError, match=said) as refused:
        check_fits(roles(**placement), NODES)
    assert remedy in str(refused.value.remedy) and str(refused.value.where).startswith("placement")


def test_the_trainer_engines_and_rewards_have_groups_of_their_own_the_largest_first() -> None:
    found = roles(
        Needs(trainer=True, reference=True, engines=2, scorers=2),
        trainer={"ranks": 2, "cpus": 1},
        rollout={"cpus": 3},
        rewards={"count": 2},
    )
    names = [[role.name for role in part] for part in _parts(found, {})]
    assert names[:2] == [["rollout-0", "rollout-1"], ["trainer", "trainer-1", "reference"]]
    assert names[2] == ["rewards-0-0", "rewards-0-1", "rewards-1-0", "rewards-1-1"]


def test_what_fits_on_one_node_alone_is_reserved_before_what_could_take_its_place() -> None:
    found = roles(trainer={"cpus": 4}, rollout={"cpus": 1, "resources": {"sample": 1}})
    assert [part[0].name for part in _parts(found, NODES)] == ["rollout-0", "trainer", "rewards-0"]
    assert [part[0].name for part in _parts(found, {})] == ["trainer", "rollout-0", "rewards-0"]


def test_resources_that_ray_counts_itself_are_refused_in_a_recipe() -> None:
    with pytest.raises(ValueError, match="`cpus` and `gpus` ask for"):
        Placement.model_validate({"trainer": {"resources": {"GPU": 1}}})


def test_a_node_that_does_not_see_the_run_folder_or_the_model_says_so(tmp_path: Path) -> None:
    token = tmp_path / "run.json"
    with pytest.raises(RunFolderError, match="does not see the run folder") as missing:
        require_shared(token)
    assert "shared path" in str(missing.value.remedy) and missing.value.exit_code == 2
    token.touch()
    require_shared(token, tmp_path, None)
    with pytest.raises(RunFolderError, match="does not see this path") as missing:
        require_shared(token, str(tmp_path / "model"))
    assert "HF_HOME" in str(missing.value.remedy)


def test_a_node_that_has_not_the_drivers_source_takes_its_copy_in_the_run_folder(tmp_path: Path) -> None:
    folder, run = tmp_path / "recipe", tmp_path / "run"
    (folder / "inner").mkdir(parents=True)
    mine, beside = folder / "mine.py", folder / "inner" / "beside.py"
    mine.write_text("x = 1")
    beside.write_text("y = 2")
    keep_sources([mine, beside], run)
    assert source_here(f"{mine}:reward", run) == f"{mine}:reward", "this node has the same"
    mine.write_text("x = 3")
    there = source_here(f"{mine}:reward", run)
    assert there.startswith(f"{run}/") and there.endswith(":reward")
    assert Path(there.removesuffix(":reward")).read_text() == "x = 1"
    assert (Path(there).parent / "inner" / "beside.py").read_text() == "y = 2", "what it imports is beside it"
    assert source_here(str(mine), run) == there.removesuffix(":reward")
    for name in ("numeric", "pkg.mod:attr", f"{tmp_path}/other.py:f", str(folder)):
        assert source_here(name, run) == name
    assert source_here("/nowhere/else.py:f", run) == "/nowhere/else.py:f"
