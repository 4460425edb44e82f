"""Whether an update has anything to teach: does its loss pull at what the model gives out?

An update without a scored token, with advantages of zero, or whose pulls cancel (both sides of every pair are the same
tokens, all completions of a group are equal) has no gradient, or one of rounding noise alone. AdamW divides by its own
moving size, so noise moves the weights as far as a true gradient does: such an update must not be made, and be told.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from align.losses.base import Metric
from align.types import HeadOutputs, TokenBatch

NOISE = 1e-5  # of the largest pull: what rounding leaves of pulls that cancel is some 1e-7 of them in float32
PULL, NET = "signal/pull", "signal/net"


class Signal:
    """The largest derivative of an update's loss by any output of the head (`pull`), and the same after those of equal
    sequences were added up (`net`): the model gives equal tokens after equal words equal values, and only their sum
    acts."""

    def __init__(self) -> None:
        self._found: dict[str, Tensor] = {}

    def watch(self, outputs: HeadOutputs, batch: TokenBatch) -> None:
        """Look at the derivatives once a backward pass reaches these outputs."""
        for name in ("logps", "entropy", "scores"):
            value = getattr(outputs, name)
            if value is not None and value.requires_grad:
                value.register_hook(partial(self._note, batch, of_sequences=name == "scores"))

    def metrics(self) -> dict[str, Metric]:
        """By name, to be joined over microbatches and ranks. Nothing noted is a pull of 0."""
        return {name: Metric(self._found.get(name, torch.zeros(())), reduce="max") for name in (PULL, NET)}

    def _note(self, batch: TokenBatch, gradient: Tensor | None, *, of_sequences: bool) -> None:
        if gradient is None or not gradient.numel():  # None: an output that the loss did not read
            return
        net = gradient
        if batch.twins is not None:
            places = batch.twins if of_sequences else _token_twins(batch)
            net = torch.zeros_like(gradient).index_add(0, places, gradient)
        for name, value in ((PULL, gradient), (NET, net)):
            largest = value.detach().abs().max()
            before = self._found.get(name)
            self._found[name] = largest if before is None else torch.maximum(before, largest)


def carried(metrics: dict[str, float]) -> bool:
    """Takes both numbers out of joined metrics; whether there is a signal. One that is not finite is one: the step
    itself refuses it."""
    pull, net = metrics.pop(PULL), metrics.pop(NET)
    return not net <= NOISE * pull


def _token_twins(batch: TokenBatch) -> Tensor:
    """i64[N]: for each scored token that of its sequence's twin. Their last tokens are the same: a pair's first side
    may have the prompt's before them."""
    assert batch.twins is not None
    places = torch.arange(batch.sequence_ids.numel(), device=batch.sequence_ids.device)
    for sequence, twin in enumerate(batch.twins.tolist()):
        if sequence != twin:
            own, other = (torch.nonzero(batch.sequence_ids == s)[:, 0] for s in (sequence, twin))
            count = min(own.numel(), other.numel())
            if count:
                places[own[-count:]] = other[-count:]
    return places
