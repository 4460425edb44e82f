"""Which modules an adapter is put on: the recipe's words to peft's configuration, and back to module paths."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from align.errors import ModelError, Unsupported
from align.model.adapter_config import HEAD
from align.model.bitsandbytes_import import import_bitsandbytes
from align.model.parts import parts_of
from align.recipe.adapter import Adapter
from align.recipe.support import refuse_parts_of_text

if TYPE_CHECKING:
    from peft import LoraConfig

import_bitsandbytes()  # before peft does

FAILURES = (RuntimeError, TypeError, ValueError, IndexError, AttributeError, AssertionError)


def fresh_config(model: Any, adapter: Adapter) -> LoraConfig:
    """peft's configuration for the recipe's `adapter:`; every target and every exclusion must match something."""
    from peft import LoraConfig

    if adapter.kind == "full":
        raise Unsupported(
            "adapter kind 'full' is no LoRA", where="adapter.kind", remedy="use kind: lora, qlora or dora"
        )
    parts = parts_of(model)
    if parts.one:
        refuse_parts_of_text(adapter)
    linear = [name for name in linear_modules(model) if adapter.modes[parts.of(name)] == "lora"]
    for part in adapter.parts("lora"):
        if not any(parts.of(name) == part for name in linear):
            raise ModelError(
                f"`adapter.tune.{part}: lora`, and the {part} part of {type(model).__name__} has no linear layer",
                where=f"adapter.tune.{part}",
                remedy="set it to full or to frozen",
            )
    for word in adapter.exclude:
        _require_match(word, linear, "adapter.exclude")
    targets = _resolve_targets(model, adapter.targets, linear)
    if given := _adapts(targets, linear) & taken_for_experts(model):
        names = ", ".join(sorted({name.rpartition(".")[2] for name in given}))
        raise ModelError(
            f"peft gives LoRA on {names} of this model to its stacked experts, which is not supported",
            where="adapter.targets",
            remedy="name other layers, or leave `targets` out: all-linear goes on what can be adapted",
        )
    alpha = int(adapter.alpha) if adapter.alpha == int(adapter.alpha) else adapter.alpha
    return LoraConfig(
        r=adapter.rank,
        lora_alpha=alpha,
        lora_dropout=adapter.dropout,
        target_modules=targets,
        exclude_modules=sorted(adapter.exclude) or None,
        bias="none",
        task_type="CAUSAL_LM",
        use_rslora=adapter.rslora,
        use_dora=adapter.kind == "dora",
    )


def with_score_head(config: LoraConfig) -> LoraConfig:
    """The same adapter for a model with a score head, which is trained whole beside it."""
    config.task_type = "SEQ_CLS"
    config.modules_to_save = [HEAD]
    return config


def linear_modules(model: Any) -> list[str]:
    """Paths of the layers that LoRA can be put on, adapters' own layers and a score head (trained whole) left out."""
    return [
        name
        for name, module in model.named_modules()
        if _is_linear(module) and "lora_" not in name and name.partition(".")[0] != HEAD
    ]


@torch.no_grad()
def _is_linear(module: nn.Module) -> bool:
    """Whether a module is the product that LoRA adds to. Routers (Llama 4, Phi-MoE) and grouped projections (DeepSeek
    V4) call themselves Linear and return something else, which shows at once."""
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, Conv1D):
        return True
    if not isinstance(module, nn.Linear):
        return False
    weight = module.weight
    packed = weight.element_size() == 1 or type(module).__module__.startswith("bitsandbytes.")
    if type(module).forward is nn.Linear.forward or packed or weight.is_meta:
        return True
    rows = torch.linspace(-1, 1, 2 * module.in_features, dtype=weight.dtype, device=weight.device).view(2, -1)
    try:
        found = module(rows)
    except FAILURES:
        return False
    wanted = nn.functional.linear(rows, weight, module.bias)
    close = 0.05 if weight.element_size() < 4 else 1e-3
    return (
        isinstance(found, torch.Tensor) and found.shape == wanted.shape and torch.allclose(found, wanted, close, close)
    )


def all_linear(model: Any) -> set[str]:
    """Paths of the layers that `targets: all-linear` goes on."""
    return set(linear_modules(model)) - {head_name(model)} - left_out(model) - taken_for_experts(model)


def left_out(model: Any) -> set[str]:
    """Paths of linear layers that `all-linear` leaves out beside the output head: those on which peft refuses LoRA,
    since fused kernels of Mamba read their weights past the module."""
    from peft import LoraConfig
    from peft.tuners import tuners_utils

    refuses = getattr(tuners_utils, "_check_lora_target_modules_mamba", None)
    if refuses is None:  # a peft without that rule
        return set()

    def refused(leaf: str) -> bool:
        try:
            refuses(LoraConfig(), model, leaf)
        except ValueError:
            return True
        return False

    return _called(model, refused)


def taken_for_experts(model: Any) -> set[str]:
    """Paths of linear layers whose names peft gives to stacked experts, as older transformers called those: asked to
    adapt a dense layer or a shared expert of such a name, peft adapts the experts in its place."""
    from peft import LoraConfig
    from peft.utils import transformers_weight_conversion as conversion

    convert = getattr(conversion, "convert_peft_config_for_transformers", None)
    if convert is None:  # a peft without that rule
        return set()

    def taken(leaf: str) -> bool:
        config = LoraConfig(target_modules=[leaf])
        try:
            convert(config, model, conversions=None)
        except ValueError:  # without the name that it is joined with
            return True
        return leaf not in set(config.target_modules or ())

    return _called(model, taken)


def _called(model: Any, wanted: Callable[[str], bool]) -> set[str]:
    """Paths of linear layers by their last name, of which each is asked about once."""
    linear = linear_modules(model)
    leaves = {leaf for leaf in {name.rpartition(".")[2] for name in linear} if wanted(leaf)}
    return {name for name in linear if name.rpartition(".")[2] in leaves}


def target_notes(model: Any, adapter: Adapter) -> list[str]:
    """What `targets: all-linear` means for this model where that is not every linear layer."""
    if adapter.targets != "all-linear" or not adapter.parts("lora"):
        return []
    named = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)} - {HEAD}
    others = {name for name in named if not _is_linear(model.get_submodule(name))}
    stacked = {
        name
        for name, module in model.named_modules()
        if "experts" in name.split(".") and any(p.ndim == 3 for p in module.parameters(recurse=False))
    }
    because = {
        "their weights are stacked in tensors, not linear layers (`adapter: {kind: full}` trains them)": stacked,
        "peft refuses it there, fused kernels of Mamba read their weights": left_out(model),
        "peft gives LoRA of these names to the stacked experts": taken_for_experts(model),
        "what they return is not the product of a linear layer": others,
    }
    return [
        f"no LoRA on {', '.join(sorted({name.rpartition('.')[2] for name in names}))} ({len(names)} layers): {why}"
        for why, names in because.items()
        if names
    ]


def _resolve_targets(model: Any, targets: str | tuple[str, ...], linear: list[str]) -> list[str] | str:
    """What peft is told. linear: the layers of the parts that get LoRA; no other is matched."""
    if targets == "all-linear":
        return _short(model, all_linear(model).intersection(linear))
    if isinstance(targets, str) and not re.fullmatch(r"[\w.]+", targets):
        try:
            matched = {name for name in linear_modules(model) if re.fullmatch(targets, name)}
        except re.error as error:
            raise ModelError(
                f"{targets!r} is no regular expression: {error}",
                where="adapter.targets",
            ) from error
        if not matched:
            raise ModelError(
                f"{targets!r} matches no linear layer of the model",
                where="adapter.targets",
            )
        return targets if matched <= set(linear) else sorted(matched & set(linear))
    words = (targets,) if isinstance(targets, str) else targets
    for word in words:
        _require_match(word, linear, "adapter.targets")
    matched = {name for name in linear if any(_is_called(name, word) for word in words)}
    everywhere = {name for name in linear_modules(model) if any(_is_called(name, word) for word in words)}
    return sorted(words) if matched == everywhere else sorted(matched)


def _adapts(targets: list[str] | str, linear: list[str]) -> set[str]:
    """Paths of the layers that peft's `target_modules` name."""
    if isinstance(targets, str):
        return {name for name in linear if re.fullmatch(targets, name)}
    return {name for name in linear if any(_is_called(name, word) for word in targets)}


def _short(model: Any, wanted: set[str]) -> list[str]:
    """Short names where they mean the same: every tool reads them, and the file stays small."""
    leaves = {name.rpartition(".")[2] for name in wanted}
    matched = {name for name, _ in model.named_modules() if name.rpartition(".")[2] in leaves}
    return sorted(leaves) if matched == wanted else sorted(wanted)


def _is_called(name: str, word: str) -> bool:
    return name == word or name.endswith(f".{word}")


def _require_match(word: str, linear: list[str], where: str) -> None:
    if any(_is_called(name, word) for name in linear):
        return
    leaves = sorted({name.rpartition(".")[2] for name in linear})
    near = difflib.get_close_matches(word, leaves, n=1)
    raise ModelError(
        f"{word!r} is no linear layer of what gets LoRA",
        where=where,
        remedy=(f"did you mean {near[0]!r}? " if near else "") + f"it has {', '.join(leaves)}",
    )


def head_name(model: Any) -> str:
    head = model.get_output_embeddings()
    return next((name for name, module in model.named_modules() if module is head), "")


def is_targeted(config: LoraConfig, module: str) -> bool:
    from peft.tuners.tuners_utils import check_target_module_exists

    if config.target_modules == "all-linear" or not module:
        return False
    return bool(check_target_module_exists(config, module))


def targeted_modules(model: Any, config: LoraConfig) -> set[str]:
    if isinstance(config.target_modules, str) and config.target_modules.lower() == "all-linear":
        return all_linear(model)
    return {name for name in linear_modules(model) if is_targeted(config, name)}
