"""Which groups are on their way to the trainer, and when a turn may take them. Pure asyncio: no Ray, no tensors.

With n groups per step and staleness S there are (S+1) n slots. A group holds one from the moment its prompt is admitted
until the version trained from it is published. It is

    pending     admitted, not yet handed to the engines
    running     being sampled or scored
    scored      ready for a turn to take
    consumed    taken by the turn in progress; its slot is held until that turn's version is published
    failed      given up: its prompt cannot be sampled, or its group was replaced; its slot is free at once

Why no group is ever older than S when it is consumed (`overdue: wait`)
-----------------------------------------------------------------------

Turn k trains on version k and ends with the publish of version k+1. Let u be the newest version when a group was
admitted: its tokens are of version u or newer, so at turn k its age is at most k - u, and turn u+S is the last that may
take it. Write R(c) for the number of groups admitted at versions up to c that no turn has taken. The buffer keeps

    (I)    when turn k begins, for every c:   R(c) <= n (c + S - k + 1)   (at least 0)

which says: turns k ... c+S, those that may still take a group of version c, hold them all.

1. For c = k, the newest version there is, (I) reads R(k) <= n (S+1): there are no more slots than that.
2. For c < k nothing is ever added to R(c): admission is at the newest version, and a group that is given up leaves.
   Turn k-1 took its n groups only once taking them left R(c) <= n (c + S - k + 1), which is (I).
   That it could do so: by (I) at its own beginning, R(c) exceeded the wanted number by at most n for every c, and the n
   oldest groups lower every R(c) together, by n or to 0. So it suffices to wait until enough of the oldest are scored,
   and all running groups end.
3. For c = k again, now that turn k has taken n groups: R(k) <= n S must hold for the turns that follow, though groups
   admitted between here and the publish are of version k as well. It does, because the n groups taken keep their
   slots: n S are left for others. Were slots free at consumption, n more groups of version k could be admitted, and the
   last of them would be taken at age S+1. This is why slots are held until the publish.

For c = k - S - 1, (I) says R(c) = 0 when turn k begins: what is left is of version k - S or newer. With all slots
always filled (I) holds with equality, and each turn takes exactly the groups of one admission, the short with the long:
there is no bias to short completions. An engine that dies has its groups sampled again on a newer version, which makes
them younger than the argument assumes. Whoever takes groups still compares the versions of their tokens with the bound.

`overdue: drop` takes the n oldest groups that are scored, whatever still runs. At each publish of k+1, groups
admitted before version k+1-S are dropped and their slots are free, so turn k+1 finds none that is too old. What is
dropped is what takes longest: the trainer sees shorter completions than the policy writes.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

from align.errors import StalenessError

State = Literal["pending", "running", "scored", "consumed"]
Overdue = Literal["wait", "drop"]
R = TypeVar("R")


@dataclass(slots=True)
class Slot(Generic[R]):
    """A group that holds a slot. version: the newest one when it was admitted; result: what was given to `scored`."""

    group_id: int
    version: int
    state: State = "pending"
    result: R | None = None


class GroupBuffer(Generic[R]):
    """See the module. `consume` and `published` alternate; everything else may happen at any time between.

    groups: n, taken by each turn. failed, dropped: groups given up and dropped so far.
    """

    def __init__(self, groups: int, staleness: int, overdue: Overdue = "wait"):
        if groups < 1 or staleness < 0:
            raise ValueError(f"need groups and a staleness, got groups={groups}, staleness={staleness}")
        self.groups, self.staleness, self.overdue = groups, staleness, overdue
        self.capacity = (staleness + 1) * groups
        self.failed = 0
        self.dropped = 0
        self._waiting: dict[int, Slot[R]] = {}  # not taken by a turn, in order of admission, which is that of versions
        self._taken: dict[int, Slot[R]] = {}
        self._of_version: Counter[int] = Counter()  # of `_waiting`
        self._scored: Counter[int] = Counter()  # of those, scored
        self._newest = 0
        self._turn: int | None = None  # that waits in `consume`
        self._ready = asyncio.Event()

    # ------------------------------------------------------------------------------------------------ what is there

    @property
    def free(self) -> int:
        """Slots that no group holds."""
        return self.capacity - len(self._waiting) - len(self._taken)

    @property
    def waiting(self) -> list[int]:
        """Ids of the groups that no turn has taken, oldest first: what a checkpoint must name to lose none."""
        return list(self._waiting)

    def counts(self) -> dict[str, int]:
        """Groups by state: those that hold a slot now, and how many failed and were dropped so far."""
        states = Counter(slot.state for slot in self._waiting.values())
        held = {state: states[state] for state in ("pending", "running", "scored")}
        return {**held, "consumed": len(self._taken), "failed": self.failed, "dropped": self.dropped}

    def holds(self, group_id: int) -> bool:
        """Whether a turn may still take the group: False once it was taken, given up or dropped."""
        return group_id in self._waiting

    # ------------------------------------------------------------------------------------------------ on the way

    def admit(self, group_ids: Iterable[int], version: int) -> None:
        """Give each group a slot. version: the newest one published; never lower than at the last call."""
        ids = list(group_ids)
        if len(ids) > self.free:
            raise ValueError(f"{len(ids)} groups for {self.free} free slots")
        if version < self._newest:
            raise ValueError(f"version {version} was published before {self._newest}")
        self._newest = version
        for group_id in ids:
            if group_id in self._waiting or group_id in self._taken:
                raise ValueError(f"group {group_id} holds a slot already")
            self._waiting[group_id] = Slot(group_id, version)
            self._of_version[version] += 1

    def run(self, group_ids: Iterable[int]) -> None:
        """The groups were handed to the engines."""
        for group_id in group_ids:
            self._waiting[group_id].state = "running"

    def scored(self, group_id: int, result: R) -> None:
        """A turn may take the group from now on. A group that was dropped meanwhile stays dropped."""
        slot = self._waiting.get(group_id)
        if slot is None:
            return
        if slot.state == "scored":
            raise ValueError(f"group {group_id} was scored twice")
        slot.state, slot.result = "scored", result
        self._scored[slot.version] += 1
        self._wake()

    def give_up(self, group_id: int) -> None:
        """The group will not be trained on; its slot is free now."""
        slot = self._waiting.get(group_id)
        if slot is not None:
            self._forget(slot)
            self.failed += 1
            self._wake()  # with one group less, the others may do

    # ------------------------------------------------------------------------------------------------ turns

    async def consume(self, turn: int) -> list[Slot[R]]:
        """The n groups of turn `turn`, sorted by id, once they may be taken: the oldest that are scored.

        Raises StalenessError where a group that has not been taken is already too old, which the slots rule out.
        """
        self._turn = turn
        try:
            while not self._may_take(turn):
                self._ready.clear()
                await self._ready.wait()
        finally:
            self._turn = None
        taken: list[Slot[R]] = []
        for slot in self._waiting.values():
            if len(taken) == self.groups:
                break
            if slot.state == "scored":
                taken.append(slot)
        for slot in taken:
            self._forget(slot)
            slot.state = "consumed"
            self._taken[slot.group_id] = slot
        return sorted(taken, key=lambda slot: slot.group_id)

    def published(self, version: int) -> list[Slot[R]]:
        """The version trained from the groups taken is published: their slots are free.

        Returns what `overdue: drop` drops, also freed: groups that the turn of this version would find too old.
        """
        self._taken.clear()
        self._newest = max(self._newest, version)
        if self.overdue == "wait":
            return []
        late = [slot for slot in self._waiting.values() if slot.version < version - self.staleness]
        for slot in late:
            self._forget(slot)
        self.dropped += len(late)
        return late

    def _may_take(self, turn: int) -> bool:
        """Whether the n oldest scored groups are n, and leave no more behind than later turns can take in time."""
        scored = 0
        left = 0
        for version in sorted(self._of_version):
            scored += self._scored[version]
            left += self._of_version[version]
            later = max(0, version + self.staleness - turn) * self.groups  # what turns after this one may take of them
            must = left - later
            if self.overdue == "wait" and must > self.groups:
                raise StalenessError(
                    f"{left} groups of version {version} or older wait at turn {turn}, and only {later + self.groups} "
                    f"can be trained on within a staleness of {self.staleness}",
                    remedy="a fault of the loop, not of the recipe: report it",
                )
            if self.overdue == "wait" and min(scored, self.groups) < must:
                return False
        return scored >= self.groups

    def _wake(self) -> None:
        if self._turn is not None and not self._ready.is_set() and self._may_take(self._turn):
            self._ready.set()

    def _forget(self, slot: Slot[R]) -> None:
        del self._waiting[slot.group_id]
        self._count_down(self._of_version, slot.version)
        if slot.state == "scored":
            self._count_down(self._scored, slot.version)

    @staticmethod
    def _count_down(counter: Counter[int], version: int) -> None:
        counter[version] -= 1
        if not counter[version]:
            del counter[version]


def check_age(turn: int, oldest: int, staleness: int, group_id: int) -> int:
    """Age in versions of a group whose oldest token is of version `oldest`. StalenessError outside [0, staleness]."""
    age = turn - oldest
    if not 0 <= age <= staleness:
        raise StalenessError(
            f"group {group_id} was sampled by version {oldest}, and turn {turn} trains version {turn} "
            f"with a staleness of at most {staleness}",
            remedy="an engine served another version than it was asked for: see mismatch/ and rollout/ in "
            "metrics.jsonl, and continue with --resume",
        )
    return age
