"""One engine in one Ray actor: a thin shell, and the environment its process must start with."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Sequence

from align.errors import EngineError
from align.protocols import Group, PromptItem, Publication, Sampling
from rollout.base import Engine, EngineSpec, make_engine

_PR_SET_PDEATHSIG = 1


def worker_environment(spec: EngineSpec) -> dict[str, str]:
    """Variables that torch and OpenMP read when they are loaded, for `runtime_env={"env_vars": ...}` of the actor.

    Waiting is passive: trainer, engine and reference share the cores and take turns, and threads that spin while
    another actor computes would take its cores away. Ray would set OMP_NUM_THREADS to the actor's reserved CPUs.
    """
    threads = str(spec.threads)
    return {
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "OMP_WAIT_POLICY": "PASSIVE",
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


class EngineWorker:
    """What runs in the actor. Methods are those of `rollout.base.Engine`; Ray runs them one after another.

    The engine starts in `start`, not in the constructor: of an exception there, Ray passes on the text alone.
    """

    def __init__(self) -> None:
        die_with_parent()
        self._engine: Engine | None = None

    def start(self, spec: EngineSpec) -> None:
        self._engine = make_engine(spec)

    def ping(self) -> int | None:
        """Answer with the version held: the engine is up and not busy."""
        return self._started().version

    def generate(self, prompts: Sequence[PromptItem], group_size: int, sampling: Sampling) -> list[Group]:
        return self._started().generate(prompts, group_size, sampling)

    def publish(self, publication: Publication) -> str:
        return self._started().publish(publication)

    def close(self) -> None:
        if self._engine is not None:
            self._engine.close()

    def _started(self) -> Engine:
        if self._engine is None:
            raise EngineError("the engine was used before it started")
        return self._engine
