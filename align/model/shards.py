"""Reading parameters that may be spread over ranks: whole, a few at a time, and kept by the rank that writes."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

from torch import Tensor


class Shards(Protocol):
    """writes: whether this rank keeps what is read and writes the files. Every rank reads the same, in one order."""

    writes: bool

    def whole(self, tensors: Sequence[Tensor]) -> AbstractContextManager[None]:
        """Inside the context each of `tensors` is whole on every rank; buffers always are."""
        ...

    def kept(self, tensor: Tensor) -> Tensor:
        """`tensor`, read inside `whole` on the rank that writes, on the CPU, to be used after it."""
        ...


class Whole:
    """Nothing is spread."""

    def __init__(self, writes: bool = True):
        self.writes = writes

    def whole(self, tensors: Sequence[Tensor]) -> AbstractContextManager[None]:
        return nullcontext()

    def kept(self, tensor: Tensor) -> Tensor:
        return tensor.detach().cpu()


WHOLE = Whole()
