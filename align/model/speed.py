"""How fast this machine multiplies in each dtype that a model may be trained in."""

from __future__ import annotations

import time

import torch
import torch.nn.functional as F

TOKENS = 128
WIDEST = 1024  # of the sides that are multiplied: a CPU that is slow at a dtype must not take seconds to say so
SECONDS = 0.2


def multiplied(inner: int, outer: int, threads: int) -> dict[str, float]:
    """GFLOP/s of a linear layer over 128 tokens, f[128, inner] by f[outer, inner], on `threads` threads of the CPU: the
    best of the repeats that fit into a fifth of a second, at least two, taken in turn by dtype name. Sides above 1,024
    are measured as 1,024."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        inner, outer = min(inner, WIDEST), min(outer, WIDEST)
        generator = torch.Generator().manual_seed(0)
        rows, layer = torch.randn(TOKENS, inner, generator=generator), torch.randn(outer, inner, generator=generator)
        sides = {name: (rows.to(dtype), layer.to(dtype)) for name, dtype in _DTYPES.items()}
        best, spent = dict.fromkeys(sides, float("inf")), dict.fromkeys(sides, 0.0)
        repeat = 0
        while repeat < 2 or min(spent.values()) < SECONDS:
            for name, (x, w) in sides.items():
                if repeat >= 2 and spent[name] >= SECONDS:
                    continue
                took = _once(x, w)
                spent[name] += took
                best[name] = min(best[name], took)
            repeat += 1
        work = 2e-9 * TOKENS * inner * outer
        return {name: round(work / took, 2) for name, took in best.items()}
    finally:
        torch.set_num_threads(before)


_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def _once(x: torch.Tensor, w: torch.Tensor) -> float:
    begun = time.perf_counter()
    with torch.inference_mode():
        F.linear(x, w)
    return max(time.perf_counter() - begun, 1e-9)
