"""Which models with a vision part are trained here, as their config.json says before anything is loaded. No torch.

What is not refused here is for the probe at load to judge: any family that transformers knows as image-text-to-text,
whose masks and positions are plain or described (`align.model.media.placeholders`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from align.errors import Unsupported

_PREFIX = "reads its whole prompt both ways, which packed trees do not describe"
_CROSS = "reads images by cross-attention, beside its row of tokens"
_MASKS = "has masks around its images that packed trees do not describe"
REFUSED = {
    "paligemma": _PREFIX,
    "git": _PREFIX,
    "pi0": _PREFIX,
    "mllama": _CROSS,
    "idefics": _CROSS,
    "evolla": _CROSS,
    "gemma4": _MASKS,
    "gemma4_unified": _MASKS,
    "diffusion_gemma": _MASKS,
    "step3p7": _MASKS,
    "deepseek_ocr2": _MASKS,
}
ENCODERS = ("florence2", "t5gemma2", "pix2struct", "udop", "kosmos-2.5", "vision-encoder-decoder", "blip")


def has_media(config: Mapping[str, Any]) -> bool:
    """Whether a config.json describes a model with more than a language model."""
    return any(f"{part}_config" in config for part in ("vision", "audio"))


def refuse_unsupported_media(config: Mapping[str, Any], folder: Path) -> None:
    """Raise Unsupported for a model whose images, video or audio have no forward here."""
    name = str(config.get("model_type"))
    reason = REFUSED.get(name)
    if config.get("is_encoder_decoder") or name in ENCODERS:
        reason = "is an encoder and a decoder, and completions are not a continuation of its prompt"
    elif has_media(config) and "vision_config" not in config:
        reason = "takes audio alone"
    if reason is not None:
        raise Unsupported(
            f"a {name} model {reason}",
            where=folder,
            remedy="use a vision-language model of another family, such as Qwen-VL, InternVL, LLaVA-OneVision, Gemma 3 "
            "or SmolVLM, or a model of text alone",
        )
