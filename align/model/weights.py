"""Weights as named tensors: what engines are sent, what they must hold, and what is written for users.

Nothing here changes a model: merging an adapter makes new tensors, one at a time, in float32.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from align.errors import Unsupported
from align.model.folders import copy_all_but_weights, written_aside
from align.model.quantised import Packed, dense, linear_weight, quantised_layers
from align.model.score_head import edit_score_config, has_score_head
from align.model.shards import WHOLE, Shards
from align.protocols.trainer import digest_arrays
from align.recipe.chat_files import ChatFiles

MAX_SHARD = "5GB"


# ------------------------------------------------------------------------------------------------------- digests


def as_array(tensor: Tensor) -> np.ndarray:
    """The tensor's bits as numpy: bfloat16, which numpy has not, as uint16."""
    tensor = tensor.detach().cpu().contiguous()
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """`digest_arrays` of tensors under their names."""
    return digest_arrays({name: as_array(tensor) for name, tensor in tensors.items()})


def weights_digest(model: Any, dtype: torch.dtype) -> str:
    """Digest of a whole model's weights in `dtype`, under the names of its checkpoint."""
    return tensors_digest({name: cast(tensor, dtype) for name, tensor in full_state(model)})


def digest(peft: Any, dtype: torch.dtype, name: str = "default") -> str:
    """Digest of an adapter as an engine holds it in `dtype`.

    Per adapted module two arrays: "<module path>.lora_A" [r, in], and "<module path>.lora_B" [out, r] multiplied in
    `dtype` by the module's scaling (alpha / r, or alpha / sqrt(r) for rsLoRA), which is how engines store it.
    """
    arrays = {}
    for path, layer in lora_layers(peft, name):
        scaling = layer.scaling[name]
        lora_b = layer.lora_B[name].weight.detach().cpu().to(dtype)
        arrays[f"{path}.lora_A"] = as_array(layer.lora_A[name].weight.detach().cpu().to(dtype))
        arrays[f"{path}.lora_B"] = as_array(lora_b if scaling == 1 else lora_b * scaling)
    return digest_arrays(arrays)


def lora_layers(peft: Any, name: str = "default") -> Iterator[tuple[str, Any]]:
    """(module path in the base model, peft LoRA layer) of every linear layer that adapter `name` adapts."""
    from peft.tuners.lora import LoraLayer

    for path, module in peft.get_base_model().named_modules():
        if isinstance(module, LoraLayer) and name in module.lora_A:
            yield path, module


# ------------------------------------------------------------------------------------------------------- states


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """To `dtype` if it is floating point; integer buffers stay as they are."""
    return tensor.detach().to(dtype) if tensor.is_floating_point() else tensor.detach()


def full_state(model: Any, dtype: torch.dtype | None = None, shards: Shards = WHOLE) -> Iterator[tuple[str, Tensor]]:
    """(checkpoint name, tensor) of a model's weights; of tied weights, the one that checkpoints store. In `dtype`
    on the CPU, or (None) as they are. Weights are read one at a time; those that are spread over ranks are given to the
    rank that writes."""
    state: dict[str, Tensor] = {}
    for key, weight in _untied_state(model):
        with shards.whole([weight] if isinstance(weight, Tensor) else []):
            if shards.writes:
                tensor = dense(weight)
                state[key] = tensor.detach() if dtype is None else shards.kept(cast(tensor, dtype))
    yield from _checkpoint_names(model, state) if shards.writes else ()


def merged_state(
    peft: Any, dtype: torch.dtype, name: str = "default", shards: Shards = WHOLE
) -> Iterator[tuple[str, Tensor]]:
    """(checkpoint name, tensor in `dtype` on the CPU) of the base with adapter `name` merged in; `shards` as in
    `full_state`.

    Each merged weight is made in float32 and then cast. The model's own weights are left as they are.
    """
    model = peft.get_base_model()
    layers = dict(lora_layers(peft, name))
    state: dict[str, Tensor] = {}
    for key, weight in _untied_state(model):
        path, _, leaf = key.rpartition(".")
        layer = layers.get(path) if leaf in ("weight", "bias") else None
        if layer is not None:
            spread = list(layer.parameters())
        else:
            spread = [weight] if isinstance(weight, Tensor) else []
        with shards.whole(spread):
            if not shards.writes:
                continue
            tensor = dense(weight) if layer is None else _merged(layer, name, leaf)
            state[key] = shards.kept(cast(tensor, dtype))
    yield from _checkpoint_names(model, state) if shards.writes else ()


def _merged(layer: Any, name: str, leaf: str) -> Tensor:
    tensor = merged_weight(layer, name) if leaf == "weight" else merged_bias(layer, name)
    assert tensor is not None, "the layer has this parameter"
    return tensor


def merged_parameters(layer: Any, name: str) -> tuple[Tensor, Tensor | None]:
    """`merged_weight` and `merged_bias` of one layer."""
    return merged_weight(layer, name), merged_bias(layer, name)


@torch.no_grad()
def merged_weight(layer: Any, name: str) -> Tensor:
    """The weight, in float32, of the plain layer that equals `layer` with adapter `name` on.

    W + scaling * B A (transposed where the layer stores its weight so); variants such as DoRA by peft's own rule. W is
    what the layer computes with: of a packed one the unpacked weight.
    """
    weight = dense(linear_weight(layer.get_base_layer())).detach().float()
    if layer.lora_bias.get(name) and getattr(layer.get_base_layer(), "bias", None) is None:
        raise Unsupported("an adapter with a bias on a layer without one cannot be merged")
    if name in layer.lora_variant:
        merged: Tensor = layer.lora_variant[name].merge_safe(layer, name, weight.clone()).float()
        return merged
    delta = layer.lora_B[name].weight.float() @ layer.lora_A[name].weight.float()
    return weight + layer.scaling[name] * (delta.T if getattr(layer, "fan_in_fan_out", False) else delta)


@torch.no_grad()
def merged_bias(layer: Any, name: str) -> Tensor | None:
    """The bias of that layer, in float32; None where it has none."""
    bias: Tensor | None = getattr(layer.get_base_layer(), "bias", None)
    if bias is None:
        return None
    bias = bias.detach().float()
    if layer.lora_bias.get(name):
        bias = bias + layer.lora_B[name].bias.float() * layer.scaling[name]
    return bias


def _untied_state(model: Any) -> Iterator[tuple[str, Tensor | Packed]]:
    """The state dict without adapter weights, under the names it had before peft wrapped any module; packed weights as
    they are."""
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    packed = {f"{path}.weight": layer.packed for path, layer in quantised_layers(model).items()}
    for key, tensor in model.state_dict(keep_vars=True).items():
        if any(part.startswith("lora_") for part in key.split(".")):
            continue
        plain = key.replace(".base_layer.", ".")
        if ".modules_to_save." in plain:  # a score head's trained copy stands for the one that it was made from
            plain = plain.replace(".modules_to_save.default.", ".")
        elif ".original_module." in plain:
            continue
        if plain not in tied:
            yield plain, packed.get(key, tensor)


def _checkpoint_names(model: Any, state: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Undo the renaming and fusing that transformers does at load (fused experts, moved prefixes)."""
    from transformers.core_model_loading import revert_weight_conversion

    yield from revert_weight_conversion(model, state).items()


def stored_names(model: Any) -> dict[str, str]:
    """Name in checkpoints of each parameter that is stored by itself, by its name in the model before any adapter;
    those that are fused with others or split in checkpoints are left out."""
    state = {
        name: torch.empty(w.shape, dtype=w.dtype, device="meta") if isinstance(w, Packed) else w.detach()
        for name, w in _untied_state(model)
    }
    own = {id(tensor): name for name, tensor in state.items()}
    return {own[id(tensor)]: stored for stored, tensor in _checkpoint_names(model, state) if id(tensor) in own}


# ------------------------------------------------------------------------------------------------------- folders


def save_full(model: Any, folder: Path, *, base: Path, dtype: torch.dtype) -> None:
    """Write a whole model in transformers layout, complete or not at all.

    Weights are cast to `dtype`; config, tokenizer, chat template and generation config come from the folder `base`.
    Raises UserError where `folder` already holds files.
    """
    write_full(dict(full_state(model, dtype)), model, folder, base=base, dtype=dtype)


def write_full(
    state: Mapping[str, Tensor],
    model: Any,
    folder: Path,
    *,
    base: Path,
    dtype: torch.dtype,
    chat: ChatFiles | None = None,
) -> None:
    """`save_full` of weights that `full_state` gave, in `dtype`. chat: tokenizer and template, not the base's."""
    from huggingface_hub import save_torch_state_dict

    cpu = {name: tensor.cpu().contiguous() for name, tensor in state.items()}
    with written_aside(Path(folder), "model") as aside:
        save_torch_state_dict(cpu, aside, max_shard_size=MAX_SHARD, metadata={"format": "pt"})
        copy_all_but_weights(Path(base), aside)
        if chat is not None:
            chat.write(aside, Path(base))
        edit_config(aside / "config.json", dtype)
        if has_score_head(model):
            edit_score_config(aside / "config.json", model)


def edit_config(file: Path, dtype: torch.dtype, *, untie: bool = False) -> None:
    """Write the weights' dtype into a config.json, and `tie_word_embeddings: false` where `untie`."""
    config = json.loads(file.read_text(encoding="utf-8"))
    word = str(dtype).removeprefix("torch.")
    parts = [config, *(value for value in config.values() if isinstance(value, dict))]
    for part in parts:
        keys = [key for key in ("dtype", "torch_dtype") if key in part] or (["dtype"] if part is config else [])
        part.update(dict.fromkeys(keys, word))
        if untie and (part is config or "tie_word_embeddings" in part):
            part["tie_word_embeddings"] = False
    file.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
