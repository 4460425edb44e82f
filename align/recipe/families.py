"""Families of vision-language models that can be made from scratch: the tokens that stand for media in them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class Family(NamedTuple):
    """marks: special tokens. placeholders: what the chat template writes for a medium, by its kind. ids: settings of
    the configuration that name marks, by their keys."""

    marks: tuple[str, ...]
    placeholders: Mapping[str, str]
    ids: Mapping[str, str]


_QWEN = Family(
    marks=("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"),
    placeholders={
        "image": "<|vision_start|><|image_pad|><|vision_end|>",
        "video": "<|vision_start|><|video_pad|><|vision_end|>",
    },
    ids={
        "vision_start_token_id": "<|vision_start|>",
        "vision_end_token_id": "<|vision_end|>",
        "image_token_id": "<|image_pad|>",
        "video_token_id": "<|video_pad|>",
    },
)
FAMILIES: dict[str, Family] = {"qwen2_vl": _QWEN, "qwen2_5_vl": _QWEN, "qwen3_vl": _QWEN}


def family_of(config: Mapping[str, object] | None) -> Family | None:
    """The family of a recipe's `model.config`; None for a model of text, or one that is not made from scratch."""
    return FAMILIES.get(str((config or {}).get("model_type")))
