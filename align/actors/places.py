"""Where each role of a stage runs: placement groups for the trainer, the engines and the rewards, and what is said
where the cluster cannot hold them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from align.errors import PlacementError
from align.stages.roles import Role
from align.train import memory

PLACEMENT_LIMIT_S = 30.0
_TOGETHER_LIMIT_S = 5.0  # for room on one node, before ranks are laid on several
_TRAINING = ("trainer", "reference")


@dataclass(frozen=True)
class Reserved:
    """A placement group and its roles, one bundle each, in order."""

    roles: Sequence[Role]
    group: PlacementGroup


class Places:
    """One bundle per role. `at(role)` gives the options an actor is created with.

    The trainer's ranks (and a reference) share a group, on one node where one has room for all; engines another, on as
    few nodes as hold them; rewards a third, spread where the roles say so. A node that is lost takes its own bundles
    along: Ray reserves these again on another, and the other groups stay as they are.
    """

    def __init__(self, reserved: Sequence[Reserved]):
        self.reserved = reserved
        found = [(one.group, number, role) for one in reserved for number, role in enumerate(one.roles)]
        self._places = {role.name: (group, number) for group, number, role in found}
        self.roles = {role.name: role for _, _, role in found}

    @classmethod
    async def reserve(cls, roles: list[Role], replacement_s: float | None = None) -> Places:
        """Reserve a bundle per role. replacement_s: where the cluster had room for them before, and has lost a node
        since: how long to wait for another.

        Raises PlacementError, naming what is missing: at once where no node that is there will ever do and none is
        waited for, else when the time is over.
        """
        if replacement_s is None:
            check_fits(roles, living_nodes())
        limit_s = PLACEMENT_LIMIT_S if replacement_s is None else replacement_s
        deadline = time.monotonic() + limit_s
        reserved: list[Reserved] = []
        try:
            for part in _parts(roles, living_nodes()):
                reserved.append(Reserved(part, await _reserved(part, deadline, limit_s)))
        except BaseException:
            _release(reserved)
            raise
        return cls(reserved)

    def at(self, name: str) -> dict[str, Any]:
        """Ray options (resources, bundle, environment) for the actor of role `name`."""
        role, (group, number) = self.roles[name], self._places[name]
        return {
            "num_cpus": role.cpus,
            "num_gpus": role.gpus,
            "scheduling_strategy": PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=number),
            "runtime_env": environment_of(role),
        }

    def group_of(self, names: Sequence[str]) -> tuple[PlacementGroup, list[int]]:
        """The group that holds all these roles, and their bundles in it."""
        groups = [self._places[name][0] for name in names]
        assert all(group == groups[0] for group in groups), "roles of one part share a group"
        return groups[0], [self._places[name][1] for name in names]

    def threads(self, name: str) -> int:
        return self.roles[name].threads

    def release(self) -> None:
        _release(self.reserved)


def environment_of(role: Role) -> dict[str, Any]:
    """The runtime environment of a role's actor."""
    return {"env_vars": {**memory.ENVIRONMENT, **thread_environment(role.threads, role.passive)}}


def _release(reserved: Iterable[Reserved]) -> None:
    for one in reserved:
        remove_placement_group(one.group)


def _parts(roles: Sequence[Role], nodes: Mapping[str, Mapping[str, float]]) -> list[list[Role]]:
    """Roles by group, in the order of reservation: first what the fewest nodes can hold, so that nobody who could be
    elsewhere takes its place; then the group with the largest bundle, while there is most room."""
    parts: dict[tuple[str, bool], list[Role]] = {}
    for role in roles:
        part = role.name.partition("-")[0]
        parts.setdefault(("trainer" if part in _TRAINING else part, role.spread), []).append(role)

    def urgency(part: list[Role]) -> tuple[int, float, float]:
        choices = min(sum(_holds(node, role.resources) for node in nodes.values()) for role in part)
        gpus, cpus = max((role.gpus, role.cpus) for role in part)
        return choices, -gpus, -cpus

    return sorted(parts.values(), key=urgency)


async def _reserved(roles: Sequence[Role], deadline: float, limit_s: float) -> PlacementGroup:
    """A placement group that has its bundles. deadline: of `time.monotonic`. Raises PlacementError."""
    if _together(roles):  # ranks exchange gradients at every step
        group = await _granted(roles, "STRICT_PACK", min(deadline, time.monotonic() + _TOGETHER_LIMIT_S))
        if group is not None:
            return group
    group = await _granted(roles, "SPREAD" if roles[0].spread else "PACK", deadline)
    if group is None:
        check_fits(roles, living_nodes())
        raise PlacementError(
            f"the cluster did not free {_wanted(roles)} within {limit_s:.0f} s; free now: {_free()}",
            where="placement",
            remedy="end what else runs on this cluster, or ask for less in `placement:`",
        )
    return group


async def _granted(roles: Sequence[Role], strategy: str, deadline: float) -> PlacementGroup | None:
    """The group once it has its bundles; None, and nothing is reserved, where it has not by `deadline`."""
    group = placement_group([role.resources for role in roles], strategy=strategy)
    try:
        while not await asyncio.to_thread(group.wait, 1):
            if time.monotonic() > deadline:
                remove_placement_group(group)
                return None
    except BaseException:
        remove_placement_group(group)
        raise
    return group


def _together(roles: Sequence[Role]) -> bool:
    """Whether these are several ranks that a single node could hold, and there are others."""
    if len(roles) == 1 or not roles[0].name.startswith("trainer"):
        return False
    names = {name for role in roles for name in role.resources}
    whole = {name: sum(role.resources.get(name, 0.0) for role in roles) for name in names}
    nodes = living_nodes().values()
    return len(nodes) > 1 and any(_holds(node, whole) for node in nodes)


_PASSIVE = {"OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0", "GOMP_SPINCOUNT": "0"}


def thread_environment(threads: int, passive: bool) -> dict[str, str]:
    """Environment of a process that computes with `threads` threads. passive: a thread that waits for the others of its
    process sleeps at once; else it spins for the milliseconds that OpenMP does by default: most operations of a small
    model end sooner, and its training takes a fifth less time."""
    count = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    return count | (_PASSIVE if passive else {})


# ------------------------------------------------------------------------------------------------- what does not fit


def living_nodes() -> dict[str, dict[str, float]]:
    """What each living node has in all, by its name."""
    alive = (node for node in ray.nodes() if node["Alive"])
    return {f"{node['NodeManagerHostname']} ({node['NodeID'][:6]})": node["Resources"] for node in alive}


def _holds(node: Mapping[str, float], wanted: Mapping[str, float]) -> bool:
    return all(node.get(name, 0.0) >= amount - 1e-6 for name, amount in wanted.items())


def check_fits(roles: Sequence[Role], nodes: Mapping[str, Mapping[str, float]]) -> None:
    """What these nodes do not have will never be free: say so at once. nodes: what each has in all, by its name.

    Raises PlacementError, naming what is missing.
    """
    names = sorted({name for role in roles for name in role.resources})
    for role in roles:  # one process cannot span nodes
        if any(_holds(node, role.resources) for node in nodes.values()):
            continue
        lacking = [n for n, v in role.resources.items() if not any(_holds(node, {n: v}) for node in nodes.values())]
        what = f"no node has {_amounts({n: role.resources[n] for n in lacking or role.resources})}"
        raise PlacementError(
            f"{role.name} asks for {_amounts(role.resources)}, and {what}{'' if lacking else ' together'}; "
            f"there are: {_listed(nodes, names)}",
            where=f"placement.{role.kind.partition(' ')[0]}",
            remedy=_remedy(lacking),
        )
    for name in names:
        wanted = sum(role.resources.get(name, 0.0) for role in roles)
        has = sum(node.get(name, 0.0) for node in nodes.values())
        if wanted > has + 1e-6:
            detail = ", ".join(f"{r.name} {r.resources[name]:g}" for r in roles if name in r.resources)
            raise PlacementError(
                f"{wanted:g} {name} are asked for ({detail}), the cluster has {has:g}",
                where="placement",
                remedy=_remedy([name]),
            )


def _remedy(lacking: Sequence[str]) -> str:
    custom = [name for name in lacking if name not in ("CPU", "GPU")]
    if custom:
        return f"start a node with `ray start --address ... --resources '{{\"{custom[0]}\": N}}'`, or ask for less"
    key = f"placement.*.{lacking[0].lower()}s" if lacking else "placement"
    return f"lower `{key}` or `rollout.workers`, or join a larger cluster with --address"


def _amounts(resources: Mapping[str, float]) -> str:
    return ", ".join(f"{amount:g} {name}" for name, amount in resources.items())


def _listed(nodes: Mapping[str, Mapping[str, float]], names: Sequence[str]) -> str:
    shown = ({n: node[n] for n in names if node.get(n)} for node in nodes.values())
    return "; ".join(f"{name}: {_amounts(has) or 'none of it'}" for name, has in zip(nodes, shown, strict=True))


def _wanted(roles: Sequence[Role]) -> str:
    return "; ".join(f"{role.name}: {_amounts(role.resources)}" for role in roles)


def _free() -> str:
    free = ray.available_resources()
    return ", ".join(f"{free.get(name, 0.0):g} {name}" for name in ("CPU", "GPU"))
