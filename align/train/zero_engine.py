"""DeepSpeed's engine for `align.train.zero`, and what it must be told of our model.

ZeRO-3 gathers a decoder layer at a time. Inside a layer everything is whole, so fused kernels that read other modules'
parameters need not know. Every rank must run the same modules in one order. Towers for media are therefore not spread:
how often they run depends on a rank's share, and on what it keeps of it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from align.errors import Unsupported
from align.model.adapter_config import HEAD
from align.model.backbone import text_backbone
from align.model.policy_module import PolicyModule

if TYPE_CHECKING:
    from align.recipe.sharding import Sharding
    from align.train.ranks import Ranks
    from align.types import TokenBatch

WHERE = "placement.trainer.strategy"


class _Tensors(nn.Module):
    """The policy's outputs as a dict: DeepSpeed looks for tensors there, and not in a dataclass."""

    def __init__(self, policy: PolicyModule):
        super().__init__()
        self.policy = policy

    def forward(self, batch: TokenBatch, want: Collection[str]) -> dict[str, Tensor | None]:
        return dict(vars(self.policy(batch, want=want)))


def stage_of(sharding: Sharding) -> int:
    """1, 2 or 3, of a strategy that is ZeRO's."""
    return int(sharding.name.removeprefix("zero"))


def refuse(sharding: Sharding, module: PolicyModule, optimizer: torch.optim.Optimizer, ranks: Ranks) -> None:
    """Raise Unsupported for what this strategy cannot hold."""
    if type(optimizer) is not torch.optim.AdamW:
        raise Unsupported(
            f"{sharding.name} with the optimizer {type(optimizer).__name__}: its moments cannot be spread",
            where=WHERE,
            remedy="use `optim.name: adamw`, or `strategy: replicated`",
        )
    if stage_of(sharding) == 3:
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


def make_engine(
    sharding: Sharding,
    module: PolicyModule,
    optimizer: torch.optim.Optimizer,
    max_grad_norm: float | None,
) -> Any:
    """DeepSpeed's engine around `module`, in the process group there is; from here on it may hold a part of it."""
    deepspeed = _deepspeed(next(module.parameters()).device)
    with without_towers(module) if stage_of(sharding) == 3 else nullcontext():
        engine, *_ = deepspeed.initialize(
            model=_Tensors(module),
            optimizer=optimizer,
            config=_config(sharding, module, max_grad_norm),
            dist_init_required=False,
        )
    return engine


def _config(sharding: Sharding, module: PolicyModule, max_grad_norm: float | None) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": stage_of(sharding), "overlap_comm": False, "contiguous_gradients": True}
    if sharding.offload.optimizer == "cpu":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": next(module.parameters()).is_cuda}
    if stage_of(sharding) == 3:
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

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)  # it warns of what is meant here
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


def declare_reads(module: PolicyModule) -> None:
    """Whose forward reads which parameters outside the forward of the modules that hold them: they are gathered
    around it."""
    from deepspeed.runtime.zero import register_external_parameter

    for reader, parameters in [(module.head, module.head.reads()), *((x, x.parameters()) for x in _layers(module))]:
        for parameter in parameters:
            register_external_parameter(reader, parameter)


def _holds(module: nn.Module, wanted: Sequence[Any]) -> bool:
    return any(inner is one for inner in module.modules() for one in wanted)


@contextmanager
def without_towers(module: PolicyModule) -> Iterator[None]:
    """Inside the context the model is its language model alone, which is all that ZeRO-3 spreads; what else it has is
    there again after it."""
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
