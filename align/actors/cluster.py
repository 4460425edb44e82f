"""The Ray cluster of a run: started here or joined, and what each role may use of it.

On one machine a run starts its own cluster in a short-lived folder and takes it down again. Every worker first imports
our packages, so that a user's `rewards.py` in the working directory cannot take their place.
"""

from __future__ import annotations

import asyncio
import ctypes
import logging
import os
import secrets
import shutil
import signal
import socket
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import ray
from ray._private import ray_constants
from ray.exceptions import (
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    RayTaskError,
    WorkerCrashedError,
)

from align import packages
from align.actors.head import HeadWatch
from align.errors import AlignError, LostError, SetupError
from align.oserrors import described, is_known, of_system
from align.stages.owned import owned_folder

_REACH_LIMIT_S = 10.0
_RAY = "ray"  # of a cluster's folder: what Ray writes
OBJECT_STORE_BYTES = 512 << 20  # trees, groups and packed batches; weights travel as files
# our actors start their own workers, with threads of their own
_SYSTEM_CONFIG = {"enable_worker_prestart": False, "prestart_worker_first_driver": False}
_ENVIRONMENT = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
# A cluster of one machine listens on the loopback interface alone. Ray takes an address from the network card, whatever
# it is given, unless this switch says that there are no other nodes (it is off on macOS and Windows).
_CLUSTERS = ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR
_LOOPBACK = {"VLLM_HOST_IP": "127.0.0.1", **({"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {})}
_TOKENS = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")

# a process or its node is gone; RayTaskError, an exception inside of one, may be raised as a subclass of its cause
_LOST = (RayActorError, WorkerCrashedError, NodeDiedError, OutOfMemoryError, ObjectLostError)


def die_with_parent() -> None:
    """Ask the kernel to kill this process when its parent dies (Linux; elsewhere Ray's own watch must do)."""
    if sys.platform.startswith("linux"):
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG, prctl(2)
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL, 0, 0, 0)


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
        self._undo = ExitStack()
        if self.local:
            self._listen_here_alone()
        own = {
            "include_dashboard": False,
            "num_cpus": cores,
            "object_store_memory": OBJECT_STORE_BYTES,
            # one below ours, which nobody else may enter: Ray opens its own to everybody
            "_temp_dir": str(self.folder and self.folder / _RAY),
            "_system_config": _SYSTEM_CONFIG,
        }
        # what libraries leave in the temporary folder (vLLM's rendezvous files, when it is killed) goes with the run
        temporary = {"TMPDIR": str(self.folder), **_LOOPBACK} if self.local else {}
        try:
            ray.init(
                address=address or "local",
                log_to_driver=False,
                logging_level=logging.ERROR,
                runtime_env={"worker_process_setup_hook": packages.bind, "env_vars": temporary},
                **(own if self.local else {}),
            )
        except Exception as error:  # where a node does not come up in time, Ray raises just that
            self._end()
            where = address or "this machine"
            said = _first_line(error)
            raise SetupError(
                f"Ray cannot be reached: {said}" if address else f"Ray cannot be started: {said}",
                where=where,
                remedy="check the address with `ray status`"
                if address
                else "`align doctor` examines this machine; one that is busy may need a second try (--resume)",
            ) from error

        head = None if self.local else str(ray.get_runtime_context().gcs_address)
        self.watch = HeadWatch(head)

    def total(self, resource: str) -> float:
        return float(ray.cluster_resources().get(resource, 0.0))

    @property
    def cores(self) -> int:
        """CPUs of the largest node: what one trainer or engine process can use."""
        return max(1, *(int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]))

    def close(self) -> None:
        """Disconnect; a local cluster ends with its workers, and its logs of note move to the run folder."""
        if self.watch.gone is None:
            self.watch.close()
        ray.shutdown()
        self.watch.close()
        self._keep_logs()
        self._end()

    def _listen_here_alone(self) -> None:
        """Loopback sockets, and a token of this process' own: Ray would write one to the home folder, for everybody to
        read. A token that the user chose is kept."""
        if not any(name in os.environ for name in _TOKENS):
            os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
        before = os.environ.get(_CLUSTERS), ray_constants.ENABLE_RAY_CLUSTER
        os.environ[_CLUSTERS], ray_constants.ENABLE_RAY_CLUSTER = "0", False  # for Ray's processes, and for this one

        def undo() -> None:
            ray_constants.ENABLE_RAY_CLUSTER = before[1]
            os.environ.pop(_CLUSTERS)
            if before[0] is not None:
                os.environ[_CLUSTERS] = before[0]

        self._undo.callback(undo)

    def _keep_logs(self) -> None:
        """What our workers wrote to their standard output and error, into `<run>/logs/`."""
        if self.folder is None or not self.run_folder.is_dir():
            return
        for path in (self.folder / _RAY / "session_latest" / "logs").glob("worker-*"):
            if path.stat().st_size:
                target = self.run_folder / "logs"
                target.mkdir(exist_ok=True)
                parts = path.stem.split("-")
                shutil.copyfile(path, target / f"worker-{parts[-1]}{path.suffix}")

    def _end(self) -> None:
        self._undo.close()
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
            remedy="give host:port as `ray start --head` prints it, or auto, on a machine of the cluster; from "
            "elsewhere `align submit --address http://HEAD:8265`",
        )
    try:
        socket.create_connection((host, int(port)), timeout=_REACH_LIMIT_S).close()
    except OSError as error:
        raise SetupError(
            f"no Ray cluster answers at {address}: {error.strerror or error}",
            where="--address",
            remedy="check it with `ray status --address ...`; a cluster is started by `ray start --head`",
        ) from error


async def answer(reference: Any, who: str) -> Any:
    """Await an actor's or task's result; our own errors arrive as themselves, a dead process or node as a LostError,
    others as an AlignError (the whole traceback is its cause, which --debug shows)."""
    try:
        return await asyncio.wrap_future(reference.future())
    except asyncio.CancelledError as error:
        own = asyncio.current_task()
        if own is None or own.cancelling():
            raise
        raise LostError(f"the answer of {who} was given up", remedy="--resume continues") from error
    except RayTaskError as error:
        cause = getattr(error, "cause", None)
        if isinstance(cause, AlignError):
            raise cause from None
        said = f"{type(cause).__name__}: {_first_line(cause)}" if cause is not None else _first_line(error)
        system = None if cause is None else of_system(cause)
        if system is not None and is_known(system):  # a full disk under a checkpoint
            told = described(system)
            raise AlignError(f"{who} failed: {told.what}", where=told.where, remedy=told.remedy) from error
        kind = LostError if isinstance(cause, _LOST) else AlignError  # an actor that this one waited for
        raise kind(
            f"{who} failed: {said}", remedy="the same command with --debug shows where; logs/ has what it printed"
        ) from error
    except _LOST as error:
        raise LostError(
            f"{who} died: {_first_line(error)}",
            remedy="the run folder's logs/ has what it printed; out of memory is the usual cause. --resume continues",
        ) from error
    except RayError as error:
        raise LostError(f"Ray failed {who}: {_first_line(error)}", remedy="--resume continues") from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0]
