"""What a merge did, and what its proofs measured."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class MergeReport:
    """What was merged, and what the proofs measured.

    module_error: largest relative error over modules and output features on random inputs, float32; worst_module: its
    module. kl_mean, kl_max, top1: merged folder against adapter-on. adapter_kl: KL(adapter-on || base), that is, how
    far the adapter moves the model; where the cast costs more than half of that, `warnings` says so.
    """

    base: str
    adapter: str | None
    out: str
    dtype: str
    modules: int
    module_error: float
    module_bound: float
    worst_module: str | None
    untied_head: bool
    kl_mean: float
    kl_max: float
    kl_bound: float
    top1: float
    top1_bound: float
    adapter_kl: float
    tensors: int
    bytes: int
    seed: int
    seconds: float
    warnings: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return asdict(self)
