"""Tiny models that read images, and inputs with an image for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch


def image(seed: int = 0, size: tuple[int, int] = (56, 84)) -> Any:
    from PIL import Image

    pixels = np.random.default_rng(seed).integers(0, 255, (*size, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def image_inputs(folder: Path, seed: int = 0) -> dict[str, torch.Tensor]:
    """What the folder's own processor makes of a picture and a question."""
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(folder)
    content = [{"type": "image"}, {"type": "text", "text": "what is six times seven"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    return dict(processor(text=[text], images=[[image(seed)]], return_tensors="pt"))


def image_logits(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits f32[L, V] by the model's own forward."""
    with torch.no_grad():
        result: torch.Tensor = model(**inputs, use_cache=False).logits[0].float()
    return result
