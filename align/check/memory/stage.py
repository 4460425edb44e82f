"""What a training stage of a recipe asks of memory: its trainer and its engines, and whether they fit the machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from align.check.facts import DataFacts
from align.check.machine import Machine
from align.check.memory.advice import Asked, verdict
from align.check.memory.plan import Estimate, Work, engine
from align.check.memory.sizes import Sizes, Table, human, others, tower_of
from align.engines import SHARE_OF_GPU
from align.recipe.adapter import Adapter
from align.recipe.capabilities import SamplingStage, TrainStage
from align.recipe.engines import facts_of
from align.recipe.schema import Recipe
from align.stages.jobs import reference_of
from align.stages.roles import Role


def dtype_of(gpu: bool, *names: str) -> str:
    """The first that is not auto; else the device's usual one."""
    return next((name for name in names if name != "auto"), "bfloat16" if gpu else "float32")


@dataclass(frozen=True)
class Load:
    """tokens: packed, of an update. longest: of one example, or of a group. sequences, length: what engines hold."""

    tokens: int
    longest: int
    sequences: int = 0
    length: int = 0

    @classmethod
    def of(cls, stage: TrainStage, facts: DataFacts) -> Load:
        if isinstance(stage, SamplingStage):
            groups, sequences = stage.batch.groups, stage.batch.groups * stage.batch.group_size
            packed = groups * facts.longest + sequences * stage.trained_tokens
            return cls(packed, facts.trained(stage), sequences, facts.sampled(stage))
        return cls(max(facts.longest, int(stage.batch.rows * facts.mean)), facts.longest)


@dataclass(frozen=True)
class SeenBy:
    """The recipe on a machine, with what was read of its model. table: of a model that reads images."""

    recipe: Recipe
    machine: Machine
    config: Mapping[str, Any]
    sizes: Sizes
    table: Table | None

    @property
    def gpu(self) -> bool:
        return self.machine.gpus > 0

    def memory(
        self, stage: TrainStage, adapter: Adapter, facts: DataFacts, roles: Sequence[Role]
    ) -> tuple[dict[str, Estimate], list[str]]:
        """Bytes by process, and lines about what does not fit."""
        load, ranks = Load.of(stage, facts), self.recipe.placement.trainer.ranks
        asked = self._trainer(stage, adapter, facts, load)
        trainer = "trainer" if ranks == 1 else f"each of {ranks} trainer ranks"
        found, times = {trainer: asked.estimate}, {trainer: ranks}
        if isinstance(stage, SamplingStage):
            found["each engine"] = self._engine(stage, load, _share(roles, "rollout-0"))
            times["each engine"] = stage.rollout.workers
        if self.gpu:
            return found, self._on_gpus(asked, _share(roles, "trainer"))
        rest = sum(times[who] * one.total for who, one in found.items() if who != trainer)
        return found, self._on_the_host(asked, rest, ranks)

    def _trainer(self, stage: TrainStage, adapter: Adapter, facts: DataFacts, load: Load) -> Asked:
        placed, budget = self.recipe.placement.trainer, stage.packing.budget(self.gpu)
        tokens = min(budget, load.tokens)
        work = Work(
            dtype_of(self.gpu, self.recipe.model.dtype),
            tokens=tokens,
            patches=int(tokens * facts.patches),
            several=load.tokens > budget * placed.ranks,
            second_copy=reference_of(stage) in ("start", "base"),
            checkpointing=self.recipe.model.gradient_checkpointing,
            head=stage.score_head is None,
            gpu=self.gpu,
            optimizer=stage.optim.name,
            strategy=placed.strategy.name,
            ranks=placed.ranks,
        )
        sizes = replace(self.sizes, others=others(self.table))
        return Asked(sizes, adapter, work, load.longest, self.table, tower_of(self.config))

    def _engine(self, stage: SamplingStage, load: Load, share: float) -> Estimate:
        """Some engines take what they are told to for keys and values, whatever comes."""
        rollout = stage.rollout
        facts = facts_of(rollout.name)
        sizes = replace(self.sizes, others=others(self.table))
        dtype = dtype_of(self.gpu, rollout.dtype, self.recipe.model.dtype)
        each = -(-load.sequences * (stage.staleness + 1) // rollout.workers)
        needed = engine(sizes, dtype, sequences=each, length=load.length)
        if facts.reserves is None:
            return needed
        reserved = rollout.engine.get(facts.reserves, None if self.gpu else facts.reserved_on_cpu)
        if reserved is None and self.machine.gpu_memory and share and facts.share:
            taken = float(rollout.engine.get(facts.share, SHARE_OF_GPU * share)) * self.machine.gpu_memory
            reserved = max(0.0, taken - needed.parts["weights"])
        return engine(sizes, dtype, sequences=each, length=load.length, reserved=reserved)

    def _on_gpus(self, asked: Asked, share: float) -> list[str]:
        device = "its GPU" if share >= 1 else f"its {share:g} of a GPU"
        budget = share * self.machine.gpu_memory
        said = verdict(asked, budget, device) if budget else None
        return [said] if said else []

    def _on_the_host(self, asked: Asked, rest: float, ranks: int) -> list[str]:
        """Trainer and engines share the machine's memory."""
        has, total = self.machine.memory, rest + ranks * asked.total
        if total <= has:
            return []
        said = [f"note: about {human(total)} in all; here are {human(has)}"]
        alone = not rest and ranks == 1
        left = max(0.0, (has - rest) / ranks)
        more = verdict(asked, left, "this machine" if alone else "what is left of this machine for it")
        return [*said, more] if more else said


def _share(roles: Sequence[Role], name: str) -> float:
    """Of a GPU, what the process of this name reserves."""
    return min(1.0, next((role.gpus for role in roles if role.name == name), 0.0))
