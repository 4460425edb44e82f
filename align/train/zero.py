"""DeepSpeed's ZeRO (1910.02054) as a strategy: moments, gradients and parameters spread over ranks, with offload to the
host's memory.

DeepSpeed keeps flat float32 copies of what is trained and steps our own AdamW on this rank's part of them, so that a
step is the replicated one, number by number. It averages gradients over ranks; `backward` multiplies by their number.

Gradients that are few (an adapter's), and those of models that read media, stay on their rank until the update is
complete, and are then reduced once, parameter by parameter in one order: ranks may reach them in different orders. Only
where all of a text model is trained does zero2 spread them as they come, at the price of a reduction per microbatch.

How the engine is made, and what ZeRO-3 asks of a model: `align.train.zero_engine`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from align.model.policy_module import PolicyModule
from align.model.shards import Shards
from align.train.strategy import MOMENTS, STEP, MakeOptimizer, Moments, moment_key, trainable
from align.train.zero_engine import declare_reads, make_engine, refuse, stage_of, without_towers
from align.types import HeadOutputs

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from align.recipe.sharding import Sharding
    from align.train.ranks import Ranks
    from align.types import TokenBatch


class Zero:
    """See `align.train.strategy.Strategy`. The process group of `ranks` is used; a single rank gets one of its own.

    Raises Unsupported for an optimizer whose moments are no tensors of the parameter's shape, for quantised weights
    under ZeRO-3, and for ranks that share a GPU.
    """

    def __init__(
        self,
        sharding: Sharding,
        module: PolicyModule,
        make: MakeOptimizer,
        ranks: Ranks,
        max_grad_norm: float | None,
    ):
        self.name: str = sharding.name
        optimizer = make()  # over whole parameters: DeepSpeed spreads what it holds, and them with it
        self.module, self.ranks, self.optimizer = module, ranks, optimizer
        self.stage = stage_of(sharding)
        self.named = trainable(module)
        refuse(sharding, module, optimizer, ranks)
        self.groups = [list(group["params"]) for group in optimizer.param_groups]
        for number, group in enumerate(optimizer.param_groups):
            group["number"] = number
        everything = all(p.requires_grad for p in module.parameters()) and module.media is None
        self.as_they_come = everything and self.stage > 1
        self.engine = make_engine(sharding, module, optimizer, max_grad_norm)
        self.partitions = _Partitions(writes=ranks.rank == 0)
        self.shards: Shards = self.partitions
        self._idle: set[int] = set()
        self._hidden: list[tuple[dict[str, Any], list[Tensor]]] = []
        optimizer.register_step_pre_hook(self._hide_idle)
        optimizer.register_step_post_hook(self._show_idle)
        if self.stage == 3:
            declare_reads(module)

    # ------------------------------------------------------------------------------------------- forward and update

    def forward(self, batch: TokenBatch, want: Collection[str] = ()) -> HeadOutputs:
        with self._in_company():
            return HeadOutputs(**self.engine(batch, want))

    @contextmanager
    def update(self) -> Iterator[None]:
        self._idle = set()
        if self.as_they_come:
            with self._in_company():
                yield
            return
        with self._in_company(), self.engine.coalesce_grad_reduction():
            try:
                yield
                self._fill_gaps()
            except BaseException:
                for parameter in self.named.values():  # nothing is left to reduce: the others may never come
                    parameter.grad = None
                raise

    @contextmanager
    def _in_company(self) -> Iterator[None]:
        """DeepSpeed's collectives fail with torch's errors where another rank ended: as RanksError, like our own."""
        try:
            yield
        except RuntimeError as error:
            if not isinstance(error, torch.distributed.DistError) and "gloo" not in str(error):
                raise
            with self.ranks.together("exchanged parameters"):
                raise

    def backward(self, loss: Tensor, *, last: bool) -> None:
        if self.as_they_come:
            self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss * self.ranks.size)

    def _fill_gaps(self) -> None:
        """Zeros where other ranks have a gradient: the reduction wants the same parameters of all. A group that no rank
        used is idle, and no optimizer moves it."""
        parameters = list(self.named.values())
        users = torch.tensor([float(p.grad is not None) for p in parameters], device=self.ranks.wire)
        self.ranks.sum([users])
        found = dict(zip(map(id, parameters), users.tolist(), strict=True))
        for p in parameters:
            if 0 < found[id(p)] < self.ranks.size:
                with self.shards.whole([p]):
                    p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        self._idle = {n for n, group in enumerate(self.groups) if not any(found[id(p)] for p in group)}

    def step(self, *, wanted: bool) -> float:
        if not wanted:
            self._idle = set(range(len(self.groups)))
        with self._in_company(), without_towers(self.module) if self.stage == 3 else nullcontext():
            self.engine.step()
        zero = self.engine.optimizer
        return float("nan") if zero.overflow else float(zero._global_grad_norm)

    def _hide_idle(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """Inside a step of the optimizer, groups that must not move are empty."""
        for group in optimizer.param_groups:
            if group["number"] in self._idle:
                self._hidden.append((group, group["params"]))
                group["params"] = []

    def _show_idle(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        for group, parameters in self._hidden:
            group["params"] = parameters
        self._hidden.clear()

    # ------------------------------------------------------------------------------------------------------- state

    def require_equal(self) -> None:
        if self.stage < 3:
            self.ranks.require_equal(self.named.values())

    def state(self) -> Iterator[tuple[str, Tensor, Moments]]:
        from deepspeed.utils import safe_get_full_optimizer_state

        self._link_moments()
        steps = [self._flat_state(n).get(STEP) for n in range(len(self.groups))]
        number = {id(p): n for n, group in enumerate(self.groups) for p in group}
        for name, parameter in self.named.items():
            with self.shards.whole([parameter]):
                value = parameter.detach().to("cpu", copy=True)
            own: Moments = {}
            step = steps[number[id(parameter)]]
            if step is not None:
                own = {key: safe_get_full_optimizer_state(parameter, key).cpu() for key in MOMENTS}
                own[STEP] = step.detach().to("cpu", copy=True)
            yield name, value, own

    @torch.no_grad()
    def load(self, parameters: Mapping[str, Tensor], moments: Mapping[str, Tensor]) -> None:
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        self._make_moments(moments)
        for name, parameter in self.named.items():
            value = parameters[name].to(parameter.device)
            with self.partitions.whole([parameter], modified=True):
                parameter.copy_(value)
            safe_set_full_fp32_param(parameter, value.float())
            for field in MOMENTS:
                if (key := moment_key(name, field)) in moments:
                    safe_set_full_optimizer_state(parameter, moments[key].to(value.device), field)

    def _make_moments(self, moments: Mapping[str, Tensor]) -> None:
        """Room for the moments that are to be loaded, as a first step would make it. Parameters of a group share a
        counter of updates: the most that any of them took."""
        names = {id(p): name for name, p in self.named.items()}
        self.optimizer.state.clear()
        if not moments:
            return
        for number, group in enumerate(self.groups):
            counters = [key for p in group if (key := moment_key(names[id(p)], STEP)) in moments]
            updates = max((float(moments[key]) for key in counters), default=0.0)
            for flat in self._flat(number):
                counter = torch.tensor(updates, dtype=torch.float32, device=flat.device)
                self.optimizer.state[flat] = {STEP: counter, **{key: torch.zeros_like(flat) for key in MOMENTS}}
        self._link_moments()

    def _link_moments(self) -> None:
        """Have DeepSpeed find each parameter's part of the flat moments again: it looks once, when the first of the
        groups has made its step and the others have no moments yet."""
        if self.stage < 3:
            self.engine.optimizer._hp_optimizer_states_linked = False
            self.engine.optimizer._lazy_init_hp_params_optimizer_state()

    def _flat(self, number: int) -> list[Tensor]:
        """This rank's flat float32 parts of a group of parameters."""
        zero = self.engine.optimizer
        if self.stage < 3:
            return [zero.single_partition_of_fp32_groups[number]]
        flats: Sequence[Tensor] = zero.fp32_partitioned_groups_flat
        return [flat for n, flat in enumerate(flats) if zero.sub_group_to_group_id[n] == number]

    def _flat_state(self, number: int) -> dict[str, Tensor]:
        found: dict[str, Tensor] = self.optimizer.state.get(self._flat(number)[0], {})
        return found

    def close(self) -> None:
        self.engine.destroy()


class _Partitions:
    """See `align.model.shards.Shards`."""

    def __init__(self, writes: bool):
        self.writes = writes

    def whole(self, tensors: Sequence[Tensor], modified: bool = False) -> AbstractContextManager[None]:
        """modified: what rank 0 makes of them inside is what all go on with."""
        away = [t for t in tensors if hasattr(t, "ds_id")]
        if not away:
            return nullcontext()
        from deepspeed.runtime.zero import GatheredParameters

        found: AbstractContextManager[None] = GatheredParameters(away, modifier_rank=0 if modified else None)
        return found

    def kept(self, tensor: Tensor) -> Tensor:
        # a copy: parameters are parts of one flat tensor, or go back to their ranks
        return tensor.detach().to("cpu", copy=True)
