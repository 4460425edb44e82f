"""One engine in one Ray actor: a thin shell, and the environment its process must start with."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from align.errors import EngineError
from align.shared_files import require_shared
from rollout.base import EngineSpec, load_libraries, make_engine, start_error
from rollout.stepping import Command, Report, Stepper

WATCH = "watch"
_PR_SET_PDEATHSIG = 1


def worker_environment(threads: int, passive: bool) -> dict[str, str]:
    """Variables that torch and OpenMP read when they are loaded, for `runtime_env={"env_vars": ...}` of the actor.

    passive: others compute on the same cores at the same time, and threads that spin while they wait would take these
    away. Ray would set OMP_NUM_THREADS to the actor's reserved CPUs.
    """
    return {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        **({"OMP_WAIT_POLICY": "PASSIVE"} if passive else {}),
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        "TOKENIZERS_PARALLELISM": "false",
    }


def die_with_parent() -> None:
    """Ask the kernel to kill this process when its parent dies (Linux only; elsewhere Ray's own watch must do).

    Processes that the engine starts are ended by Ray, which kills a worker's children with it.
    """
    if not sys.platform.startswith("linux"):
        return
    parent = os.getppid()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent:  # it died in between: the signal will not come
        os.kill(os.getpid(), signal.SIGKILL)


@dataclass(frozen=True, slots=True)
class Home:
    """Where a worker lives: Ray's id of the node, and the process id there."""

    node: str
    pid: int


class EngineWorker:
    """What runs in the actor: a `Stepper`, and nothing else. Commands return before they are carried out; `poll`, which
    Ray runs beside them (concurrency group `WATCH`), says what came of them and that the process lives.

    The engine starts in `start`, not in the constructor: of an exception there, Ray passes on the text alone.
    """

    def __init__(self) -> None:
        die_with_parent()
        self._stepper: Stepper | None = None

    def load(self, name: str) -> None:
        """Import what the engine of this name is made of, ahead of `start`."""
        load_libraries(name)

    def home(self) -> Home:
        return Home(ray.get_runtime_context().get_node_id(), os.getpid())

    def start(self, spec: EngineSpec, token: Path | None = None) -> None:
        """Start the engine. token: see `require_shared`. Raises what it raises, and EngineError for what is no error of
        ours."""
        if token is not None:
            require_shared(token, spec.folder)
        try:
            self._stepper = Stepper(lambda: make_engine(spec))
        except (RuntimeError, ValueError, OSError, MemoryError) as error:
            raise start_error(error, spec.folder) from error

    def give(self, command: Command) -> None:
        self._started.give(command)

    def poll(self, timeout_s: float) -> Report:
        return self._started.report(timeout_s)

    def close(self) -> None:
        if self._stepper is not None:
            self._stepper.close()

    @property
    def _started(self) -> Stepper:
        if self._stepper is None:
            raise EngineError("the engine was used before it started")
        return self._stepper


def engine_actor(threads: int, passive: bool, **options: Any) -> Any:
    """The handle of a new actor under these options of Ray; `threads` compute in it (`worker_environment`)."""
    actor: Any = ray.remote(concurrency_groups={WATCH: 1})(EngineWorker)
    environment = {"env_vars": worker_environment(threads, passive)}
    return actor.options(max_restarts=0, runtime_env=environment, **options).remote()
