"""Which class holds a model with a score head.

transformers has `...ForSequenceClassification` for most language models, and for few that see. For the others the class
is made here as transformers makes its own: its generic classifier over the architecture's base model. Names of weights
are then transformers' too (the backbone's, and `score.weight`), and config.json names the class that transformers would
have; as it has none, only this engine loads such a folder.
"""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from align.errors import Unsupported

# model types with images that transformers has a sequence classifier for
SEEING = ("gemma3", "mistral4", "qwen3_5", "t5gemma2")


def nobody_elses(model_type: str) -> Unsupported:
    """The refusal of an export."""
    return Unsupported(
        f"transformers has no sequence classifier for {model_type}: this engine loads and runs such a folder, and "
        "nobody else does",
        remedy="leave the export out: the merged folder serves `align classify` and further stages",
    )


def scoring_class(folder: Path) -> Any:
    """Whose `from_pretrained` makes a model with a score head of `folder`: transformers' auto class, or one of ours."""
    from transformers import AutoModelForSequenceClassification

    name = own_class_for(folder)
    return AutoModelForSequenceClassification if name is None else _own_class(name)


def own_class_for(folder: Path) -> str | None:
    """The model type of a folder for which transformers has no sequence classifier and we make one; else None."""
    from transformers.models.auto import modeling_auto as known

    file = folder / "config.json"
    model_type = json.loads(file.read_text(encoding="utf-8")).get("model_type") if file.is_file() else None
    sees = model_type in known.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES and model_type in known.MODEL_MAPPING_NAMES
    there = model_type in known.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
    return model_type if sees and not there else None


@lru_cache
def _own_class(model_type: str) -> Any:
    """The generic classifier over the base model of an architecture."""
    from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, conversion_mapping
    from transformers.modeling_layers import GenericForSequenceClassification

    config = type(AutoConfig.for_model(model_type))
    base, generates = AutoModel._model_mapping[config], AutoModelForImageTextToText._model_mapping[config]
    ancestor = next(c for c in base.__mro__ if c.__name__.endswith("PreTrainedModel"))
    name = base.__name__.removesuffix("Model") + "ForSequenceClassification"
    renaming = conversion_mapping.get_checkpoint_conversion_mapping(generates.__name__)
    if renaming is not None:  # checkpoints of older layouts, by class: those of the backbone are the same
        conversion_mapping.register_checkpoint_conversion_mapping(name, renaming, overwrite=True)
    return type(name, (GenericForSequenceClassification, ancestor), {"__module__": __name__})
