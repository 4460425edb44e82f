"""What a vLLM model holds in memory, read back from the buffers that its kernels compute with.

A digest of the file that was sent proves only that a file was sent. These functions name vLLM's internals (as
`rollout.vllm_version` names its calls) but import nothing of it; both files change together when vLLM does.

An adapter lives in one slot of stacked, zero-padded buffers per module, query, key and value of an attention in the
slices of one fused module, `lora_B` already multiplied by alpha / rank.

Whole weights live in parameters, fused likewise. On CPU a linear layer repacks its weight for oneDNN or AMX and lets go
of the original, so the layer is applied to the identity matrix: each sum then has a single term that is not zero, and
the result is the weight itself, exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from align.errors import EngineError, Unsupported

NameParser = Callable[[str], tuple[str, bool]]
"""Adapter tensor name -> (the engine's module path, whether it is lora_A)."""

_PEFT_PREFIX = "base_model.model."


def as_array(tensor: Tensor) -> np.ndarray:
    """The tensor's bits as numpy; bfloat16, which numpy lacks, as uint16."""
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(np.uint16)
    return tensor.numpy()


# ------------------------------------------------------------------------------------------------ adapters


def held_adapter(
    model: nn.Module, adapter_id: int, shapes: Mapping[str, tuple[int, ...]], parse: NameParser
) -> dict[str, np.ndarray]:
    """The adapter in the slot of `adapter_id`, as `<module path>.lora_A` f[r, in] and `<module path>.lora_B` f[out, r].

    Args:
        shapes: name and shape of each tensor in the adapter's file, by which buffers are unpadded and named.

    Raises:
        EngineError: the engine has no such adapter, ignored a module of the file, or holds more than the file has.
        Unsupported: the file has more than LoRA on linear layers, or a layer's buffers are not understood.
    """
    manager: Any = getattr(model, "lora_manager", None)
    if manager is None or adapter_id not in manager.lora_index_to_id:
        raise EngineError(f"the engine holds no adapter with id {adapter_id}")
    slot = manager.lora_index_to_id.index(adapter_id)
    held: dict[str, tuple[Tensor, Tensor]] = {}
    for path, layer in manager.modules.items():
        held.update(_slices(path, layer, slot, manager.packed_modules.get(path, [path])))
    arrays: dict[str, np.ndarray] = {}
    for name, shape in shapes.items():
        if ".lora_A." not in name and ".lora_B." not in name:
            raise Unsupported(
                f"an adapter with {name!r} cannot be served and compared: only LoRA on linear layers can",
                where="adapter.targets",
                remedy="leave that module out of adapter.targets, or set rollout.weights=merged",
            )
        path, is_a = parse(name)
        if path not in held:
            raise EngineError(
                f"the engine ignored the adapter on module {path!r}: it does not apply adapters there",
                remedy="leave that module out of adapter.targets, or set rollout.weights=merged",
            )
        arrays[_array_name(name, is_a)] = _unpad(held[path][0 if is_a else 1], shape, name)
    used = {parse(name)[0] for name in shapes}
    extra = [path for path, tensors in held.items() if path not in used and any(bool(t.any()) for t in tensors)]
    if extra:
        raise EngineError(f"the engine holds adapter weights that were not sent, on {', '.join(sorted(extra)[:4])}")
    return arrays


def _array_name(tensor_name: str, is_a: bool) -> str:
    path, _, _ = tensor_name.removeprefix(_PEFT_PREFIX).rpartition(".lora_A." if is_a else ".lora_B.")
    return f"{path}.lora_{'A' if is_a else 'B'}"


def _slices(path: str, layer: Any, slot: int, names: list[str]) -> Iterator[tuple[str, tuple[Tensor, Tensor]]]:
    """(module path, (A, B)) of one wrapped layer, padded to the engine's rank; several where modules are fused."""
    a, b = ([stack[slot] for stack in _stacks(layer, side)] for side in ("lora_a_stacked", "lora_b_stacked"))
    a, b = ([t.squeeze(0) if t.ndim == 3 else t for t in side] for side in (a, b))
    if len(names) == len(a):
        yield from zip(names, zip(a, b, strict=True), strict=True)
    elif len(names) == 1 and all(torch.equal(a[0], other) for other in a[1:]):
        yield path, (a[0], torch.cat(b))  # the checkpoint fuses what vLLM's layer splits again
    else:
        raise Unsupported(
            f"the adapter buffers of {path} ({type(layer).__name__}) cannot be read back: "
            f"{len(a)} slices for the modules {', '.join(names)}",
            remedy="leave that module out of adapter.targets, or set rollout.weights=merged",
        )


def _stacks(layer: Any, side: str) -> tuple[Tensor, ...]:
    stacked = getattr(layer, side)
    return (stacked,) if isinstance(stacked, Tensor) else tuple(stacked)


def _unpad(padded: Tensor, shape: tuple[int, ...], name: str) -> np.ndarray:
    if len(shape) != 2 or any(have < want for have, want in zip(padded.shape, shape, strict=True)):
        raise EngineError(f"the engine holds {tuple(padded.shape)} for the adapter tensor {name} of shape {shape}")
    rows, columns = shape
    if bool(padded[rows:].any()) or bool(padded[:, columns:].any()):
        raise EngineError(f"the engine holds more of {name} than was sent: the slot was not cleared")
    return as_array(padded[:rows, :columns])


# ------------------------------------------------------------------------------------------------ whole weights


def held_weights(
    model: nn.Module,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype,
    rename: Callable[[str], str],
    unused: Callable[[str], Tensor | None],
) -> dict[str, np.ndarray]:
    """The parameters named in `shapes` as the engine computes with them, under the same names and shapes.

    Args:
        shapes: name and shape of each tensor that was fed, in transformers' layout.
        dtype: of the tensors that were fed; the engine may hold some (a packed layer's bias) in a wider one.
        rename: transformers' parameter name -> the engine's, fused modules aside.
        unused: the value of a tensor that the engine has no parameter for, where it may do without it, else None.

    Raises:
        EngineError: a parameter of the engine was not fed and would keep an older version's value.
        Unsupported: a fed tensor's place in the engine is not known (experts, quantized layers).
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    fused = _fused_modules(modules)
    cache: dict[str, Tensor] = {}
    covered: set[int] = set()
    arrays: dict[str, np.ndarray] = {}
    for name, shape in shapes.items():
        path, start = _place(rename(name), modules, fused, shapes, name)
        module_path, _, leaf = path.rpartition(".")
        module = modules.get(module_path)
        parameter = getattr(module, leaf, None)
        if not isinstance(module, nn.Module) or not isinstance(parameter, Tensor):
            if (value := unused(name)) is not None:
                arrays[name] = as_array(value)
                continue
            raise Unsupported(
                f"the engine has no parameter for {name}, so what it holds cannot be compared",
                remedy="train an adapter and publish it as one (rollout.weights=adapter)",
            )
        covered.add(id(parameter))
        if path not in cache:
            cache[path] = _held_matrix(module, leaf, parameter).to(dtype)
        arrays[name] = as_array(cache[path][start : start + shape[0]].reshape(shape))
    for path, module in modules.items():  # a tied head has no name of its own in the file, but its own packed copy
        if hasattr(module, "cpu_linear") and f"{path}.weight" not in cache:
            _held_matrix(module, "weight", module.weight)
    stale = [name for name, parameter in model.named_parameters() if id(parameter) not in covered]
    if stale:
        raise EngineError(f"{len(stale)} parameters were not published and would stay old: {', '.join(stale[:4])}")
    return arrays


_USUAL = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
"""What towers of images fuse without saying so."""


def _fused_modules(modules: Mapping[str, Any]) -> dict[str, list[tuple[str, list[str]]]]:
    """A module's name in the checkpoint -> the fused modules that may hold it, each with its parts in order. A model of
    several parts says of each what it fuses."""
    fused: dict[str, list[tuple[str, list[str]]]] = {}
    for table in [*(getattr(module, "packed_modules_mapping", None) or {} for module in modules.values()), _USUAL]:
        for whole, parts in table.items():
            for part in parts:
                if part != whole and (whole, parts) not in fused.setdefault(part, []):
                    fused[part].append((whole, parts))
    return fused


def _place(
    name: str,
    modules: Mapping[str, Any],
    fused: Mapping[str, list[tuple[str, list[str]]]],
    shapes: Mapping[str, tuple[int, ...]],
    sent: str,
) -> tuple[str, int]:
    """The engine's parameter path for a (renamed) parameter, and the first row of it inside that parameter."""
    path, _, leaf = name.rpartition(".")
    parent, _, child = path.rpartition(".")
    found = [] if path in modules else [one for one in fused.get(child, []) if f"{parent}.{one[0]}" in modules]
    if not found:
        return name, 0
    whole, parts = found[0]
    siblings = [sent.removesuffix(f"{child}.{leaf}") + f"{part}.{leaf}" for part in parts[: parts.index(child)]]
    return f"{parent}.{whole}.{leaf}", sum(shapes[sibling][0] for sibling in siblings if sibling in shapes)


def _held_matrix(module: nn.Module, leaf: str, parameter: Tensor) -> Tensor:
    """The parameter's value [rows, ...], from what the layer computes where the layer computes from a repacked copy."""
    if leaf != "weight" or not hasattr(module, "cpu_linear"):
        return parameter.detach()
    applied = _apply_to_identity(module, parameter)
    if parameter.numel() and not torch.equal(applied, parameter[: applied.shape[0]]):
        raise EngineError(
            f"{type(module).__name__} computes with other weights than it holds: its packed copy is older",
        )
    return applied


def _apply_to_identity(module: Any, parameter: Tensor, rows: int = 1024) -> Tensor:
    """W [out, in] of a layer that computes x W^T, exactly; O(in^2 out), `rows` at a time to bound memory."""
    sizes = ("input_size_per_partition", "input_size", "embedding_dim")
    width = next(int(getattr(module, size)) for size in sizes if getattr(module, size, 0))
    columns = []
    for first in range(0, width, rows):
        block = torch.zeros(min(rows, width - first), width, dtype=parameter.dtype)
        block[torch.arange(block.shape[0]), torch.arange(first, first + block.shape[0])] = 1
        columns.append(module.quant_method.apply(module, block, None).T)
    return torch.cat(columns, dim=1)


def retie(model: nn.Module, groups: list[list[str]]) -> None:
    """Tie weights again, after a reload, between the module paths of each group (the first one is the source).

    vLLM's layerwise reload refills embeddings and leaves a tied head with its old packed copy: the model then computes
    its logits from the previous version, silently.
    """
    for source, *others in groups:
        weight = model.get_submodule(source).weight
        for path in others:
            module: Any = model.get_submodule(path)
            module.weight = weight
            module.quant_method.process_weights_after_loading(module)


def tied_groups(model: nn.Module) -> list[list[str]]:
    """Paths of modules that share one `weight`, in the order of the model (embeddings before the head)."""
    owners: dict[int, list[str]] = {}
    seen: set[int] = set()
    for path, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, nn.Parameter) and weight.numel() and id(module) not in seen:
            seen.add(id(module))
            owners.setdefault(id(weight), []).append(path)
    return [paths for paths in owners.values() if len(paths) > 1]
