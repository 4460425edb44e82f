"""The machine that a run would start its own cluster on, and whether the roles of a stage fit on it."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

from align.errors import PlacementError
from align.recipe.capabilities import StageBase
from align.recipe.schema import Recipe
from align.stages.jobs import needs_of
from align.stages.roles import Role, roles_of


@dataclass(frozen=True)
class Machine:
    """Cores, GPUs and bytes of memory of the machine that a run would start its own cluster on. gpu_memory: of its
    smallest GPU; 0 where it is not known."""

    cores: int
    gpus: float
    memory: int
    gpu_memory: int = 0

    @classmethod
    def here(cls, cores: int | None = None) -> Machine:
        """This machine, or so many of its cores. Raises PlacementError for more than it has, or none."""
        there = os.cpu_count() or 1
        if cores is not None and not 1 <= cores <= there:
            raise PlacementError(f"{cores} of {there} cores", where="--cores", remedy=f"give 1 to {there}")
        gpus, memory = _gpus(), os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return cls(cores or there, gpus, memory, _gpu_memory() if gpus else 0)


def _gpus() -> int:
    """NVIDIA GPUs that Ray will count: those CUDA_VISIBLE_DEVICES leaves of those that the driver shows."""
    present = list(Path("/proc/driver/nvidia/gpus").glob("*"))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return len(present)
    return min(len(present), len([name for name in visible.split(",") if name.strip() not in ("", "-1")]))


def _gpu_memory() -> int:
    """Bytes of the smallest GPU, as the driver's tool says; 0 where it says nothing."""
    asked = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(asked, capture_output=True, text=True, timeout=10, check=True).stdout
        return min((int(line) for line in said.split("\n") if line.strip()), default=0) << 20
    except (OSError, subprocess.SubprocessError, ValueError):
        return 0


def stage_roles(recipe: Recipe, stage: StageBase, machine: Machine, sampling: int | None = None) -> list[Role]:
    """What a stage reserves on the machine."""
    needs = needs_of(stage)
    return roles_of(needs, recipe.placement, cores=machine.cores, gpus=machine.gpus, threads={}, sampling=sampling)


def check_fits(roles: list[Role], machine: Machine) -> None:
    """Raise PlacementError where the roles of a stage ask for more than the machine has."""
    for role in roles:
        for name in role.custom:
            raise PlacementError(
                f"{role.name} asks for {name!r}, a resource that nodes of a cluster are given",
                where=f"placement.{role.kind.partition(' ')[0]}.resources",
                remedy="join the cluster with --address, or leave it out on one machine",
            )
    for resource, has in (("CPU", machine.cores), ("GPU", machine.gpus)):
        wanted = sum(role.resources.get(resource, 0.0) for role in roles)
        if wanted > has + 1e-6:
            detail = ", ".join(f"{r.name} {r.resources[resource]:g}" for r in roles if resource in r.resources)
            raise PlacementError(
                f"{wanted:g} {resource}s are asked for ({detail}), this machine has {has:g}",
                where="placement",
                remedy=f"lower `placement.*.{resource.lower()}s` or `rollout.workers`, or join a larger cluster with "
                "--address",
            )
