"""The policy in processes of its own: a thin Ray shell around `PolicyTrainer`, and the proxy that stages speak to.

A trainer of several ranks is several actors. Each is sent every call with the same arguments, in the same order; rank
0's answer counts. They meet at a store that rank 0's process holds, and exchange gradients without Ray.
"""

from __future__ import annotations

import asyncio
import gc
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import ray

from align.actors.cluster import answer, die_with_parent
from align.errors import AlignError, RanksError
from align.packages import quick_imports
from align.protocols.trainer import Metrics, Publication
from align.protocols.trees import Tree
from align.recipe.parts import LossTerm
from align.shared_files import require_shared, source_here
from align.train.memory import give_back_freed_memory, resident_bytes
from align.train.spec import TrainerSpec

if TYPE_CHECKING:
    from torch import Tensor

    from align.types import TokenBatch


CAUSE_LIMIT_S = 15.0  # where ranks say that they lost another: how long to wait for that one's own error
TOGETHER_LIMIT_S = 2.0  # an error that all ranks have arrives from all within this
RESTING_BYTES = 1 << 30  # resident, of a process that waits for another trainer: its libraries, and gaps
REST_LIMIT_S = 10.0


@dataclass(frozen=True)
class Seat:
    """Which of how many ranks an actor is, where they meet, and the device that sends its gradients."""

    rank: int
    size: int
    address: tuple[str, int]
    wire: str


def load_libraries() -> None:
    """Import what a trainer is made of."""
    with quick_imports():
        import peft  # noqa: F401

        import align.train.trainer  # noqa: F401


def _found_here(term: LossTerm, token: Path) -> LossTerm:
    """A loss of the user's, where this node has its source."""
    return term.model_copy(update={"name": source_here(term.name, token.parent)})


class PolicyActor:
    """Lives in a Ray worker. `call` forwards to the methods of `PolicyTrainer`; nothing is decided here.

    The model is loaded in `start`, not in the constructor: of an exception there, Ray passes on the text alone.
    """

    def __init__(self) -> None:
        die_with_parent()

    def do(self, task: Callable[..., Any], *arguments: Any) -> Any:
        """What a function answers that needs torch, or loads it: `load_libraries`, a task of `files`. Before `start` or
        after `rest`."""
        try:
            return task(*arguments)
        finally:
            give_back_freed_memory()

    def rest(self) -> bool:
        """Let go of the trainer, so that another may start here; whether little enough stays of it."""
        del self.trainer
        gc.collect()
        give_back_freed_memory()
        stays = resident_bytes()
        return stays is not None and stays < RESTING_BYTES

    def host(self, size: int) -> tuple[str, int]:
        """Open the store at which `size` ranks meet; its address. It listens there alone: torch's own socket would on
        every interface."""
        from torch.distributed import TCPStore

        address = ray.util.get_node_ip_address()
        server = socket.create_server((address, 0), family=socket.AF_INET6 if ":" in address else socket.AF_INET)
        port = int(server.getsockname()[1])
        self.store = TCPStore(
            address, port, size, is_master=True, wait_for_workers=False, master_listen_fd=server.detach()
        )
        return address, port

    def start(self, spec: TrainerSpec, token: Path, reference: Any = None, seat: Seat | None = None) -> None:
        """token: see `require_shared`; reference: handle of a `ReferenceActor`, then given every packed batch."""
        require_shared(token, spec.base, spec.adapter)
        load_libraries()
        spec = replace(spec, losses=tuple(_found_here(term, token) for term in spec.losses))
        from align.train.ranks import Ranks
        from align.train.trainer import PolicyTrainer

        ranks = Ranks()
        if seat is not None:
            ranks = Ranks.join(seat.rank, seat.size, store=self._store(seat), device=seat.wire)

        def remote_reference(batch: TokenBatch) -> Tensor:
            logps: Tensor = ray.get(reference.batch_logps.remote(batch))
            return logps

        self.trainer = PolicyTrainer(spec, None if reference is None else remote_reference, ranks)

    def _store(self, seat: Seat) -> Any:
        from torch.distributed import TCPStore

        return self.store if seat.rank == 0 else TCPStore(*seat.address, seat.size, is_master=False)

    def call(self, method: str, *arguments: Any, **options: Any) -> Any:
        """What the trainer answers; None from ranks after the first, whose answer would be the same."""
        found = getattr(self.trainer, method)(*arguments, **options)
        return found if self.trainer.ranks.rank == 0 else None


class RayTrainer:
    """`align.protocols.trainer.Trainer` over a `PolicyActor` for each rank."""

    def __init__(
        self,
        actors: Sequence[Any],
        stage_id: str,
        reference: Any = None,
        wire: str = "cpu",
        leave: Callable[[Any | None], None] | None = None,
    ):
        """reference: an actor that lives and ends with these. wire: the device that sends gradients between ranks.
        leave: is given the only actor when this is closed, where none of its calls failed, else None."""
        self.actors, self.reference, self.wire, self.leave = list(actors), reference, wire, leave
        self.failed = False
        self.who = f"the trainer of stage {stage_id!r}"

    async def start(self, spec: TrainerSpec, token: Path) -> None:
        """Load the model; what is wrong with it is raised here. A failed start ends the actors."""
        try:
            seats: list[Seat | None] = [None]
            size = len(self.actors)
            if size > 1:
                address = await answer(self.actors[0].host.remote(size), self.who)
                seats = [Seat(rank, size, address, self.wire) for rank in range(size)]
            started = [a.start.remote(spec, token, self.reference, s) for a, s in zip(self.actors, seats, strict=True)]
            await self._answers(started)
        except BaseException:
            await self.close()
            raise

    async def _call(self, method: str, *arguments: Any, **options: Any) -> Any:
        if len(self.actors) > 1:
            arguments = tuple(ray.put(argument) for argument in arguments)  # trees are stored once, not once a rank
        return await self._answers([actor.call.remote(method, *arguments, **options) for actor in self.actors])

    async def _answers(self, references: Sequence[Any]) -> Any:
        """Rank 0's answer, when all have answered. An error of one rank ends the others: they would wait for it."""
        if len(references) == 1:
            try:
                return await answer(references[0], self.who)
            except BaseException:
                self.failed = True
                raise
        names = [f"rank {rank} of {self.who}" for rank in range(len(references))]
        tasks = [asyncio.ensure_future(answer(r, name)) for r, name in zip(references, names, strict=True)]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
            if not _errors(tasks):
                return tasks[0].result()
            known = any(not isinstance(error, RanksError) for error in _errors(tasks))
            await asyncio.wait(tasks, timeout=TOGETHER_LIMIT_S if known else CAUSE_LIMIT_S)
        finally:
            for task in tasks:
                task.cancel()
        errors = _errors(tasks)
        if len(errors) < len(tasks) or len({type(error) for error in errors}) > 1:
            await self.close()  # they are no longer in step
        raise min(errors, key=lambda error: isinstance(error, RanksError))  # the cause, rather than its echo

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

    async def forward(self) -> dict[str, Any]:
        found: dict[str, Any] = await self._call("forward")
        return found

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
        leave, self.leave = self.leave, None
        if leave is not None:
            leave(self.actors.pop() if not self.failed and await _rests(self.actors[0]) else None)
        for actor in (*self.actors, self.reference):
            if actor is not None:
                ray.kill(actor)


async def _rests(actor: Any) -> bool:
    try:
        return bool(await asyncio.wait_for(answer(actor.rest.remote(), "a trainer that ends"), REST_LIMIT_S))
    except (AlignError, TimeoutError):
        return False


def _errors(tasks: Sequence[asyncio.Task[Any]]) -> list[BaseException]:
    """What the finished ones of `tasks` raised, by rank."""
    found = [task.exception() for task in tasks if task.done() and not task.cancelled()]
    return [error for error in found if error is not None]
