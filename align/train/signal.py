"""Whether an update has anything to teach: does its loss pull at what the model gives out?

An update without a scored token, with advantages of zero, or whose pulls cancel (both sides of every pair are the same
tokens, all completions of a group are equal) has no gradient, or one of rounding noise alone. AdamW divides by its own
moving size, so noise moves the weights as far as a true gradient does: such an update must not be made, and be told.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from align.data.packing import twins
from align.protocols.trees import Tree
from align.types import HeadOutputs, TokenBatch

NOISE = 1e-5  # of the pull: what rounding leaves of pulls that cancel is some 1e-7 of them in float32
Pulls = tuple[float, float]  # the largest, and the sum of all, without signs


class Signal:
    """The derivatives of an update's loss by the outputs of the head, as they are and after those of equal sequences
    were added up: the model gives equal tokens after equal words equal values, and only their sum acts.

    Equal sequences may stand in different microbatches, and on different ranks: a group is cut where it is larger than
    a microbatch. So their sums are kept until the update's last backward pass.

    trees: of the whole update.
    """

    def __init__(self, trees: Sequence[Tree]) -> None:
        self._twins = {key for key, count in Counter(twins(trees).tolist()).items() if count > 1}
        self._found: dict[str, tuple[Tensor, Tensor]] = {}
        self._sums: dict[tuple[str, int], Tensor] = {}

    def watch(self, outputs: HeadOutputs, batch: TokenBatch) -> None:
        """Look at the derivatives once a backward pass reaches these outputs."""
        for name in ("logps", "entropy", "scores"):
            value = getattr(outputs, name)
            if value is not None and value.requires_grad:
                value.register_hook(partial(self._note, batch, name))

    def carried(self, gather: Callable[[Any], list[Any]] = lambda own: [own]) -> bool:
        """Whether there is a signal: what is left of the pulls is no rounding of them, by the largest or by the sum. (A
        long completion pulls a little at each of its tokens, a short one much at its few.) What is not finite is one:
        the step itself refuses it. gather: what every rank found (`Ranks.objects`)."""
        own = {name: (float(most), float(total)) for name, (most, total) in self._found.items()}
        found = gather((own, {key: value.double().cpu().numpy() for key, value in self._sums.items()}))
        pull, net = (_joined(numbers.get(name, (0.0, 0.0)) for numbers, _ in found) for name in ("pull", "net"))
        sums: dict[tuple[str, int], Tensor] = {}
        for _, of_rank in found:
            for key, value in of_rank.items():
                _add(sums, key, torch.from_numpy(value))
        left = [net]
        for value in sums.values():
            most, total = _sizes(value)
            left.append((float(most), float(total)))
        kept = zip(_joined(left), pull, strict=True)
        return not all(rest <= NOISE * whole for rest, whole in kept)

    def _note(self, batch: TokenBatch, name: str, gradient: Tensor | None) -> None:
        if gradient is None or not gradient.numel():  # None: an output that the loss did not read
            return
        gradient = gradient.detach()
        self._keep("pull", gradient)
        if self._twins and batch.twins is not None:
            gradient = gradient.clone()
            for sequence, key in enumerate(batch.twins.tolist()):
                if key in self._twins:
                    # tokens or scores of the one; a pair's first side may have the prompt's tokens before its own
                    own: Any = slice(sequence, sequence + 1) if name == "scores" else batch.sequence_ids == sequence
                    _add(self._sums, (name, key), gradient[own].flatten())
                    gradient[own] = 0
        self._keep("net", gradient)

    def _keep(self, name: str, values: Tensor) -> None:
        most, total = _sizes(values)
        if name in self._found:
            before, so_far = self._found[name]
            most, total = torch.maximum(before, most), so_far + total
        self._found[name] = most, total


def _sizes(values: Tensor) -> tuple[Tensor, Tensor]:
    """Largest and sum, without signs."""
    if not values.numel():
        return values.new_zeros(()), values.new_zeros((), dtype=torch.float64)
    return values.abs().max(), values.abs().sum(dtype=torch.float64)


def _joined(found: Any) -> Pulls:
    """Of parts of an update; NaN where one is."""
    most, total = torch.tensor(list(found), dtype=torch.float64).reshape(-1, 2).unbind(1)
    return float(most.max()), float(total.sum())


def _add(sums: dict[tuple[str, int], Tensor], key: tuple[str, int], values: Tensor) -> None:
    """Add up vectors that end alike."""
    before = sums.get(key)
    if before is None or before.numel() < values.numel():
        before, values = values.clone(), values.new_zeros(0) if before is None else before
    if values.numel():
        before[-values.numel() :] += values
    sums[key] = before
