"""A run that lost a trainer rank, a task or the node below it goes on from the last checkpoint, as `--resume` would.

Engines and rewards that are lost are started again by those who hold them, and the stage never knows. What is left is
the trainer: its weights are gone, so the stage is run again from its newest checkpoint, and repeats the undisturbed run
bit for bit. A process that dies because of what it is asked to do (it is out of memory) dies there again: a second loss
at the same step ends the run.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from align.errors import LostError
from align.stages.metrics_file import METRICS, last_step
from align.stages.runfolder import RunFolder

MAX_RESTARTS = 3  # on a cluster, where the recipe does not say
T = TypeVar("T")


class Restarts:
    """How often a run may still start a stage again. Each time is in run.json (`restarts`: stage, step, time, cause),
    on the screen, and counted in the stage's summary.

    allowed: of the whole run, since this process began.
    """

    def __init__(self, allowed: int, run: RunFolder, tell: Callable[[str], None]):
        self.allowed, self.run, self.tell = allowed, run, tell
        self._done = 0

    async def survive(self, stage_id: str, attempt: Callable[[], Awaitable[T]]) -> T:
        """What `attempt` returns, which runs the stage from its start or its newest checkpoint.

        Raises LostError where it may not be tried again; what else `attempt` raises passes through.
        """
        before: int | None = None
        while True:
            try:
                return await attempt()
            except LostError as lost:
                step = last_step(self.run.stage_folder(stage_id) / METRICS)
                self._require_another(lost, before, step)
                before = step
                self._note(stage_id, step, lost)

    def _require_another(self, lost: LostError, before: int | None, step: int) -> None:
        if self.allowed == 0:
            raise lost
        if before == step:
            why = f"; it was restarted, and was lost again after step {step}: the cause stays"
        elif self._done >= self.allowed:
            why = f"; it was restarted {self._done} times, as placement.max_restarts allows"
        else:
            return
        raise type(lost)(f"{lost.what}{why}", where=lost.where, remedy=lost.remedy) from lost

    def _note(self, stage_id: str, step: int, lost: LostError) -> None:
        self._done += 1
        entry = {"stage": stage_id, "step": step, "time": round(time.time(), 3), "cause": lost.what}
        self.run.state.setdefault("restarts", []).append(entry)
        self.run.write()
        self.run.clean(stage_id)
        self.tell(
            f"{stage_id}: {lost.what}; restart {self._done} of {self.allowed}, from the last checkpoint "
            f"(it was at step {step})"
        )

    def count(self, stage_id: str) -> int:
        """Of a stage, by all processes that worked on the run."""
        return sum(entry["stage"] == stage_id for entry in self.run.state.get("restarts", ()))
