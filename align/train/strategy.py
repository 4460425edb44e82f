"""How the parameters of a policy are spread over its ranks, behind one seam.

Losses, packing and stages know nothing of it. Losses divide by global counts, so every strategy sums gradients over
ranks and microbatches and never averages: one that does by itself (DeepSpeed) is undone there, once.

`Replicated` is data parallelism as `align.train.ranks` has it: every rank holds everything. `align.train.zero` is
DeepSpeed's ZeRO. A further one (FSDP2, tensor parallelism) is a further class with these methods, and a line in the
table of `align.recipe.sharding`.

A strategy makes its optimizer itself, when it has placed the parameters: spreading them may make other tensors of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from align.errors import Unsupported
from align.model.shards import Shards, Whole
from align.plugins import of_ours
from align.recipe.sharding import STRATEGIES

if TYPE_CHECKING:
    from collections.abc import Collection

    from align.model.policy_module import PolicyModule
    from align.recipe.sharding import Sharding
    from align.train.ranks import Ranks
    from align.types import HeadOutputs, TokenBatch

STEP, MOMENTS = "step", ("exp_avg", "exp_avg_sq")
Moments = dict[str, Tensor]  # of one parameter: AdamW's `exp_avg` and `exp_avg_sq`, shaped as it, and `step` f32[]
MakeOptimizer = Callable[[], torch.optim.Optimizer]  # over the module's parameters as they are when it is called


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """By name, in the module's order."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def moment_key(name: str, field: str) -> str:
    """Of the moment `field` ("exp_avg", "exp_avg_sq", "step") of the parameter `name`, in a checkpoint."""
    return f"{name}|{field}"


def moment_of(key: str) -> tuple[str, str]:
    """The parameter's name and the field that `moment_key` joined."""
    name, _, field = key.rpartition("|")
    return name, field


class Strategy(Protocol):
    """Every method is collective: all ranks call it, in one order.

    name: as in a recipe. shards: how to read parameters whole, for what is published and saved. optimizer: None where
    nothing is trained.
    """

    name: str
    shards: Shards
    optimizer: torch.optim.Optimizer | None

    def forward(self, batch: TokenBatch, want: Collection[str] = ()) -> HeadOutputs:
        """See `PolicyModule.forward`; with or without gradient."""
        ...

    def update(self) -> AbstractContextManager[None]:
        """Inside it the backward passes of one update; after it, their gradients are summed over ranks."""
        ...

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradients of `loss` f32[], this microbatch's share of the global one. last: of this update."""
        ...

    def step(self, *, wanted: bool) -> float:
        """Clip, move the weights, forget the gradients; returns the gradient's norm before clipping, alike on all
        ranks. Where the norm is not finite or the step is not `wanted`, weights and moments stay as they were."""
        ...

    def require_equal(self) -> None:
        """Raise RanksError where ranks hold other weights of what they all hold."""
        ...

    def state(self) -> Iterator[tuple[str, Tensor, Moments]]:
        """(name, parameter, moments) of all that is trained, whole and on the CPU: a parameter shaped as the model has
        it, in the dtype that it is trained in; no moments before a first step."""
        ...

    def load(self, parameters: Mapping[str, Tensor], moments: Mapping[str, Tensor]) -> None:
        """Continue with what `state` gave, of whichever strategy and number of ranks: `parameters` by name and
        `moments` by `moment_key`, shaped as there, whole on every rank. Tensors may be read from a file as they are
        asked for."""
        ...

    def close(self) -> None:
        """Free what it holds beside the module. The trainer cannot be used afterwards."""
        ...


def make_strategy(
    sharding: Sharding,
    module: PolicyModule,
    optimizer: MakeOptimizer | None,
    ranks: Ranks,
    max_grad_norm: float | None,
) -> Strategy:
    """The strategy that the recipe asks for; without an optimizer nothing is trained, and every rank holds all.

    Parameters must be equal on all ranks. Raises Unsupported for a strategy that is not in the table, and where it
    cannot hold this model.
    """
    if optimizer is None:
        return Replicated(sharding, module, None, ranks, max_grad_norm)
    if sharding.name not in STRATEGIES:
        raise Unsupported(
            f"there is no strategy {sharding.name!r}",
            where="placement.trainer.strategy",
            remedy=f"use {', '.join(STRATEGIES)}",
        )
    made: Strategy = of_ours(STRATEGIES[sharding.name].made_by)(sharding, module, optimizer, ranks, max_grad_norm)
    return made


class Replicated:
    """Every rank holds all parameters and moments; gradients are summed at the end of an update."""

    name = "replicated"

    def __init__(
        self,
        sharding: Sharding,
        module: PolicyModule,
        optimizer: MakeOptimizer | None,
        ranks: Ranks,
        max_grad_norm: float | None,
    ):
        self.module, self.ranks = module, ranks
        self.optimizer = None if optimizer is None else optimizer()
        self.shards: Shards = Whole(writes=ranks.rank == 0)
        self.limit = math.inf if max_grad_norm is None else max_grad_norm
        self.named = trainable(module)
        self.parameters = list(self.named.values())

    def forward(self, batch: TokenBatch, want: Collection[str] = ()) -> HeadOutputs:
        outputs: HeadOutputs = self.module(batch, want=want)
        return outputs

    @contextmanager
    def update(self) -> Iterator[None]:
        yield
        self.ranks.sum_gradients(self.parameters)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        loss.backward()

    def step(self, *, wanted: bool) -> float:
        assert self.optimizer is not None, "this trainer was made without an optimizer"
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        # rank 0's: the last bit may differ, and all must decide alike
        norm = torch.tensor(self.ranks.objects(float(norm))[0], device=norm.device)
        torch.nn.utils.clip_grads_with_norm_(self.parameters, self.limit, norm)
        if wanted and math.isfinite(float(norm)):
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(norm)

    def require_equal(self) -> None:
        self.ranks.require_equal(self.parameters)

    def state(self) -> Iterator[tuple[str, Tensor, Moments]]:
        assert self.optimizer is not None, "this trainer was made without an optimizer"
        for name, parameter in self.named.items():
            moments = self.optimizer.state.get(parameter, {})
            yield name, parameter.detach().cpu(), {key: _for_a_file(key, value) for key, value in moments.items()}

    @torch.no_grad()
    def load(self, parameters: Mapping[str, Tensor], moments: Mapping[str, Tensor]) -> None:
        assert self.optimizer is not None, "this trainer was made without an optimizer"
        self.optimizer.state.clear()
        for name, parameter in self.named.items():
            parameter.copy_(parameters[name])
        for key in moments:
            name, field = moment_of(key)
            parameter = self.named[name]
            # AdamW keeps its step counter on the CPU unless fused on CUDA, as torch's own load_state_dict does
            device = parameter.device if field != STEP or parameter.is_cuda else torch.device("cpu")
            value = moments[key]
            counts = field == STEP and not value.is_floating_point()
            self.optimizer.state[parameter][field] = int(value) if counts else value.to(device)

    def close(self) -> None:
        """Nothing outlives the trainer."""


def _for_a_file(key: str, value: Tensor | int) -> Tensor:
    """8-bit AdamW counts its steps in an int, and its parameters share their tables."""
    tensor = torch.as_tensor(value).detach().cpu()
    return tensor.clone() if key.startswith("qmap") else tensor
