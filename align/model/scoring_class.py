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

FOREIGN = "transformers has no {name}: this engine loads and runs the folder, and nobody else does"


def scoring_class(folder: Path, trust_remote_code: bool = False) -> Any:
    """What `from_pretrained` makes a model with a score head of `folder`: transformers' auto class, or a class of ours."""
    from transformers import AutoModelForSequenceClassification

    name = own_class_for(folder)
    return AutoModelForSequenceClassification if name is None else _own_class(name)


def own_class_for(folder: Path) -> str | None:
    """The model type of a folder whose architecture transformers has no sequence classifier for; None where it has one,
    or where ours could not be made either."""
    from transformers.models.auto import modeling_auto as known

    file = folder / "config.json"
    model_type = json.loads(file.read_text(encoding="utf-8")).get("model_type") if file.is_file() else None
    there = model_type in known.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
    sees = model_type in known.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    return model_type if sees and not there and model_type in known.MODEL_MAPPING_NAMES else None


@lru_cache
def _own_class(model_type: str) -> Any:
    """The generic classifier over the base model of an architecture."""
    from transformers import AutoConfig, AutoModel
    from transformers.modeling_layers import GenericForSequenceClassification

    base = AutoModel._model_mapping[type(AutoConfig.for_model(model_type))]
    ancestor = next(c for c in base.__mro__ if c.__name__.endswith("PreTrainedModel"))
    name = base.__name__.removesuffix("Model") + "ForSequenceClassification"
    return type(name, (GenericForSequenceClassification, ancestor), {"__module__": __name__})
