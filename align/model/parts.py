"""The parts of a model that can be tuned apart: towers that read media, the projector behind them, the language model.

Every parameter belongs to one part. transformers' families name their modules alike enough to be told apart by them:
the language model is what `get_decoder` and `get_output_embeddings` return; a module with a projector's name is the
projector, inside a tower too (Qwen's merger stands in `visual`); a module with a tower's name is a tower.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from align.errors import ModelError
from align.recipe.adapter import PARTS, Part

# names of modules, anywhere on a parameter's path outside the language model
PROJECTORS = frozenset(
    {
        "aligner",
        "connector",
        "deepstack_merger_list",
        "embed_audio",
        "embed_vision",
        "image_newline",
        "merger",
        "mm_projector",
        "multi_modal_projector",
        "projector",
        "vision_adapter",
        "visual_merger",
    }
)
TOWERS = frozenset(
    {
        "audio_model",
        "audio_tower",
        "image_tower",
        "video_tower",
        "vision_encoder",
        "vision_model",
        "vision_tower",
        "visual",
        "vqmodel",
    }
)


@dataclass(frozen=True)
class Parts:
    """language: paths of the language model and its head; empty where the whole model is one (a model of text)."""

    language: tuple[str, ...]

    @property
    def one(self) -> bool:
        """Whether the model reads text alone."""
        return not self.language

    def of(self, path: str) -> Part:
        """The part that a parameter or module belongs to, adapters' own and wrapped ones included."""
        found = self.find(path)
        if found is None:
            raise ModelError(
                f"it cannot be told whether {path!r} is of the vision tower, the projector or the language model",
                where="adapter.tune",
                remedy="report this family; a model of text alone in its place can be trained",
            )
        return found

    def find(self, path: str) -> Part | None:
        if self.one or any(path == name or path.startswith(f"{name}.") for name in self.language):
            return "language"
        steps = set(path.split("."))
        if steps & PROJECTORS:
            return "projector"
        return "vision" if steps & TOWERS else None


def parts_of(model: Any) -> Parts:
    """Parts of a transformers model, with peft layers in it or without.

    Raises ModelError for a model whose modules go by names that are not known here, with those names.
    """
    if model.config.get_text_config() is model.config or not hasattr(model, "get_decoder"):
        return Parts(())
    head, decoder = model.get_output_embeddings(), model.get_decoder()
    names = {id(module): name for name, module in model.named_modules()}
    if id(decoder) not in names or decoder is model:
        raise ModelError(
            f"{type(model).__name__} does not say which of its modules is the language model: {_modules(model)}",
            where="adapter.tune",
            remedy="report this family",
        )
    language = [names[id(module)] for module in (decoder, head, getattr(model, "score", None)) if id(module) in names]
    parts = Parts(tuple(language))
    unknown = sorted({".".join(name.split(".")[:2]) for name, _ in model.named_parameters() if not parts.find(name)})
    if unknown:
        raise ModelError(
            f"{type(model).__name__} has modules of no part that is known: {', '.join(unknown)}",
            where="adapter.tune",
            remedy=f"report this family; towers are told by the names {', '.join(sorted(TOWERS))}",
        )
    return parts


def _modules(model: Any) -> str:
    return ", ".join(name for name, _ in model.named_modules() if name and name.count(".") <= 1)


def numel(parameter: Any) -> int:
    """Numbers that a parameter stands for: a packed one (`align.model.quantised`) holds two in each byte."""
    state = getattr(parameter, "quant_state", None)
    return int(parameter.numel()) if state is None else math.prod(state.shape)


def sizes(model: Any) -> dict[Part, int]:
    """Parameters of each part that the model has; tied ones once, adapters' own left out."""
    parts = parts_of(model)
    found: dict[Part, int] = {}
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            part = parts.of(name)
            found[part] = found.get(part, 0) + numel(parameter)
    return {part: found[part] for part in PARTS if part in found}


def trained_parts(model: Any) -> dict[Part, list[Any]]:
    """The parameters of each part that require a gradient, in the model's order; parts without any are left out."""
    parts = parts_of(model)
    found: dict[Part, list[Any]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            found.setdefault(parts.of(name), []).append(parameter)
    return found
