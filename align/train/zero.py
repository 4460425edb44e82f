"""DeepSpeed's ZeRO (1910.02054) as a strategy: moments, gradients and parameters spread over ranks, with offload to the
host's memory.

DeepSpeed keeps flat float32 copies of what is trained and steps our own AdamW on this rank's part of them, so that a
step is the replicated one, number by number. It averages gradients over ranks; `backward` multiplies by their number.

Gradients that are few (an adapter's), and those of models that read media, stay on their rank until the update is
complete, and are then reduced once, parameter by parameter in one order: ranks may reach them in different orders. Only
where all of a text model is trained does zero2 spread them as they come, at the price of a reduction per microbatch.

ZeRO-3 gathers a decoder layer at a time. Inside a layer everything is whole, so fused kernels that read other modules'
parameters need not know. Every rank must run the same modules in one order. Towers for media are therefore not spread:
how often they run depends on a rank's share, and on what it keeps of it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from align.errors import Unsupported
from align.model.adapter_config import HEAD
from align.model.policy_module import PolicyModule, text_backbone
from align.model.shards import Shards
from align.train.state import trainable
from align.train.strategy import STEP, Moments, unequal_steps
from align.types import HeadOutputs

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from align.recipe.sharding import Sharding
    from align.train.ranks import Ranks
    from align.types import TokenBatch

MOMENTS = ("exp_avg", "exp_avg_sq")
WHERE = "placement.trainer.strategy"


class Zero:
    """See `align.train.strategy.Strategy`. The process group of `ranks` is used; a single rank gets one of its own.

    Raises Unsupported for an optimizer whose moments are no tensors of the parameter's shape, for quantised weights
    under ZeRO-3, and for ranks that share a GPU.
    """

    def __init__(
        self,
        sharding: Sharding,
        module: PolicyModule,
        optimizer: torch.optim.Optimizer,
        ranks: Ranks,
        max_grad_norm: float | None,
    ):
        self.name: str = sharding.name
        self.module, self.ranks, self.optimizer = module, ranks, optimizer
        self.stage = sharding.stage
        self.named = trainable(module)
        _refuse(sharding, module, optimizer, ranks)
        self.groups = [list(group["params"]) for group in optimizer.param_groups]
        for number, group in enumerate(optimizer.param_groups):
            group["number"] = number
        everything = all(p.requires_grad for p in module.parameters()) and module.media is None
        self.as_they_come = everything and self.stage > 1
        self.engine = _engine(sharding, module, optimizer, ranks, max_grad_norm)
        self.partitions = _Partitions(self.stage, writes=ranks.rank == 0)
        self.shards: Shards = self.partitions
        self._idle: set[int] = set()
        self._hidden: list[tuple[dict[str, Any], list[Tensor]]] = []
        optimizer.register_step_pre_hook(self._hide_idle)
        optimizer.register_step_post_hook(self._show_idle)
        if self.stage == 3:
            _declare_reads(module)

    # ------------------------------------------------------------------------------------------- forward and update

    def forward(self, batch: TokenBatch, want: Collection[str] = ()) -> HeadOutputs:
        return HeadOutputs(**self.engine(batch, want))

    @contextmanager
    def update(self) -> Iterator[None]:
        self._idle = set()
        if self.as_they_come:
            yield
            return
        with self.engine.coalesce_grad_reduction():
            yield
            self._fill_gaps()

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

        steps = [self._flat_state(n).get(STEP) for n in range(len(self.groups))]
        number = {id(p): n for n, group in enumerate(self.groups) for p in group}
        for name, parameter in self.named.items():
            with self.shards.whole([parameter]):
                value = parameter.detach().to("cpu", copy=True)
            own: Moments = {}
            step = steps[number[id(parameter)]]
            if step is not None:
                own = {key: safe_get_full_optimizer_state(parameter, key).cpu() for key in MOMENTS}
                own[STEP] = step.detach().cpu()
            yield name, value, own

    @torch.no_grad()
    def load(self, parameters: Mapping[str, Tensor], moments: Mapping[str, Moments]) -> None:
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        self._make_moments(moments)
        for name, parameter in self.named.items():
            value = parameters[name].to(parameter.device)
            with self.partitions.whole([parameter], modified=True):
                parameter.copy_(value)
            safe_set_full_fp32_param(parameter, value.float())
            for key in MOMENTS:
                if key in moments.get(name, {}):
                    safe_set_full_optimizer_state(parameter, moments[name][key].to(value.device), key)

    def _make_moments(self, moments: Mapping[str, Moments]) -> None:
        """Room for the moments that are to be loaded, as a first step would make it."""
        names = {id(p): name for name, p in self.named.items()}
        self.optimizer.state.clear()
        for number, group in enumerate(self.groups):
            own = [moments.get(names[id(p)], {}) for p in group]
            if not any(own):
                continue
            for flat in self._flat(number):
                counter = torch.tensor(unequal_steps(own), dtype=torch.float32, device=flat.device)
                self.optimizer.state[flat] = {STEP: counter, **{key: torch.zeros_like(flat) for key in MOMENTS}}
        if self.stage < 3:
            zero = self.engine.optimizer
            zero._hp_optimizer_states_linked = False
            if len(self.optimizer.state) == len(self.groups):
                zero._lazy_init_hp_params_optimizer_state()

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

    def __init__(self, stage: int, writes: bool):
        self.stage, self.writes = stage, writes

    def whole(self, tensors: Sequence[Tensor], modified: bool = False) -> AbstractContextManager[None]:
        """modified: what rank 0 makes of them inside is what all go on with."""
        away = [t for t in tensors if hasattr(t, "ds_id")]
        if not away:
            return nullcontext()
        from deepspeed.runtime.zero import GatheredParameters

        found: AbstractContextManager[None] = GatheredParameters(away, modifier_rank=0 if modified else None)
        return found

    def kept(self, tensor: Tensor) -> Tensor:
        if self.stage < 3:
            return tensor
        return tensor.detach().to("cpu", copy=True) if self.writes else tensor.new_empty(0)


class _Tensors(nn.Module):
    """The policy's outputs as a dict: DeepSpeed looks for tensors there, and not in a dataclass."""

    def __init__(self, policy: PolicyModule):
        super().__init__()
        self.policy = policy

    def forward(self, batch: TokenBatch, want: Collection[str]) -> dict[str, Tensor | None]:
        return dict(vars(self.policy(batch, want=want)))


def _refuse(sharding: Sharding, module: PolicyModule, optimizer: torch.optim.Optimizer, ranks: Ranks) -> None:
    if type(optimizer) is not torch.optim.AdamW:
        raise Unsupported(
            f"{sharding.name} with the optimizer {type(optimizer).__name__}: its moments cannot be spread",
            where=WHERE,
            remedy="use `optim.name: adamw`, or `strategy: replicated`",
        )
    if sharding.stage == 3:
        _refuse_for_stage_3(module)
    first = next(module.parameters())
    if first.is_cuda and ranks.size > 1 and ranks.wire.type != "cuda":
        raise Unsupported(
            f"{sharding.name} with several ranks on one GPU: NCCL wants a GPU for each",
            where=WHERE,
            remedy="set `placement.trainer.gpus: 1`, or use `strategy: replicated`",
        )


def _refuse_for_stage_3(module: PolicyModule) -> None:
    odd = [name for name, p in module.named_parameters() if not p.is_floating_point()]
    if odd:
        raise Unsupported(
            f"zero3 with quantised weights ({odd[0]}): they cannot be spread",
            where=WHERE,
            remedy="use zero2: a quantised base is small, and stays whole on every rank",
        )
    if module.media is not None and any(p.requires_grad for t in module.media.towers() for p in t.parameters(False)):
        raise Unsupported(
            "zero3 where the vision tower or the projector is trained: ranks run them as often as they have media",
            where=WHERE,
            remedy="use zero2, or freeze them: `adapter: {tune: {vision: frozen, projector: frozen}}`",
        )
    if module.layout != "shared":
        raise Unsupported(
            f"zero3 for {type(module.model).__name__}, which is computed a sequence a row: ranks run it as often as "
            "their rows need",
            where=WHERE,
            remedy="use zero2",
        )


def _engine(
    sharding: Sharding,
    module: PolicyModule,
    optimizer: torch.optim.Optimizer,
    ranks: Ranks,
    max_grad_norm: float | None,
) -> Any:
    deepspeed = _deepspeed(next(module.parameters()).device)
    with _without_towers(module) if sharding.stage == 3 else nullcontext():
        engine, *_ = deepspeed.initialize(
            model=_Tensors(module),
            optimizer=optimizer,
            config=_config(sharding, module, max_grad_norm),
            dist_init_required=False,
        )
    return engine


def _config(sharding: Sharding, module: PolicyModule, max_grad_norm: float | None) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": sharding.stage, "overlap_comm": False, "contiguous_gradients": True}
    if sharding.offload.optimizer == "cpu":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": next(module.parameters()).is_cuda}
    if sharding.stage == 3:
        zero["stage3_param_persistence_threshold"] = sharding.keep_whole
        if sharding.offload.parameters == "cpu":
            zero["offload_param"] = {"device": "cpu", "pin_memory": next(module.parameters()).is_cuda}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": max_grad_norm or 0.0,
        "steps_per_print": None,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def _deepspeed(device: torch.device) -> Any:
    """DeepSpeed, on this device and in the process group there is."""
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ["LOCAL_RANK"] = str(device.index or 0)
    import torch.distributed as dist

    if not dist.is_initialized():
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo", store=dist.HashStore(), rank=0, world_size=1
        )
    import deepspeed
    import deepspeed.ops
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if device.type == "cpu":
        if deepspeed.get_accelerator().device_name() != "cpu":  # others import it first, and it looks for a GPU then
            deepspeed.accelerator.set_accelerator(CPU_Accelerator())
        # otherwise a kernel for sums in shared memory is compiled at the first start, for 40 s
        vars(deepspeed.ops).setdefault("__compatible_ops__", {})
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
    return deepspeed


# ---------------------------------------------------------------------------------------------------- parameters


def _layers(module: PolicyModule) -> list[nn.Module]:
    """The decoder layers of the language model: the longest of its lists."""
    lists = [list(m) for m in text_backbone(module.model).children() if isinstance(m, nn.ModuleList)]
    return max(lists, key=len, default=[])


def _declare_reads(module: PolicyModule) -> None:
    """Whose forward reads which parameters outside the forward of the modules that hold them: they are gathered
    around it."""
    from deepspeed.runtime.zero import register_external_parameter

    for reader, parameters in [(module.head, module.head.reads()), *((x, x.parameters()) for x in _layers(module))]:
        for parameter in parameters:
            register_external_parameter(reader, parameter)


def _holds(module: nn.Module, wanted: Sequence[Any]) -> bool:
    return any(inner is one for inner in module.modules() for one in wanted)


@contextmanager
def _without_towers(module: PolicyModule) -> Iterator[None]:
    """Inside the context the model is its language model alone; what else it has is as before after it."""
    if module.media is None:
        yield
        return
    model = module.model
    kept = [text_backbone(model), model.get_output_embeddings(), getattr(model, HEAD, None)]
    before: list[tuple[nn.Module, dict[str, Any], dict[str, Any]]] = []
    for holder in [m for m in model.modules() if m is not kept[0] and _holds(m, kept[:1])]:
        before.append((holder, dict(holder._modules), dict(holder._parameters)))
        holder._parameters.clear()
        for name in [name for name, m in holder.named_children() if not _holds(m, kept)]:
            del holder._modules[name]
    try:
        yield
    finally:
        for holder, children, parameters in before:
            holder._parameters.update(parameters)
            holder._modules.clear()
            holder._modules.update(children)
