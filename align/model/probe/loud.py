"""Modules by themselves, on inputs much larger and smaller than usual: limits that activations never reach in a small
probe (clamps, caps, epsilons) act there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from align.model.probe.conditions import FAILURES
from align.model.probe.float32 import layers_of, widened
from align.model.probe.trace import Parting, apart, parts_of_forward, sketch

LOUD = (1e-3, 30.0, 1000.0)  # times what a module is usually given
LOUD_BOUND = 1e-4


@contextmanager
def sampled(backbone: nn.Module, prefix: str) -> Iterator[dict[str, Tensor]]:
    """What modules with parameters that take one tensor are given inside the block: a few tokens of it."""
    found: dict[str, Tensor] = {}
    handles = []

    def watch(path: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            if len(args) == 1 and not kwargs and isinstance(args[0], Tensor) and args[0].is_floating_point():
                x = args[0]
                found[path] = (x[:, -4:] if x.dim() == 3 else x[-4:]).detach().float().clone()

        return hook

    for path, module in parts_of_forward(backbone):
        plain = isinstance(module, nn.Linear | nn.Embedding) or hasattr(module, "lora_A")
        if not plain and any(True for _ in module.parameters()):
            handles.append(module.register_forward_pre_hook(watch(prefix + path), with_kwargs=True))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


Loud = dict[tuple[str, float], Tensor]  # sketches, by path and by how many times the usual


def loud_values(samples: Mapping[str, Tensor], backbone: nn.Module, prefix: str) -> Loud:
    """What modules make, in float32, of LOUD times the samples. prefix: the backbone's path."""
    found: Loud = {}
    for path, layer in layers_of(backbone).items():
        names = [name for name in samples if f"{name}.".startswith(f"{prefix}{path}.")]
        if not names:
            continue
        with widened(layer):
            for name in names:
                module = backbone.get_submodule(name.removeprefix(prefix))
                for times in LOUD:
                    try:
                        out = module(samples[name] * times)
                    except FAILURES:
                        continue
                    out = out[0] if isinstance(out, tuple | list) else out
                    if isinstance(out, Tensor) and out.dim() > 1 and out.is_floating_point():
                        found[name, times] = sketch(out).flatten(0, -2)
    return found


def loud_parting(now: Loud, own: Loud) -> Parting | None:
    """The first module that makes something else now of what is loud, its parts first."""
    apart_by = {key: apart(now[key], own[key]) for key in own if key in now}
    wrong = [(name, d) for (name, _), d in apart_by.items() if d > LOUD_BOUND]
    inner = [(n, d) for n, d in wrong if not any(other != n and other.startswith(f"{n}.") for other, _ in wrong)]
    return Parting(inner[0][0], inner[0][1], LOUD_BOUND) if inner else None
