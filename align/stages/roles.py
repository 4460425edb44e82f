"""What runs at the same time in a stage and how much of a machine each part reserves. Arithmetic only: `align check`
prints it, and the Ray backend asks for it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from align.recipe.placement import Placement, Share
from align.stages.backend import Needs

OVERLAPPED = " (asynchronous)"  # part of the name of threads counts in run.json
SMALL_MODEL = 10_000_000  # parameters
REWARD_CPUS = 0.01  # reward actors wait for their plugins' processes and compute nothing themselves


@dataclass(frozen=True)
class Role:
    """What one bundle of a stage reserves, and the threads its process computes with. kind: what it has in common with
    the bundles that get as many threads. spread: it should be on another node than its like. custom: resources of a
    node that the recipe names. passive: other roles compute at the same time on the cores that its threads have."""

    name: str
    kind: str
    cpus: float
    gpus: float
    threads: int
    spread: bool = False
    custom: Mapping[str, float] = field(default_factory=dict)
    passive: bool = False

    @property
    def resources(self) -> dict[str, float]:
        wanted = {"CPU": self.cpus, "GPU": self.gpus, **self.custom}
        return {name: amount for name, amount in wanted.items() if amount > 0}


def sampling_threads(parameters: int | None) -> int | None:
    """Threads of an engine that a model of this size asks for, None where as many as there are serve it best. Threads
    wait for each other in every operation: on two cores a model of a million parameters is sampled twice as fast by one
    as by two (tests/bench/results, async against sync)."""
    return 1 if parameters is not None and parameters <= SMALL_MODEL else None


def roles_of(
    needs: Needs,
    share: Placement,
    *,
    cores: int,
    gpus: float,
    threads: Mapping[str, int],
    sampling: int | None = None,
) -> list[Role]:
    """Bundles of a stage. By default trainer and engines halve the cores between them. In a synchronous stage they take
    turns and each computes with all cores; in an asynchronous one (`needs.overlap`) each with its half, which several
    engines share. The trainer's ranks compute at the same time: they divide both.

    cores: of the largest node; gpus: of the whole cluster. threads: counts by kind of role that override the default
    (those a resumed run began with). sampling: threads of each engine, see `sampling_threads`.
    """
    sampling = sampling or (max(1, cores // 2 // max(1, needs.engines)) if needs.overlap else cores)
    training = max(1, cores // 2) if needs.overlap else cores

    def role(name: str, own: Share, cpus: float, gpu: float, default_threads: int, spread: bool = False) -> Role:
        kind = name.partition("-")[0] + (OVERLAPPED if needs.overlap else "")
        chosen = own.threads or threads.get(kind) or default_threads
        return Role(
            name=name,
            kind=kind,
            cpus=own.cpus if own.cpus is not None else math.floor(cpus * 1e4 + 1e-6) / 1e4,  # Ray counts 1/10,000
            gpus=own.gpus if own.gpus is not None else gpu,
            threads=chosen,
            spread=spread,
            custom=own.resources,
            passive=needs.overlap or share.trainer.ranks > 1 or needs.engines > 1,
        )

    sides = (1 if needs.trainer else 0) + (1 if needs.engines else 0)
    side = (float(cores) - needs.scorers * share.rewards.count * REWARD_CPUS) / max(1, sides)
    trained = side / 2 if needs.reference else side
    ranks = share.trainer.ranks
    gpu = _gpu_share(needs, gpus, ranks)
    roles = []
    if needs.trainer:
        for name in trainer_names(ranks):
            roles.append(role(name, share.trainer, trained / ranks, gpu, max(1, training // ranks)))
    if needs.reference:
        roles.append(role("reference", share.reference, trained, gpu, training))
    for number in range(needs.engines):
        roles.append(role(f"rollout-{number}", share.rollout, side / needs.engines, gpu, sampling))
    for number in range(needs.scorers):
        for name in scorer_names(number, share.rewards.count):
            roles.append(role(name, share.rewards, REWARD_CPUS, 0.0, 1, spread=share.rewards.count > 1))
    if needs.files:
        roles.append(role("files", Share(), 1.0, 0.0, cores))
    return roles


def trainer_names(ranks: int) -> list[str]:
    """Names of the roles of a trainer's ranks, by rank."""
    return [f"trainer-{rank}" if rank else "trainer" for rank in range(ranks)]


def scorer_names(number: int, count: int) -> list[str]:
    """Names of the roles of a scorer's reward actors."""
    return [f"rewards-{number}" if count == 1 else f"rewards-{number}-{actor}" for actor in range(count)]


def _gpu_share(needs: Needs, gpus: float, ranks: int) -> float:
    """A GPU for each process that computes, or an equal part: of 4 GPUs, 5 processes get half a one each."""
    users = int(needs.trainer) * ranks + int(needs.reference) + needs.engines
    return 0.0 if not gpus or not users else int(100 / math.ceil(users / gpus)) / 100
