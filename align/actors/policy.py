"""The policy in its own process: a thin Ray shell around `PolicyTrainer`, and the proxy that stages speak to."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import ray

from align.actors.cluster import answer, die_with_parent, require_shared
from align.protocols import Metrics, Publication, Tree
from align.train.spec import TrainerSpec

if TYPE_CHECKING:
    from torch import Tensor

    from align.types import TokenBatch


class PolicyActor:
    """Lives in a Ray worker. `call` forwards to the methods of `PolicyTrainer`; nothing is decided here.

    The model is loaded in `start`, not in the constructor: of an exception there, Ray passes on the text alone.
    """

    def __init__(self) -> None:
        die_with_parent()

    def start(self, spec: TrainerSpec, token: Path, reference: Any = None) -> None:
        """token: see `require_shared`; reference: handle of a `ReferenceActor`, then given every packed batch."""
        require_shared(token)
        from align.train.trainer import PolicyTrainer

        def remote_reference(batch: TokenBatch) -> Tensor:
            logps: Tensor = ray.get(reference.batch_logps.remote(batch))
            return logps

        self.trainer = PolicyTrainer(spec, None if reference is None else remote_reference)

    def call(self, method: str, *arguments: Any, **options: Any) -> Any:
        return getattr(self.trainer, method)(*arguments, **options)


class RayTrainer:
    """`align.protocols.Trainer` over a `PolicyActor`."""

    def __init__(self, actor: Any, stage_id: str, *others: Any):
        """others: actors that live and end with this one (its reference)."""
        self.actor, self.others, self.who = actor, others, f"the trainer of stage {stage_id!r}"

    async def start(self, spec: TrainerSpec, token: Path) -> None:
        """Load the model; what is wrong with it is raised here. A failed start ends the actors."""
        try:
            await answer(self.actor.start.remote(spec, token, *self.others), self.who)
        except BaseException:
            await self.close()
            raise

    async def _call(self, method: str, *arguments: Any, **options: Any) -> Any:
        return await answer(self.actor.call.remote(method, *arguments, **options), self.who)

    async def step(self, trees: Sequence[Tree], *, step: int, progress: float) -> Metrics:
        metrics: Metrics = await self._call("step", list(trees), step=step, progress=progress)
        return metrics

    async def evaluate(self, trees: Sequence[Tree]) -> Metrics:
        metrics: Metrics = await self._call("evaluate", list(trees))
        return metrics

    async def logps(self, trees: Sequence[Tree]) -> list[list[np.ndarray]]:
        found: list[list[np.ndarray]] = await self._call("logps", list(trees))
        return found

    async def numerics(self) -> dict[str, Any]:
        facts: dict[str, Any] = await self._call("numerics")
        return facts

    async def publish(self, folder: Path, version: int) -> Publication:
        publication: Publication = await self._call("publish", folder, version)
        return publication

    async def save(self, folder: Path) -> None:
        await self._call("save", folder)

    async def restore(self, folder: Path) -> None:
        await self._call("restore", folder)

    async def write_model(self, folder: Path) -> None:
        await self._call("write_model", folder)

    async def describe(self) -> dict[str, Any]:
        described: dict[str, Any] = await self._call("describe")
        return described

    async def close(self) -> None:
        for actor in (self.actor, *self.others):
            ray.kill(actor)
