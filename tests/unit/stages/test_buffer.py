"""The buffer alone: bounds, states and order. Its argument is in its docstring; here it is tried."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from align.errors import StalenessError
from align.stages.buffer import GroupBuffer, Overdue, check_age
from align.stages.virtual_clock import run_virtually

# ------------------------------------------------------------------------------------------------ by hand


def filled(groups: int, staleness: int, overdue: Overdue = "wait", version: int = 0) -> GroupBuffer[str]:
    """A buffer whose slots hold groups 0, 1, 2, ..., all running."""
    buffer: GroupBuffer[str] = GroupBuffer(groups, staleness, overdue)
    buffer.admit(range(buffer.capacity), version)
    buffer.run(range(buffer.capacity))
    return buffer


def take(buffer: GroupBuffer[str], turn: int) -> list[int]:
    """Ids that `turn` takes without waiting. Fails where it would wait."""

    async def now() -> list[int]:
        return [slot.group_id for slot in await asyncio.wait_for(buffer.consume(turn), 1.0)]

    return run_virtually(now())


def test_a_slot_is_held_until_the_version_trained_from_its_group_is_published() -> None:
    buffer = filled(2, 1)
    for group in (3, 1, 0, 2):
        buffer.scored(group, "")
    assert (buffer.capacity, buffer.free) == (4, 0)
    assert take(buffer, 0) == [0, 1]
    assert buffer.free == 0, "taken, and not published yet"
    with pytest.raises(ValueError, match="free slots"):
        buffer.admit([4], 0)
    buffer.published(1)
    assert buffer.free == 2


def test_groups_are_counted_by_state() -> None:
    buffer: GroupBuffer[str] = GroupBuffer(2, 2)
    buffer.admit(range(6), 0)
    buffer.run([0, 1, 2, 3])
    for group in (0, 1, 2):
        buffer.scored(group, "")
    buffer.give_up(5)
    assert take(buffer, 0) == [0, 1]
    assert buffer.counts() == {"pending": 1, "running": 1, "scored": 1, "consumed": 2, "failed": 1, "dropped": 0}


def test_a_turn_takes_the_oldest_scored_groups_and_gives_them_by_id() -> None:
    buffer: GroupBuffer[str] = GroupBuffer(2, 1)
    buffer.admit([9, 7, 8, 3], 0)
    for group in (3, 7, 9):
        buffer.scored(group, "")
    assert take(buffer, 0) == [7, 9], "7 and 9 were admitted before 3"


def test_a_turn_waits_for_a_running_group_that_would_become_overdue() -> None:
    buffer = filled(1, 1)
    buffer.scored(1, "")
    assert take(buffer, 0) == [1], "group 0 has turn 1 left"
    buffer.published(1)
    buffer.admit([2], 1)
    buffer.scored(2, "")
    with pytest.raises(TimeoutError):
        take(buffer, 1)
    buffer.scored(0, "")
    assert take(buffer, 1) == [0]


def test_waiting_begins_as_soon_as_the_turns_left_cannot_hold_what_is_old() -> None:
    """Three groups of version 0 with n = 1 and S = 2: turn 1 must take one of them though turn 2 is their last."""
    buffer = filled(1, 2)
    buffer.scored(0, "")
    assert take(buffer, 0) == [0]
    buffer.published(1)
    buffer.admit([3], 1)
    buffer.scored(3, "")
    with pytest.raises(TimeoutError):
        take(buffer, 1)


def test_overdue_groups_are_dropped_where_the_recipe_says_so_and_their_slots_are_free() -> None:
    buffer = filled(1, 1, "drop")
    buffer.scored(1, "")
    assert take(buffer, 0) == [1]
    assert buffer.published(1) == []
    buffer.admit([2], 1)
    buffer.scored(2, "")
    assert take(buffer, 1) == [2], "it does not wait for group 0, whose last turn this is"
    assert [slot.group_id for slot in buffer.published(2)] == [0]
    assert buffer.free == 2 and buffer.counts()["dropped"] == 1
    buffer.scored(0, "late")
    assert not buffer.holds(0) and buffer.counts()["scored"] == 0


def test_groups_that_were_admitted_past_the_bound_are_an_error_and_no_endless_wait() -> None:
    buffer = filled(2, 1)
    with pytest.raises(StalenessError, match="staleness of 1"):
        take(buffer, 3)


def test_the_age_of_what_is_taken_is_checked_against_its_tokens() -> None:
    assert check_age(turn=5, oldest=4, staleness=1, group_id=0) == 1
    for oldest in (3, 6):
        with pytest.raises(StalenessError, match=f"group 8 was sampled by version {oldest}"):
            check_age(turn=5, oldest=oldest, staleness=1, group_id=8)


def test_a_group_cannot_hold_two_slots_or_be_scored_twice() -> None:
    buffer = filled(2, 0)
    buffer.give_up(1)
    with pytest.raises(ValueError, match="holds a slot"):
        buffer.admit([0], 0)
    buffer.scored(0, "")
    with pytest.raises(ValueError, match="twice"):
        buffer.scored(0, "")


# ------------------------------------------------------------------------------------------------ at random


class Shop:
    """Engines and a trainer on a virtual clock, whose every delay is `delay()`. Groups fail with probability `failing`
    (then a fresh one takes the slot), and are sampled again, on the newest version, with probability `dying`."""

    def __init__(self, groups: int, staleness: int, overdue: Overdue, delay: Callable[[], float], seed: int) -> None:
        self.buffer: GroupBuffer[int] = GroupBuffer(groups, staleness, overdue)
        self.delay, self.random = delay, np.random.default_rng(seed)
        self.failing, self.dying = 0.1, 0.1
        self.version = 0
        self.ids = itertools.count()
        self.admitted: set[int] = set()
        self.trained: list[int] = []
        self.failed: set[int] = set()
        self.dropped: set[int] = set()
        self.ages: list[int] = []

    def admit(self, tasks: asyncio.TaskGroup) -> None:
        ids = [next(self.ids) for _ in range(self.buffer.free)]
        self.admitted.update(ids)
        self.buffer.admit(ids, self.version)
        for group in ids:
            tasks.create_task(self.sample(group, tasks))

    async def sample(self, group: int, tasks: asyncio.TaskGroup) -> None:
        self.buffer.run([group])
        version = self.version
        await asyncio.sleep(self.delay())
        while self.random.random() < self.dying:
            version = self.version
            await asyncio.sleep(self.delay())
        if not self.buffer.holds(group):
            return
        if self.random.random() < self.failing:
            self.failed.add(group)
            self.buffer.give_up(group)
            self.admit(tasks)
        else:
            self.buffer.scored(group, version)

    async def turns(self, count: int) -> None:
        async with asyncio.TaskGroup() as tasks:
            for turn in range(count):
                self.admit(tasks)
                for slot in await self.buffer.consume(turn):
                    assert slot.result is not None
                    self.ages.append(check_age(turn, slot.result, self.buffer.staleness, slot.group_id))
                    self.trained.append(slot.group_id)
                await asyncio.sleep(self.delay())
                self.version = turn + 1
                self.dropped.update(slot.group_id for slot in self.buffer.published(self.version))
            self.failing = self.dying = 0.0  # let what is on its way arrive


@pytest.mark.parametrize(
    ("staleness", "overdue"), [(0, "wait"), *itertools.product((1, 2, 3), ("wait", "drop"))]
)  # fmt: skip
@settings(max_examples=25, deadline=None)
@given(groups=st.integers(1, 4), spread=st.sampled_from([0.0, 1.0, 2.5]), seed=st.integers(0, 2**32))
def test_over_200_steps_of_any_delays_no_group_is_too_old_lost_or_trained_twice(
    staleness: int, overdue: Overdue, groups: int, spread: float, seed: int
) -> None:
    random = np.random.default_rng(seed)
    shop = Shop(groups, staleness, overdue, lambda: float(np.exp(spread * random.standard_normal())), seed)
    run_virtually(shop.turns(200))
    assert len(shop.ages) == 200 * groups and min(shop.ages) >= 0 and max(shop.ages) <= staleness
    assert len(set(shop.trained)) == len(shop.trained), "none twice"
    accounts = [set(shop.trained), shop.failed, shop.dropped, set(shop.buffer.waiting)]
    assert set.union(*accounts) == shop.admitted and sum(map(len, accounts)) == len(shop.admitted), "none lost"
    if overdue == "wait":
        assert not shop.dropped
