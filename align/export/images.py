"""A picture for the proofs of models that read images, made ready by the folder's own processor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from align.errors import ExportError

SIZE = (112, 84)  # small, and of no square: rows and columns must not be exchanged
PROCESSORS = ("processor_config.json", "preprocessor_config.json")
QUESTION = "What is in the picture?"


def has_processor(folder: Path) -> bool:
    """Whether a model folder says how images are made ready for it."""
    files = [folder / name for name in PROCESSORS if (folder / name).is_file()]
    return any("image_processor" in json.dumps(json.loads(file.read_text(encoding="utf-8"))) for file in files)


def picture(seed: int) -> Any:
    """A PIL image: coloured blocks of 14 pixels, from `seed`."""
    from PIL import Image

    width, height = SIZE
    blocks = np.random.default_rng([seed, *SIZE]).integers(0, 256, (height // 14, width // 14, 3), dtype=np.uint8)
    return Image.fromarray(np.kron(blocks, np.ones((14, 14, 1), dtype=np.uint8)))


def image_samples(folder: Path, seed: int, trust_remote_code: bool = False) -> list[dict[str, Tensor]]:
    """Inputs of the model in `folder` for one picture and a question about it; none where it has no processor.

    Raises ExportError where the processor cannot be loaded or takes no picture.
    """
    if not has_processor(folder):
        return []
    from transformers import AutoProcessor

    try:
        processor: Any = AutoProcessor.from_pretrained(
            folder, trust_remote_code=trust_remote_code, local_files_only=True
        )
        inputs = processor(text=[_prompt(processor)], images=[[picture(seed)]], return_tensors="pt")
    except (ValueError, OSError, ImportError, RuntimeError, KeyError, TypeError, AttributeError) as error:
        raise ExportError(
            f"the processor of this folder takes no picture: {error}",
            where=folder,
            remedy="check that processor and tokenizer files are those of the model that it was made from",
        ) from error
    return [dict(inputs)]


def _prompt(processor: Any) -> str:
    """The question behind the picture, as the chat template writes it; by the mark alone where there is none for it."""
    mark = getattr(processor, "boi_token", None) or getattr(processor, "image_token", "<image>")
    content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    if getattr(processor, "chat_template", None) is not None:
        prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        if mark in prompt or getattr(processor, "image_token", mark) in prompt:
            return str(prompt)
    return f"{mark} {QUESTION}"
