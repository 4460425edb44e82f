"""Processes that load their libraries (torch, transformers, vLLM: seconds) while the driver still reads rows.

Only on a machine of our own without a GPU, for a trainer of one rank and a stage's first engine: there a process can be
made before its place is reserved, since no other node or device can be meant. It holds no CPU of the cluster.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ray


class Spare:
    """At most one actor that is loading, and what it was made for. Whoever takes it closes it from then on."""

    def __init__(self) -> None:
        self._actor: Any = None
        self._kind: Any = None

    @property
    def actor(self) -> Any:
        """The handle, which stays here; None where there is none."""
        return self._actor

    def expect(self, kind: Any, make: Callable[[], Any]) -> None:
        """Have one of this kind: what its process needs to know before it starts, compared by value."""
        if self._actor is not None and self._kind == kind:
            return
        self.close()
        self._actor, self._kind = make(), kind

    def take(self, kind: Any) -> Any:
        """The handle; None where there is none of this kind."""
        if self._actor is None or self._kind != kind:
            return None
        actor, self._actor = self._actor, None
        return actor

    def close(self) -> None:
        if self._actor is not None:
            ray.kill(self._actor)
            self._actor = None
