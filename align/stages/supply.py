"""From free slots to scored groups: prompts are handed out, sampled, scored as they finish, and replaced where they
come to nothing.

Prompts are handed out in lists. Each list is one stream of the fleet, and its groups are settled one by one: scored,
failed, or found without signal. Once all of a list are settled, what came to nothing is replaced, again by one list.
So which prompts are sampled together is decided by scores and never by who was faster, and at staleness 0, where one
list is out at a time, a run can be repeated bit for bit.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from align.errors import DataError, EngineError
from align.protocols.fleet import FailedPrompt, Fleet, Group, PromptItem, Sampling
from align.protocols.scorer import ErrorBudget, Scorer, ScoreTable
from align.protocols.trainer import Metrics
from align.stages.background import Background
from align.stages.buffer import GroupBuffer, Overdue, Slot
from align.stages.groups import PromptCursor
from align.stages.scoring import ScoringQueue

_SHOWN = 5  # failed prompts in an error message


@dataclass(frozen=True, kw_only=True)
class SupplyPlan:
    """How many groups a turn takes, how they are sampled, and what becomes of those that come to nothing.

    refill: of each list, the share of groups without signal that is replaced by fresh prompts, over all rounds (0: none
    is); max_failed: of a turn's prompts, the share that may fail.
    """

    stage_id: str
    groups: int
    group_size: int
    sampling: Sampling
    staleness: int = 0
    overdue: Overdue = "wait"
    refill: float = 0.0
    max_failed: float = 0.02


@dataclass(frozen=True, slots=True)
class Scored:
    """A group that a turn may take, with its own score table, and when it was handed out, sampled and scored (seconds
    on the event loop's clock)."""

    group: Group
    table: ScoreTable
    begun: float
    generated: float
    scored: float

    @property
    def group_id(self) -> int:
        return self.group.prompt.group_id

    @property
    def tokens(self) -> int:
        return sum(completion.length for completion in self.group.completions)


@dataclass
class _Draw:
    """A list of prompts and the lists that replaced parts of it: one error budget, one budget of refills.

    samples: completions asked for so far. refills: groups without signal that may still be replaced. open: ids not
    settled. failed: ids whose prompts cannot be sampled. dead: groups without signal, while refills are left.
    """

    id: int
    refills: int
    samples: int = 0
    open: set[int] = field(default_factory=set)
    failed: list[int] = field(default_factory=list)
    dead: list[Scored] = field(default_factory=list)


class Supply:
    """Keeps the buffer's slots filled.

    Args:
        has_signal: whether a scored group can teach anything; asked only where `plan.refill` is above 0.
        tell: receives one line about each prompt that failed and each turn's dropped groups.

    Its tasks run in `background`, which ends them, and which their errors end: EngineError, RewardError, PluginError,
    and DataError where too many prompts fail.
    """

    def __init__(
        self,
        plan: SupplyPlan,
        *,
        fleet: Fleet,
        scorer: Scorer,
        cursor: PromptCursor,
        background: Background,
        has_signal: Callable[[Group, ScoreTable], bool],
        tell: Callable[[str], None],
    ):
        self.plan, self.fleet, self.cursor, self.background = plan, fleet, cursor, background
        self.has_signal, self.tell = has_signal, tell
        self.buffer: GroupBuffer[Scored] = GroupBuffer(plan.groups, plan.staleness, plan.overdue)
        self.scoring = ScoringQueue(scorer, background)
        self.version = 0
        self._drawn = 0  # prompts taken from the cursor
        self._again: list[int] = []  # groups of a checkpoint that were on their way
        self._draws = 0
        self._turn = _TurnCounts()

    # ------------------------------------------------------------------------------------------------ turns

    def admit(self, wanted: int) -> None:
        """Fill the free slots, as far as `wanted` more groups are needed, in one list."""
        count = max(0, min(self.buffer.free, wanted))
        again, self._again = self._again[:count], self._again[count:]
        prompts = self.cursor.of(again) + self._fresh(count - len(again))
        if prompts:
            refills = int(self.plan.refill * len(prompts) + 1e-9)
            self._hand_out(sorted(prompts, key=_group_id), _Draw(self._draws, refills))
            self._draws += 1

    async def take(self, turn: int) -> list[Slot[Scored]]:
        """The groups of a turn, sorted by id."""
        return await self.buffer.consume(turn)

    def published(self, version: int) -> None:
        """The engines hold a version: the slots of the groups it was trained on are free, and those of overdue groups
        where the recipe drops them."""
        self.version = version
        late = self.buffer.published(version)
        if late:
            for slot in late:
                if slot.result is not None:
                    self._turn.note_dropped(slot.result.group)  # of the others once they are sampled
            self._turn.dropped += len(late)
            ids = ", ".join(str(slot.group_id) for slot in late)
            self.tell(f"{self.plan.stage_id}: version {version}: dropped as overdue: groups {ids}")

    def take_turn(self) -> tuple[list[Scored], Metrics]:
        """Groups that were replaced since the last time, and counts of what came to nothing."""
        turn, self._turn = self._turn, _TurnCounts()
        held = self.buffer.counts()
        metrics = {
            "groups/failed": float(len(turn.failures)),
            "buffer/running": float(held["pending"] + held["running"]),
            "buffer/scored": float(held["scored"]),
        }
        if self.plan.refill:
            metrics["groups/refilled"] = float(len(turn.replaced))
        if self.plan.refill or self.plan.overdue == "drop":
            tokens = sum(scored.tokens for scored in turn.replaced) + sum(turn.dropped_lengths)
            metrics["tokens/discarded"] = float(tokens)
        if self.plan.overdue == "drop":
            metrics["groups/dropped"] = float(turn.dropped)
            if turn.dropped_lengths:
                metrics["groups/dropped_mean_length"] = float(np.mean(turn.dropped_lengths))
        return turn.replaced, metrics

    # ------------------------------------------------------------------------------------------------ checkpoints

    def to_json(self) -> dict[str, Any]:
        """drawn: how many prompts were taken from the cursor; running: groups of those that were admitted, or are to be
        again, and that no turn has taken. All others are done with, so both together say what must be reissued."""
        return {"drawn": self._drawn, "running": sorted([*self.buffer.waiting, *self._again])}

    def restore(self, state: Mapping[str, Any]) -> None:
        self._drawn, self._again = int(state["drawn"]), list(state["running"])

    # ------------------------------------------------------------------------------------------------ on the way

    def _fresh(self, count: int) -> list[PromptItem]:
        prompts = self.cursor.take(self._drawn, count)
        self._drawn += count
        return prompts

    def _hand_out(self, prompts: Sequence[PromptItem], draw: _Draw) -> None:
        draw.open = {prompt.group_id for prompt in prompts}
        draw.samples += len(prompts) * self.plan.group_size
        self.buffer.admit((prompt.group_id for prompt in prompts), self.version)
        self.background.start(self._stream(prompts, draw))

    async def _stream(self, prompts: Sequence[PromptItem], draw: _Draw) -> None:
        """Sample a list to its end. Nothing here waits but the stream."""
        begun = _now()
        owed = {prompt.group_id for prompt in prompts}
        self.buffer.run(owed)
        stream = self.fleet.stream(prompts, self.plan.group_size, self.plan.sampling)
        try:
            async for one in stream:
                group_id = one.prompt.group_id
                if group_id not in owed:
                    raise EngineError(f"the engines answered twice, or unasked, with group {group_id}")
                owed.remove(group_id)
                if isinstance(one, FailedPrompt):
                    self._failed(one, draw)
                elif self.buffer.holds(group_id):
                    done = partial(self._scored, draw, begun, _now())
                    self.scoring.add(one, ErrorBudget(draw.id, draw.samples), done)
                else:
                    self._turn.note_dropped(one)
                    self._settle(group_id, draw)
        finally:
            if isinstance(stream, AsyncGenerator):
                await stream.aclose()
        if owed:
            raise EngineError(f"the engines never answered for groups {sorted(owed)[:_SHOWN]}")

    def _failed(self, failed: FailedPrompt, draw: _Draw) -> None:
        """Report a prompt by its row, and raise DataError where more fail than may."""
        where = failed.prompt.origin or f"group {failed.prompt.group_id}"
        self.tell(f"{self.plan.stage_id}: {where}: not sampled: {failed.message}; the next prompt takes its place")
        failures = self._turn.failures
        failures.append(failed)
        rate, groups = self.plan.max_failed, self.plan.groups
        allowed = 0 if rate == 0 else max(1, int(rate * groups + 1e-9))
        if len(failures) > allowed:
            rows = "\n".join(f"     {f.prompt.origin or f.prompt.group_id}: {f.message}" for f in failures[:_SHOWN])
            raise DataError(
                f"{len(failures)} prompts of a step of {groups} cannot be sampled, more than max_failed_prompts = "
                f"{rate:g} allows ({allowed}):\n{rows}",
                where=f"stage {self.plan.stage_id!r}",
                remedy="mend or remove these rows, lower rollout.max_tokens, or raise max_failed_prompts",
            )
        draw.failed.append(failed.prompt.group_id)
        self._settle(failed.prompt.group_id, draw)

    def _scored(self, draw: _Draw, begun: float, generated: float, group: Group, table: ScoreTable) -> None:
        group_id = group.prompt.group_id
        scored = Scored(group, table, begun, generated, _now())
        if not self.buffer.holds(group_id):
            self._turn.note_dropped(group)
        elif draw.refills and not self.has_signal(group, table):
            draw.dead.append(scored)
        else:
            self.buffer.scored(group_id, scored)
        self._settle(group_id, draw)

    def _settle(self, group_id: int, draw: _Draw) -> None:
        draw.open.remove(group_id)
        if not draw.open:
            self._replace(draw)

    def _replace(self, draw: _Draw) -> None:
        """All of a list are settled: fresh prompts for those that failed, and for those without signal as long as there
        are refills; what is left of these is trained like any other."""
        held: list[Scored] = []
        for scored in sorted(draw.dead, key=lambda scored: scored.group_id):
            if self.buffer.holds(scored.group_id):
                held.append(scored)
            else:
                self._turn.note_dropped(scored.group)
        replaced, kept = held[: draw.refills], held[draw.refills :]
        gone = [g for g in draw.failed if self.buffer.holds(g)] + [scored.group_id for scored in replaced]
        for group_id in gone:
            self.buffer.give_up(group_id)
        draw.refills -= len(replaced)
        draw.failed, draw.dead = [], []
        self._turn.replaced += replaced
        for scored in kept:
            self.buffer.scored(scored.group_id, scored)
        if gone:
            self._hand_out(self._fresh(len(gone)), draw)


@dataclass
class _TurnCounts:
    """What came to nothing since the last turn. dropped_lengths: tokens of each completion of a dropped group, noted
    once they are known."""

    failures: list[FailedPrompt] = field(default_factory=list)
    replaced: list[Scored] = field(default_factory=list)
    dropped: int = 0
    dropped_lengths: list[int] = field(default_factory=list)

    def note_dropped(self, group: Group) -> None:
        self.dropped_lengths += [completion.length for completion in group.completions]


def _group_id(prompt: PromptItem) -> int:
    return prompt.group_id


def _now() -> float:
    return asyncio.get_running_loop().time()
