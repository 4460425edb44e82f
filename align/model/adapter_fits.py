"""Whether an adapter in a folder fits a model, and is what the recipe says of it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.errors import ModelError
from align.model.adapter_config import (
    OWN_BASE,
    read_adapter_config,
    recipe_adapter,
    refuse_beyond_lora,
    refuse_unknown,
    scores,
)
from align.model.lora_targets import fresh_config, targeted_modules
from align.model.quantised import quantised_layers
from align.model.score_head import adapter_labels, has_score_head, model_labels
from align.recipe.adapter import Adapter, Quant
from align.recipe.adapter_folder import quantised_base

if TYPE_CHECKING:
    from peft import LoraConfig


def config_of(model: Any, folder: Path, use: str) -> LoraConfig:
    """The folder's own configuration, for `use`: train or merge. Raises ModelError where it belongs on another model,
    Unsupported where it is more than LoRA on linear layers."""
    from peft import LoraConfig

    stored = read_adapter_config(folder)
    refuse_unknown(stored, LoraConfig.__dataclass_fields__, folder)
    refuse_beyond_lora(stored, folder, use, score_head=has_score_head(model))
    if has_score_head(model) and scores(stored) and not adapter_labels(folder).agrees_with(model_labels(model)):
        raise ModelError(
            f"the adapter has a head for a {adapter_labels(folder).words}, the model one for a "
            f"{model_labels(model).words}",
            where=folder,
            remedy="give the stage the adapter's labels in their order, or put a merge of the stage before between",
        )
    own = folder / OWN_BASE
    if own.is_dir() and Path(model.name_or_path).resolve() != own.resolve():
        raise ModelError(
            f"the adapter belongs on its own base, with the parts that were trained whole, not on {model.name_or_path}",
            where=folder,
            remedy=f"give {own} as the base",
        )
    if quantised_base(folder) is not None and not quantised_layers(model):
        raise ModelError(
            "the adapter was trained on weights in four bits, and those of this model are not",
            where=folder,
            remedy="write `adapter: {kind: qlora}`, or merge it with `align merge`, which packs the base first",
        )
    config = LoraConfig.from_pretrained(str(folder))
    config.inference_mode = False
    return config


def require_same(model: Any, adapter: Adapter, config: LoraConfig, folder: Path) -> None:
    """What the recipe can say of an adapter must be what the folder's is; the rest is the folder's own business: which
    layers it is on, exclusions by a regular expression."""
    if adapter == recipe_adapter(folder):  # every word is the folder's own, as where the recipe says nothing
        return
    ours = fresh_config(model, adapter)
    packed = quantised_base(folder)
    if packed is not None and packed.quant != adapter.quant:
        raise ModelError(
            f"the adapter was trained on weights in four bits ({_quant_words(packed.quant)}), and the stage trains on "
            f"{_quant_words(adapter.quant)}",
            where=folder,
            remedy="write `adapter: {kind: qlora}` with the same `quant`, or put a merge stage between",
        )
    pairs = {
        "rank": (ours.r, config.r),
        "alpha": (ours.lora_alpha, config.lora_alpha),
        "rslora": (ours.use_rslora, config.use_rslora),
        "DoRA": (ours.use_dora, config.use_dora),
        "dropout": (ours.lora_dropout, config.lora_dropout),
        "targets": (targeted_modules(model, ours), targeted_modules(model, config)),
    }
    differing = [
        f"{name} {mine} in the recipe, {theirs} in the folder" if name != "targets" else "other target modules"
        for name, (mine, theirs) in pairs.items()
        if mine != theirs
    ]
    if differing:
        raise ModelError(
            f"the stage starts from an adapter of another shape: {'; '.join(differing)}",
            where=folder,
            remedy="put a merge stage between, or leave out `adapter:` to go on with this one",
        )


def _quant_words(quant: Quant | None) -> str:
    return "others" if quant is None else ", ".join(f"{key}: {value}" for key, value in quant.model_dump().items())
