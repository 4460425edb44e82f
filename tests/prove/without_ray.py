"""`align run` in one process: trainer, engine and rewards as the run makes them, without the actors around them.

    python -P tests/prove/without_ray.py run recipe.yaml

A program of its own, run with PYTHONPATH on the tree whose code is to be tried. For proofs of numbers on a machine that
is short of cores: torch is loaded once, not once for each actor.
"""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

from align import packages

packages.bind()

from align.actors import build, cluster  # noqa: E402  the user's folder has a rewards.py
from align.actors.scoring import LocalScorer  # noqa: E402
from align.train.trainer import PolicyTrainer  # noqa: E402
from rollout.base import make_engine  # noqa: E402
from rollout.local_fleet import LocalFleet  # noqa: E402


class Machine:
    """In the place of a Ray cluster: one core, no GPU."""

    local, cores = True, 1

    def __init__(self, *arguments: Any, **options: Any):
        self.watch = SimpleNamespace(gone=None, look=lambda: None)

    def total(self, resource: str) -> float:
        return 0.0

    def close(self) -> None:
        """Nothing was started."""


class Places:
    """In the place of placement groups."""

    def __init__(self, roles: Any):
        self.roles = {role.name: role for role in roles}

    def threads(self, name: str) -> int:
        return 1

    def at(self, name: str) -> dict[str, Any]:
        return {}

    def group_of(self, names: Any) -> tuple[None, list[int]]:
        return None, []


class Trainer:
    """`PolicyTrainer` behind the asynchronous protocol."""

    def __init__(self, spec: Any):
        self._trainer = PolicyTrainer(spec)

    def __getattr__(self, name: str) -> Any:
        async def call(*arguments: Any, **options: Any) -> Any:
            return getattr(self._trainer, name)(*arguments, **options)

        return call


class Fleet(LocalFleet):
    def __init__(self, spec: Any, workers: int, **options: Any):
        super().__init__(make_engine(spec))

    async def ready(self) -> None:
        """It is."""


class Scorer(LocalScorer):
    def __init__(self, rewards: Any, folder: Any, *, seed: int, log_folder: Any, cache: Any, **options: Any):
        super().__init__(rewards, folder, seed=seed, log_folder=log_folder, cache=cache)


class Backend(build.RayBackend):
    @asynccontextmanager
    async def places(self, needs: Any) -> AsyncIterator[None]:
        self._places = Places(self.roles(needs))  # type: ignore[assignment]
        try:
            yield
        finally:
            self._places = None

    async def trainer(self, job: Any) -> Any:
        return Trainer(self._trainer_spec(job))

    async def _task(self, function: Any, who: str, *arguments: Any) -> Any:
        return function(self.token, *arguments)


build.RayBackend, cluster.Cluster = Backend, Machine  # type: ignore[misc,assignment]
build.RayFleet, build.RayScorer = Fleet, Scorer  # type: ignore[misc,assignment]

if __name__ == "__main__":
    from align.cli.main import main

    sys.exit(main(sys.argv[1:]))
