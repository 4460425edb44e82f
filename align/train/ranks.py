"""The processes that train one policy together (data parallel), and the few things they say to each other.

Every rank is given all trees of an update, plans the same microbatches and computes its share of them. Losses divide by
global counts, which every rank works out for itself, so gradients are summed and never averaged. `Ranks()` is a
process on its own and says nothing. What is said is counted: bytes that this rank sends, and seconds.
"""

from __future__ import annotations

import pickle
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from align.errors import RanksError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch.distributed import Store

BUCKET_ELEMENTS = 1 << 24  # of float32: 64 MiB are sent at a time
SILENCE_LIMIT_S = 1800.0  # longer than one rank writes a checkpoint while the others wait


class Traffic(NamedTuple):
    """What a rank has sent so far, in bytes, and the seconds it spent on that, waiting for slower ranks included."""

    bytes: int
    seconds: float


class Ranks:
    """One process of `size`, the `rank`-th. Every method but `join`, `traffic` and `since` is collective: all ranks
    call it, in one order.

    sent: bytes that this rank has sent, by collective ("all_reduce", "all_gather", "broadcast"), as rings send them:
    an all-reduce of n bytes sends 2 (W-1)/W n from each of W ranks (Patarasuk and Yuan 2009), a gather sends a rank's
    part W-1 times, a broadcast passes n on from every rank but the last. Headers of the transport are not counted.

    Raises RanksError where another rank ended, or stayed silent for longer than the limit given to `join`.
    """

    def __init__(self) -> None:
        self.size, self.rank = 1, 0
        self.wire = torch.device("cpu")
        self.sent: Counter[str] = Counter()
        self._seconds = 0.0

    @classmethod
    def join(
        cls,
        rank: int,
        size: int,
        *,
        store: Store | None = None,
        init_method: str | None = None,
        device: torch.device | str = "cpu",
        limit_s: float = SILENCE_LIMIT_S,
    ) -> Ranks:
        """Meet the other ranks at a torch store or an address ("file:///...", "tcp://host:port").

        device: "cuda" sends gradients by NCCL from that GPU, which no other rank may use; "cpu" sends them by gloo.
        """
        import torch.distributed as dist

        ranks = cls()
        ranks.size, ranks.rank, ranks.wire = size, rank, torch.device(device)
        if size == 1:
            return ranks
        if ranks.wire.type == "cuda":
            torch.cuda.set_device(ranks.wire.index or 0)
        backend = "cpu:gloo,cuda:nccl" if ranks.wire.type == "cuda" else "gloo"
        with ranks.together("meet"):
            dist.init_process_group(
                backend, init_method, timedelta(seconds=limit_s), world_size=size, rank=rank, store=store
            )
        return ranks

    def leave(self) -> None:
        """End the process group; afterwards this process is on its own."""
        if self.size > 1:
            import torch.distributed as dist

            dist.destroy_process_group()
        self.size, self.rank = 1, 0

    def traffic(self) -> Traffic:
        """Up to now; a difference of two is what was said between them."""
        return Traffic(self.sent.total(), self._seconds)

    def since(self, before: Traffic) -> dict[str, float]:
        """Metrics of what was said since `before`; none of a process on its own."""
        if self.size == 1:
            return {}
        now = self.traffic()
        return {"comm/bytes": float(now.bytes - before.bytes), "time/communicate": now.seconds - before.seconds}

    @contextmanager
    def together(self, doing: str) -> Iterator[None]:
        """Around what all ranks do at one time: it is counted in seconds, and torch's error where another rank ended is
        a RanksError. doing: as in "while they <doing>"."""
        started = time.perf_counter()
        try:
            yield
        except RuntimeError as error:  # torch.distributed's own errors are RuntimeErrors
            first = (str(error).strip().splitlines() or ["no message"])[0]
            raise RanksError(
                f"rank {self.rank} of {self.size} lost the others while they {doing}: {first}",
                remedy="another rank failed first: its own error, or logs/, says why",
            ) from error
        finally:
            self._seconds += time.perf_counter() - started

    def barrier(self) -> None:
        if self.size > 1:
            with self.together("waited for each other"):
                self._all_reduce(torch.zeros(1))

    def objects(self, value: Any) -> list[Any]:
        """`value` of every rank, by rank. For small, picklable things: numbers, random states, arrays."""
        if self.size == 1:
            return [value]
        import torch.distributed as dist

        # torch exchanges lengths as int64, then the pickles; how it pads the shorter ones is not counted
        self.sent["all_gather"] += (self.size - 1) * (8 + len(pickle.dumps(value)))
        found: list[Any] = [None] * self.size
        with self.together("exchanged numbers"):
            dist.all_gather_object(found, value)
        return found

    def gather(self, tensor: Tensor) -> Tensor:
        """Tensors of all ranks joined along their first dimension, by rank; their lengths may differ, 0 included."""
        if self.size == 1:
            return tensor
        import torch.distributed as dist

        lengths = self.objects(tensor.shape[0])
        padded = torch.zeros((max(lengths), *tensor.shape[1:]), dtype=tensor.dtype, device=self.wire)
        padded[: tensor.shape[0]] = tensor
        parts = [torch.empty_like(padded) for _ in lengths]
        self.sent["all_gather"] += (self.size - 1) * padded.nbytes
        with self.together("gathered values"):
            dist.all_gather(parts, padded)
        return torch.cat([part[:n] for part, n in zip(parts, lengths, strict=True)]).to(tensor.device)

    @torch.no_grad()
    def sum(self, tensors: Sequence[Tensor]) -> None:
        """Replace every tensor by its sum over ranks, in place; added in float32, whatever the dtype."""
        if self.size > 1:
            self._in_buckets(tensors, self._all_reduce, torch.float32)

    @torch.no_grad()
    def broadcast(self, tensors: Sequence[Tensor]) -> None:
        """Replace every tensor by rank 0's, in place."""
        if self.size > 1:
            for dtype in dict.fromkeys(t.dtype for t in tensors):
                self._in_buckets([t for t in tensors if t.dtype == dtype], self._broadcast, dtype)

    @torch.no_grad()
    def require_equal(self, tensors: Iterable[Tensor]) -> None:
        """Raise RanksError where ranks hold other values, to the bit. Sums of integers do not depend on their order."""
        if self.size > 1:
            found = self.objects([int(t.reshape(-1).view(torch.int16).sum(dtype=torch.int64)) for t in tensors])
            if any(own != found[0] for own in found):
                raise RanksError(
                    f"the weights of the {self.size} ranks have drifted apart",
                    remedy="ranks need processors of one kind and the same versions of torch; resume from the last "
                    "checkpoint on such, or with `placement.trainer.ranks: 1`",
                )

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Sum gradients over ranks. A parameter that no rank used stays without one, so that no optimizer moves it."""
        parameters = list(parameters)
        used = torch.tensor([float(p.grad is not None) for p in parameters], device=self.wire)
        self.sum([used])
        grads = []
        for p, somewhere in zip(parameters, used.tolist(), strict=True):
            if somewhere:
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
                grads.append(p.grad)
        self.sum(grads)

    def _all_reduce(self, flat: Tensor) -> None:
        import torch.distributed as dist

        self.sent["all_reduce"] += 2 * (self.size - 1) * flat.nbytes // self.size
        dist.all_reduce(flat)

    def _broadcast(self, flat: Tensor) -> None:
        import torch.distributed as dist

        self.sent["broadcast"] += flat.nbytes if self.rank < self.size - 1 else 0
        dist.broadcast(flat, 0)

    def _in_buckets(self, tensors: Sequence[Tensor], send: Callable[[Tensor], Any], dtype: torch.dtype) -> None:
        with self.together("exchanged tensors"):
            for bucket in _buckets(tensors):
                flat = torch.cat([t.reshape(-1).to(self.wire, dtype) for t in bucket])
                send(flat)
                for tensor, part in zip(bucket, flat.split([t.numel() for t in bucket]), strict=True):
                    tensor.copy_(part.view_as(tensor))


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Runs of tensors of at most BUCKET_ELEMENTS together; a larger tensor is a bucket of its own."""
    bucket: list[Tensor] = []
    room = BUCKET_ELEMENTS
    for tensor in tensors:
        if bucket and tensor.numel() > room:
            yield bucket
            bucket, room = [], BUCKET_ELEMENTS
        bucket.append(tensor)
        room -= tensor.numel()
    if bucket:
        yield bucket


def random_stream(seed: int, rank: int) -> None:
    """Give each rank its own dropout; rank 0 goes on with the stream that a process on its own would have."""
    if rank:
        torch.manual_seed(seed + 1_000_003 * rank)
