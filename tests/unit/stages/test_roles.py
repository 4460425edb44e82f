"""What each part of a stage reserves, and with how many threads it computes."""

from __future__ import annotations

import pytest

from align.recipe.placement import Placement
from align.stages.backend import Needs
from align.stages.roles import SMALL_MODEL, roles_of, sampling_threads


def threads(needs: Needs, *, parameters: int | None, placement: Placement | None = None, began: int | None = None):
    stored = {} if began is None else {"rollout": began}
    roles = roles_of(
        needs, placement or Placement(), cores=8, gpus=0, threads=stored, sampling=sampling_threads(parameters)
    )
    return {role.name: role.threads for role in roles}


@pytest.mark.parametrize(("parameters", "sampling"), [(SMALL_MODEL, 1), (SMALL_MODEL + 1, 8), (None, 8)])
def test_a_small_model_is_sampled_by_one_thread_and_trained_by_all(parameters: int | None, sampling: int) -> None:
    needs = Needs(trainer=True, engines=1)
    assert threads(needs, parameters=parameters) == {"trainer": 8, "rollout-0": sampling}


def test_what_the_recipe_says_and_what_a_resumed_run_began_with_come_before_the_models_size() -> None:
    needs = Needs(trainer=True, engines=1)
    assert threads(needs, parameters=1, began=8)["rollout-0"] == 8
    placement = Placement.model_validate({"rollout": {"threads": 3}})
    assert threads(needs, parameters=1, placement=placement, began=8)["rollout-0"] == 3


def test_engines_that_sample_while_the_trainer_steps_share_its_other_half() -> None:
    found = threads(Needs(trainer=True, engines=2, overlap=True), parameters=None)
    assert found == {"trainer": 4, "rollout-0": 2, "rollout-1": 2}


@pytest.mark.parametrize(
    ("needs", "passive"),
    [
        (Needs(trainer=True), False),
        (Needs(trainer=True, engines=1, scorers=1), False),
        (Needs(trainer=True, engines=1, overlap=True), True),
        (Needs(trainer=True, engines=2), True),
    ],
)
def test_threads_sleep_at_once_where_others_compute_at_the_same_time(needs: Needs, passive: bool) -> None:
    roles = roles_of(needs, Placement(), cores=8, gpus=0, threads={})
    assert {role.passive for role in roles} == {passive}
