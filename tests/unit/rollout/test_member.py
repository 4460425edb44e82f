"""What becomes of an engine whose node was lost, told without Ray."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from align.errors import EngineError, EngineLostError, LostError
from rollout.member import Limits, Lost, Member, lost_for_good


class Waiting(Member):
    """Its actor's process never comes."""

    def __init__(self, starts: int, lost: Lost):
        super().__init__(0, None, {"num_cpus": 1, "num_gpus": 0}, Limits(place=7))
        self.starts, self._lost, self._homed = starts, lost, None

    async def _answer(self, reference: Any, timeout_s: float, what: str) -> Any:
        raise self._lost


def test_an_engine_that_was_lost_and_has_no_place_ends_the_fleet_with_what_to_do() -> None:
    with pytest.raises(EngineError, match="no node had room for another within 7 s") as ended:
        asyncio.run(Waiting(1, Lost("no process", hung=True)).started())
    assert "placement.replacement_s" in str(ended.value.remedy) and ended.value.where == "rollout worker 0"


@pytest.mark.parametrize(("starts", "hung"), [(0, True), (1, False)])
def test_a_first_start_and_a_process_that_dies_are_losses_as_before(starts: int, hung: bool) -> None:
    with pytest.raises(Lost):
        asyncio.run(Waiting(starts, Lost("gone", hung=hung)).started())


def test_only_a_process_that_is_gone_may_be_cured_by_starting_the_stage_again() -> None:
    assert isinstance(lost_for_good(Lost("died", died=True), "rollout worker 0"), LostError)
    assert issubclass(EngineLostError, EngineError)
    assert not isinstance(lost_for_good(Lost("it makes no step", hung=True), "rollout worker 0"), LostError)
