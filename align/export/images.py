"""A picture for the proofs of models that read images, made ready by the folder's own processor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from align.errors import ExportError
from align.mediastore import processor_files, view_path
from align.protocols.trees import Medium

SIZE = (112, 84)  # small, and of no square: rows and columns must not be exchanged
QUESTION = "What is in the picture?"


def has_processor(folder: Path) -> bool:
    """Whether a model folder says how images are made ready for it."""
    texts = [file.read_text(encoding="utf-8") for file in processor_files(folder)]
    return any("image_processor" in json.dumps(json.loads(text)) for text in texts)


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
    return [_processed(folder, seed, trust_remote_code)[0]] if has_processor(folder) else []


def picture_prompt(folder: Path, seed: int, store: Path, trust_remote_code: bool = False) -> tuple[np.ndarray, Medium]:
    """The same as a prompt for engines: its tokens i64[n], and the picture in them, whose view is put into `store`."""
    inputs, plain, mark = _processed(folder, seed, trust_remote_code)
    ids = inputs["input_ids"][0].numpy()
    start = plain.index(mark)
    length = len(ids) - len(plain) + 1
    medium = Medium("image", f"picture-{seed}", str(store), start, length, patches=0)
    picture(seed).save(view_path(medium))
    return ids, medium


def _processed(folder: Path, seed: int, trust_remote_code: bool) -> tuple[dict[str, Tensor], list[int], int]:
    """Inputs of the model; the prompt's tokens before the picture's were put in; the one that stood for it there."""
    from transformers import AutoProcessor

    try:
        processor: Any = AutoProcessor.from_pretrained(
            folder, trust_remote_code=trust_remote_code, local_files_only=True
        )
        prompt, mark = _prompt(processor)
        inputs = processor(text=[prompt], images=[[picture(seed)]], return_tensors="pt")
        plain = processor.tokenizer(prompt)["input_ids"]
        if plain[:1] != inputs["input_ids"][0, :1].tolist():
            raise ValueError("processor and tokenizer begin the same prompt with other tokens")
    except (ValueError, OSError, ImportError, RuntimeError, KeyError, TypeError, AttributeError) as error:
        raise ExportError(
            f"the processor of this folder takes no picture: {error}",
            where=folder,
            remedy="check that processor and tokenizer files are those of the model that it was made from",
        ) from error
    return dict(inputs), plain, processor.tokenizer.convert_tokens_to_ids(mark)


def _prompt(processor: Any) -> tuple[str, str]:
    """The question behind the picture, as the chat template writes it, or by the mark alone where that has no place for
    pictures; and the mark."""
    mark = str(getattr(processor, "boi_token", None) or getattr(processor, "image_token", "<image>"))
    content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    if getattr(processor, "chat_template", None) is not None:
        prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        if mark in prompt:
            return str(prompt), mark
    return f"{mark} {QUESTION}", mark
