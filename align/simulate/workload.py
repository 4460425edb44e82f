"""What a simulated stage is made of: its sizes, and how long everything takes. Seconds and tokens throughout.

The service model of an engine. It samples up to `slots` sequences at once, one token of each per step; a step over n
sequences takes fixed_s + per_sequence_s * n: reading the weights, which all share, and what each adds. So throughput
n / (fixed_s + per_sequence_s * n) grows with n and saturates. A prompt is computed once for its group, and the engine
does nothing else for so long. Context length is not in the model: take speeds at a typical one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from align.errors import RecipeError
from align.simulate.lengths import Lengths
from align.stages.buffer import Overdue

Publishing = Literal["adapter", "drain", "in_flight"]
NEVER = float("inf")


@dataclass(frozen=True)
class EngineModel:
    """See the module. prompt_s: to compute a prompt. whole_batches: an engine that starts new groups only when all it
    had are done, and answers then (`rollout.name: transformers`)."""

    slots: int
    fixed_s: float
    per_sequence_s: float
    prompt_s: float = 0.0
    whole_batches: bool = False

    @classmethod
    def of(
        cls, alone: float, peak: float, slots: int, *, prompt_s: float = 0.0, whole_batches: bool = False
    ) -> EngineModel:
        """alone: tokens/s of one sequence that has an engine to itself; peak: of `slots` sequences together.

        Raises RecipeError where they fit no such engine: slower than one sequence, or faster than all without loss.
        """
        if not 0 < alone <= peak * (1 + 1e-9) or peak > slots * alone * (1 + 1e-9):
            raise RecipeError(
                f"an engine of {slots} slots with {alone:g} tokens/s of one sequence cannot reach {peak:g} tokens/s",
                where="--engine-peak",
                remedy=f"give a peak from {alone:g} to slots * engine-speed = {slots * alone:g} tokens/s",
            )
        each = (slots / peak - 1 / alone) / (slots - 1) if slots > 1 else 0.0
        return cls(slots, max(0.0, 1 / alone - max(0.0, each)), max(0.0, each), prompt_s, whole_batches)

    def step_s(self, sequences: int) -> float:
        return self.fixed_s + self.per_sequence_s * sequences

    @property
    def alone(self) -> float:
        return 1 / self.step_s(1)

    @property
    def peak(self) -> float:
        return self.slots / self.step_s(self.slots)


@dataclass(frozen=True)
class Workload:
    """One online stage.

    groups, group_size, overdue, refill: as the recipe's batch, `overdue`, and max_factor - 1 of `dynamic_sampling`.
    reward_s: from a scoring call to its answer, whatever it is given, and what a group waits for its environment.
    train_s: all updates of a turn whose completions have the mean length; a turn with more tokens takes longer in
    proportion. publish_s: from the end of training until every engine holds the version, beside what `publishing:
    drain` waits. loop_s: of a turn, the loop's own. silent: share of groups whose completions are all scored alike.
    between_failures_s: mean time until an engine fails, exponential; restart_s: until it serves again.
    """

    groups: int
    group_size: int
    engines: int
    engine: EngineModel
    lengths: Lengths
    reward_s: float = 0.0
    train_s: float = 0.0
    publish_s: float = 0.0
    loop_s: float = 0.0
    publishing: Publishing = "adapter"
    overdue: Overdue = "wait"
    refill: float = 0.0
    silent: float = 0.0
    between_failures_s: float = NEVER
    restart_s: float = 0.0
    seed: int = 0
