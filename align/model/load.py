"""A causal language model, or one for images too, from a local folder, complete or refused.

transformers fills a weight that the checkpoint lacks with random numbers and a warning; here that is an error.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from align.errors import ModelError
from align.recipe.model_folder import refuse_adapter_inside, refuse_two_checkpoints, untied_error

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
# what old checkpoints carry and newer models compute: not a loss
COMPUTED_BUFFERS = re.compile(r"(^|\.)(rotary_emb\.inv_freq|attn\.(masked_)?bias)$")


def resolve_dtype(name: str, device: str) -> torch.dtype:
    """The recipe's dtype word as a torch dtype; "auto" is bfloat16 on CUDA and float32 elsewhere."""
    if name == "auto":
        return torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
    if name not in DTYPES:
        raise ModelError(f"unknown dtype {name!r}", remedy=f"one of auto, {', '.join(DTYPES)}")
    return DTYPES[name]


def load_model(
    folder: Path,
    *,
    dtype: torch.dtype,
    attention: str = "auto",
    trust_remote_code: bool = False,
    device: str = "cpu",
) -> PreTrainedModel:
    """Load a causal language model in transformers layout from `folder`, weights in safetensors. A model for images too
    is loaded whole, its tower included.

    attention: "auto" (sdpa, and eager where the model has what SDPA has not) or any implementation that transformers
    knows, registered ones included.
    Returns the model in eval mode on `device`, parameters in `dtype`, key-value cache off.
    Raises ModelError where the folder is no model, or its checkpoint lacks weights or has some of another shape.
    """
    folder = Path(folder)
    refuse_scoring(folder)
    model, info = from_folder(
        _auto_class(folder), folder, dtype=dtype, attention=attention, trust_remote_code=trust_remote_code
    )
    require_complete(folder, info)
    model.config.use_cache = False
    model.eval()
    model.to(device)
    return model


def _auto_class(folder: Path) -> Any:
    """transformers' auto class for what config.json describes."""
    file = folder / "config.json"
    return auto_class_of(json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {})


def auto_class_of(config: Mapping[str, Any]) -> Any:
    """transformers' auto class for a configuration: of a language model, or of one that reads images too."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto import modeling_auto as known

    name = config.get("model_type")
    images = name in known.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    alone = name in known.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and "vision_config" not in config
    return AutoModelForImageTextToText if images and not alone else AutoModelForCausalLM


def from_folder(
    kind: Any, folder: Path, *, dtype: torch.dtype, attention: str, trust_remote_code: bool, **settings: Any
) -> tuple[Any, dict[str, Any]]:
    """A model of transformers' auto class `kind`, and what its loader says of keys. Raises ModelError.

    settings: of the configuration, in place of the folder's.
    """
    check_folder(folder)

    def read(implementation: str) -> tuple[Any, dict[str, Any]]:
        found: tuple[Any, dict[str, Any]] = kind.from_pretrained(
            folder,
            dtype=dtype,
            attn_implementation=implementation,
            trust_remote_code=trust_remote_code,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
            **settings,
        )
        return found

    try:
        with quiet():
            try:
                model, info = read("sdpa" if attention == "auto" else attention)
            except ValueError as error:
                if attention != "auto" or "scaled_dot_product_attention" not in str(error):
                    raise
                model, info = read("eager")  # gpt-oss: SDPA has no sinks
    except (ValueError, OSError, ImportError, RuntimeError, KeyError) as error:
        raise ModelError(
            f"transformers cannot load this model: {error}",
            where=folder,
            remedy="check that the folder is complete and of an architecture that this transformers version knows",
        ) from error
    _refuse_untied(folder, model)
    if attention == "auto" and getattr(model.config.get_text_config(), "attn_logit_softcapping", None):
        model.set_attn_implementation("eager")  # transformers' sdpa leaves the cap out without a word
    return model, info


def refuse_scoring(folder: Path) -> None:
    """Raise ModelError where config.json says that the folder scores: with tied embeddings it would load, and forget
    its head."""
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    names = [str(name) for name in config.get("architectures") or ()]
    if any(name.endswith(("ForSequenceClassification", "ForTokenClassification")) for name in names):
        raise ModelError(
            f"the folder is a {names[0]}, a model that scores: it has no language model head",
            where=folder,
            remedy="give a causal language model; only a stage of kind reward_model or classify starts from one that "
            "scores",
        )


def check_folder(folder: Path) -> None:
    """Raise ModelError unless `folder` has a config.json and safetensors weights."""
    if not folder.is_dir():
        raise ModelError(
            "no such model folder",
            where=folder,
            remedy="give a local folder in transformers layout",
        )
    if not (folder / "config.json").is_file():
        hint = (
            "this is an adapter: give it as `model.adapter`, and its base as `model.path`"
            if (folder / "adapter_config.json").is_file()
            else "give a folder in transformers layout"
        )
        raise ModelError("the folder has no config.json", where=folder, remedy=hint)
    if not any(folder.glob("*.safetensors")):
        raise ModelError(
            "the folder has no weights in safetensors (pickled weights are never read)",
            where=folder,
            remedy="convert them once with model.save_pretrained(folder) in transformers",
        )
    refuse_adapter_inside(folder)
    refuse_two_checkpoints(folder)


def _refuse_untied(folder: Path, model: Any) -> None:
    """Raise ModelError where weights that the configuration ties were stored as different ones: transformers computes
    with both, and engines, which go by the configuration, with one of them."""
    if not isinstance(kept := getattr(model, "all_tied_weights_keys", None), Mapping):
        return
    for name, other in model.get_expanded_tied_weights_keys(all_submodels=True).items():
        if name not in kept and other not in kept:
            raise untied_error(folder, name, other)


def require_complete(
    folder: Path, info: dict[str, Any], *, fresh: tuple[str, ...] = (), left_out: tuple[str, ...] = ()
) -> None:
    """Raise ModelError where the checkpoint lacks weights; warn of those that nobody uses.

    fresh: names that may be missing, because they are drawn; left_out: beginnings of names that are not missed.
    """
    for key, problem in (
        ("missing_keys", "lacks"),
        ("mismatched_keys", "has with another shape"),
    ):
        names = sorted(str(name) for name in info.get(key, ()) if name not in fresh)
        if names:
            raise ModelError(
                f"the checkpoint {problem} {len(names)} weights of the model: {', '.join(names[:4])}",
                where=folder,
                remedy="fetch the folder again, or correct its config.json",
            )
    unused = [
        name
        for name in sorted(info.get("unexpected_keys", ()))
        if not COMPUTED_BUFFERS.search(name) and not name.startswith(left_out)
    ]
    if unused:
        log.warning(
            "%s: %d weights are not used by the model: %s",
            folder,
            len(unused),
            ", ".join(unused[:4]),
        )


class quiet:
    """No progress bars and no advice from transformers inside the block; errors are raised as ever."""

    def __enter__(self) -> None:
        from transformers.utils import logging as hf_logging

        self.verbosity = hf_logging.get_verbosity()
        self.bars = hf_logging.is_progress_bar_enabled()
        hf_logging.set_verbosity_error()
        hf_logging.disable_progress_bar()

    def __exit__(self, *exc: object) -> None:
        from transformers.utils import logging as hf_logging

        hf_logging.set_verbosity(self.verbosity)
        if self.bars:
            hf_logging.enable_progress_bar()
