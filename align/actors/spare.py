"""Processes that load their libraries (torch, transformers, vLLM: seconds) while the driver still reads rows, and that
trainers of a run take over one from another.

Only on a machine of our own without a GPU, for a trainer of one rank and a stage's first engine: there a process can be
made before its place is reserved, since no other node or device can be meant. It holds no CPU of the cluster.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ray


class Spare:
    """At most one actor that is loading or waits, and what it was made for. Whoever takes it closes it from then on, or
    puts it back."""

    def __init__(self) -> None:
        self._actor: Any = None
        self._kind: Any = None
        self._comes_back = False

    @property
    def actor(self) -> Any:
        """The handle, which stays here; None where there is none."""
        return self._actor

    def expect(self, kind: Any, make: Callable[[], Any]) -> None:
        """Have one of this kind: what its process needs to know before it starts, compared by value."""
        if self._kind == kind and (self._actor is not None or self._comes_back):
            return
        self.close()
        self._actor, self._kind = make(), kind

    def take(self, kind: Any, *, back: bool = False) -> Any:
        """The handle; None where there is none of this kind. back: it is likely to be `put` again."""
        if self._actor is None or self._kind != kind:
            return None
        actor, self._actor, self._comes_back = self._actor, None, back
        return actor

    def put(self, actor: Any) -> None:
        """What was taken comes back, or (None) does not."""
        if self._comes_back:
            self._actor, self._comes_back = actor, False
        elif actor is not None:
            ray.kill(actor)  # another kind was wanted meanwhile

    def close(self) -> None:
        self._comes_back = False
        if self._actor is not None:
            ray.kill(self._actor)
            self._actor = None
