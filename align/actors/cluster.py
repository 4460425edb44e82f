"""The Ray cluster of a run: started here or joined, and what each role may use of it.

On one machine a run starts its own cluster in a short-lived folder and takes it down again. Every worker first imports
our packages, so that a user's `rewards.py` in the working directory cannot take their place.
"""

from __future__ import annotations

import asyncio
import ctypes
import logging
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from align import packages
from align.errors import AlignError, PlacementError, RunFolderError, SetupError
from align.stages.owned import owned_folder
from align.stages.roles import Role

PLACEMENT_LIMIT_S = 30.0
_REACH_LIMIT_S = 10.0
OBJECT_STORE_BYTES = 512 << 20  # trees, groups and packed batches; weights travel as files
# our actors start their own workers, with threads of their own
_SYSTEM_CONFIG = {"enable_worker_prestart": False, "prestart_worker_first_driver": False}
_ENVIRONMENT = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}


def die_with_parent() -> None:
    """Ask the kernel to kill this process when its parent dies (Linux; elsewhere Ray's own watch must do)."""
    if sys.platform.startswith("linux"):
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG, prctl(2)
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL, 0, 0, 0)


def require_shared(token: Path) -> None:
    """Raise RunFolderError where this node does not see the file that the driver put into the run folder."""
    if not token.is_file():
        raise RunFolderError(
            f"node {socket.gethostname()} does not see the run folder",
            where=token.parent,
            remedy="use a shared path: output=<a folder that every node mounts>",
        )


class Cluster:
    """A connection to Ray. `local` when it was started here and ends here; `folder` holds its sockets and logs."""

    def __init__(self, address: str | None, *, run_folder: Path, cores: int | None = None):
        """Start a cluster on this machine, with `cores` of it, or join the one at `address`. Raises SetupError where
        that fails.

        Must be called from the main thread: Ray's processes die with the thread that started them.
        """
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        self.run_folder, self.local = run_folder, address is None
        if address is not None:
            _check_reachable(address)
        # sockets have paths of at most 107 bytes, so not in the run folder
        self.folder = owned_folder(Path(tempfile.gettempdir())) if self.local else None
        own = {
            "include_dashboard": False,
            "num_cpus": cores,
            "object_store_memory": OBJECT_STORE_BYTES,
            "_temp_dir": str(self.folder),
            "_system_config": _SYSTEM_CONFIG,
        }
        # what libraries leave in the temporary folder (vLLM's rendezvous files, when it is killed) goes with the run
        temporary = {"TMPDIR": str(self.folder)} if self.local else {}
        try:
            ray.init(
                address=address or "local",
                log_to_driver=False,
                logging_level=logging.ERROR,
                runtime_env={"worker_process_setup_hook": packages.bind, "env_vars": temporary},
                **(own if self.local else {}),
            )
        except (RayError, ConnectionError, RuntimeError, ValueError, OSError) as error:
            self._remove_folder()
            where = address or "this machine"
            raise SetupError(
                f"Ray cannot be reached: {error}" if address else f"Ray cannot be started: {error}",
                where=where,
                remedy="check the address with `ray status`" if address else "`align doctor` examines this machine",
            ) from error

    @property
    def nodes(self) -> int:
        return sum(1 for node in ray.nodes() if node["Alive"])

    def total(self, resource: str) -> float:
        return float(ray.cluster_resources().get(resource, 0.0))

    @property
    def cores(self) -> int:
        """CPUs of the largest node: what one trainer or engine process can use."""
        return max(1, *(int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]))

    def close(self) -> None:
        """Disconnect; a local cluster ends with its workers, and its logs of note move to the run folder."""
        ray.shutdown()
        self._keep_logs()
        self._remove_folder()

    def _keep_logs(self) -> None:
        """What our workers wrote to their standard output and error, into `<run>/logs/`."""
        if self.folder is None or not self.run_folder.is_dir():
            return
        for path in (self.folder / "session_latest" / "logs").glob("worker-*"):
            if path.stat().st_size:
                target = self.run_folder / "logs"
                target.mkdir(exist_ok=True)
                parts = path.stem.split("-")
                shutil.copyfile(path, target / f"worker-{parts[-1]}{path.suffix}")

    def _remove_folder(self) -> None:
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)


def _check_reachable(address: str) -> None:
    """Raise SetupError where nothing listens at `host:port`: Ray itself would go on trying for minutes."""
    if address == "auto":
        return
    host, _, port = address.rpartition(":")
    if "://" in address or not host or not port.isdigit():
        raise SetupError(
            f"{address!r} is no address of a Ray cluster",
            where="--address",
            remedy="give host:port as `ray start --head` prints it, or auto; run on a machine of the cluster",
        )
    try:
        socket.create_connection((host, int(port)), timeout=_REACH_LIMIT_S).close()
    except OSError as error:
        raise SetupError(
            f"no Ray cluster answers at {address}: {error.strerror or error}",
            where="--address",
            remedy="check it with `ray status --address ...`; a cluster is started by `ray start --head`",
        ) from error


class Places:
    """One bundle per role: packed on as few nodes as hold them, those that say `spread` on as many as there are.
    `at(role)` gives the options an actor is created with.

    group: of the packed roles. roles: by name, the number of its bundle in its own group and the role.
    """

    def __init__(self, packed: tuple[list[Role], PlacementGroup], spread: tuple[list[Role], PlacementGroup] | None):
        self.group = packed[1]
        self._groups = [packed] if spread is None else [packed, spread]
        self.roles = {role.name: (number, role) for roles, _ in self._groups for number, role in enumerate(roles)}

    @classmethod
    async def reserve(cls, cluster: Cluster, roles: list[Role]) -> Places:
        """Reserve a bundle per role. Raises PlacementError within 30 s, naming the resource that is short."""
        _check_fits(cluster, roles)
        packed, spread = [r for r in roles if not r.spread], [r for r in roles if r.spread]
        deadline = time.monotonic() + PLACEMENT_LIMIT_S
        first = await _reserved(packed, "PACK", deadline)
        try:
            second = (spread, await _reserved(spread, "SPREAD", deadline)) if spread else None
        except BaseException:
            remove_placement_group(first)
            raise
        return cls((packed, first), second)

    def at(self, name: str) -> dict[str, Any]:
        """Ray options (resources, bundle, environment) for the actor of role `name`."""
        number, role = self.roles[name]
        group = next(group for roles, group in self._groups if role in roles)
        return {
            "num_cpus": role.cpus,
            "num_gpus": role.gpus,
            "scheduling_strategy": PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=number),
            "runtime_env": {"env_vars": thread_environment(role.threads)},
        }

    def threads(self, name: str) -> int:
        return self.roles[name][1].threads

    def release(self) -> None:
        for _, group in self._groups:
            remove_placement_group(group)


async def _reserved(roles: list[Role], strategy: str, deadline: float) -> PlacementGroup:
    """A placement group that has its bundles. deadline: of `time.monotonic`. Raises PlacementError."""
    group = placement_group([role.resources for role in roles], strategy=strategy)
    while not await asyncio.to_thread(group.wait, 1):
        if time.monotonic() > deadline:
            remove_placement_group(group)
            raise PlacementError(
                f"the cluster did not free {_wanted(roles)} within {PLACEMENT_LIMIT_S:.0f} s; free now: {_free()}",
                where="placement",
                remedy="end what else runs on this cluster, or ask for less in `placement:`",
            )
    return group


def thread_environment(threads: int) -> dict[str, str]:
    """Environment of a process that computes with `threads` threads and waits passively: trainer and engine take
    turns on the same cores, and a spinning waiter would take them from the one at work."""
    count = str(threads)
    return {
        "OMP_NUM_THREADS": count,
        "MKL_NUM_THREADS": count,
        "OMP_WAIT_POLICY": "PASSIVE",
        "KMP_BLOCKTIME": "0",
        "GOMP_SPINCOUNT": "0",
    }


def _check_fits(cluster: Cluster, roles: list[Role]) -> None:
    """What the whole cluster does not have will never be free: say so at once."""
    for resource in ("CPU", "GPU"):
        wanted = sum(role.resources.get(resource, 0.0) for role in roles)
        if wanted > cluster.total(resource) + 1e-6:
            detail = ", ".join(
                f"{role.name} {role.resources[resource]:g}" for role in roles if resource in role.resources
            )
            raise PlacementError(
                f"{wanted:g} {resource} are asked for ({detail}), the cluster has {cluster.total(resource):g}",
                where="placement",
                remedy=f"lower `placement.*.{resource.lower()}s` or `rollout.workers`, or join a larger cluster "
                "with --address",
            )
    largest: Mapping[str, float] = max(
        (node["Resources"] for node in ray.nodes() if node["Alive"]), key=lambda r: r.get("CPU", 0.0)
    )
    for role in roles:
        for resource, amount in role.resources.items():
            if amount > max(float(n["Resources"].get(resource, 0.0)) for n in ray.nodes() if n["Alive"]) + 1e-6:
                raise PlacementError(
                    f"{role.name} asks for {amount:g} {resource}, the largest node has {largest.get(resource, 0.0):g}",
                    where=f"placement.{role.name}",
                    remedy="one process cannot span nodes: ask for less",
                )


def _wanted(roles: list[Role]) -> str:
    return "; ".join(f"{role.name}: " + ", ".join(f"{v:g} {k}" for k, v in role.resources.items()) for role in roles)


def _free() -> str:
    free = ray.available_resources()
    return ", ".join(f"{free.get(name, 0.0):g} {name}" for name in ("CPU", "GPU"))


async def answer(reference: Any, who: str) -> Any:
    """Await an actor's or task's result; our own errors arrive as themselves, others and a dead process as an
    AlignError (the whole traceback is its cause, which --debug shows)."""
    try:
        return await asyncio.wrap_future(reference.future())
    except RayTaskError as error:
        cause = getattr(error, "cause", None)
        if isinstance(cause, AlignError):
            raise cause from None
        said = f"{type(cause).__name__}: {_first_line(cause)}" if cause is not None else _first_line(error)
        raise AlignError(
            f"{who} failed: {said}", remedy="the same command with --debug shows where; logs/ has what it printed"
        ) from error
    except RayActorError as error:
        raise AlignError(
            f"{who} died: {_first_line(error)}",
            remedy="the run folder's logs/ has what it printed; out of memory is the usual cause. --resume continues",
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0]
