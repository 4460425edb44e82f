"""The decoder of a model, whatever family it is of: where it lies, what is beside it, which attention it uses."""

from __future__ import annotations

from contextlib import suppress
from typing import Any


def text_backbone(model: Any) -> Any:
    """The decoder that makes hidden states of text; of a model for images too, its language model."""
    found = model.base_model if model.config.get_text_config() is model.config else model.get_decoder()
    return model.model if found is model else found  # Llama 4's text calls itself its own base


def takes_media(model: Any) -> bool:
    """Whether the model has a tower beside its language model."""
    return text_backbone(model) is not model.base_model and hasattr(model.base_model, "get_image_features")


def set_attention(model: Any, name: str) -> None:
    """Set the attention of the text layers; a vision tower keeps its own. A model that lets none be set keeps its."""
    config = model.config
    text = config.get_text_config()
    key = next((key for key in config.sub_configs if getattr(config, key, None) is text), None)
    with suppress(ValueError):
        model.set_attn_implementation(name if key is None else {key: name})
