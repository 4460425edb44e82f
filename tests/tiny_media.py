"""Prompts with pictures for the tiny models of `tests.tiny_vlms`: a media store written with the model's own processor,
as `align.mediastore` describes it, without the data pipeline."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from align.mediastore import TOKENS, read_tensors, tensors_path, view_path
from align.protocols.fleet import PromptItem, group_seed
from align.protocols.trees import Medium
from tests.tiny_vlms import FAMILIES


def picture(seed: int, width: int = 112, height: int = 56) -> Image.Image:
    """Smooth noise: every patch of it is different."""
    values = np.random.default_rng(seed).integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    return Image.fromarray(values).resize((width, height), Image.Resampling.BICUBIC)


class TinyMedia:
    """The processor of a folder that `write_tiny_vlm` wrote, and a store beside it."""

    def __init__(self, folder: Path, family: str, store: Path):
        from transformers import AutoProcessor

        self.family, self.store = family, store
        self.processor: Any = AutoProcessor.from_pretrained(folder)
        self.mark = FAMILIES[family][1]
        store.mkdir(parents=True, exist_ok=True)

    def put(self, image: Image.Image) -> tuple[Medium, list[int]]:
        """Write one picture; the medium (start 0), and the tokens that stand for it."""
        made = self.processor(text=[self.mark], images=[image], return_tensors="pt", add_special_tokens=False)
        tokens = made["input_ids"][0].tolist()
        key = hashlib.sha256(image.tobytes() + repr((image.size, self.family)).encode()).hexdigest()
        tensors = {
            name: torch.as_tensor(value).contiguous()
            for name, value in made.items()
            if name not in ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")
        }
        rows = tensors["pixel_values"]
        medium = Medium("image", key, str(self.store), 0, len(tokens), int(rows.shape[0]))
        save_file({**tensors, TOKENS: torch.tensor(tokens)}, tensors_path(self.store, key))
        image.save(view_path(medium))
        return medium, tokens

    def prompt(self, parts: Sequence[str | Image.Image], number: int = 0) -> PromptItem:
        """A prompt of text and pictures in this order."""
        tokens: list[int] = []
        media: list[Medium] = []
        for part in parts:
            if isinstance(part, str):
                tokens += self.processor.tokenizer.encode(part, add_special_tokens=False)
                continue
            medium, own = self.put(part)
            media.append(Medium(medium.kind, medium.key, medium.store, len(tokens), medium.length, medium.patches))
            tokens += own
        return PromptItem(
            group_id=number,
            token_ids=np.array(tokens, dtype=np.int64),
            seed=group_seed(0, "test", number),
            media=tuple(media),
            origin=f"row {number}",
        )


def forward_logps(model: Any, prompt: PromptItem, completion: np.ndarray) -> np.ndarray:
    """f32[n]: log-probabilities of a completion by the transformers model's own forward, pictures included."""
    ids = torch.from_numpy(np.concatenate([prompt.token_ids, completion]))[None]
    start = len(prompt.token_ids)
    with torch.no_grad():
        logits = model(input_ids=ids, **model_inputs(model, ids, prompt.media)).logits[0, start - 1 : -1].float()
    return logits.log_softmax(-1).gather(-1, ids[0, start:, None])[:, 0].numpy()


def holds_mark(model: Any, tokens: np.ndarray) -> bool:
    """Whether a picture's token was sampled, of which the model's own forward would want a picture."""
    return bool(np.isin(tokens, sorted(image_ids(model))).any())


def image_ids(model: Any) -> set[int]:
    config = model.config
    return {int(id) for name in ("image_token_id", "image_token_index") if (id := getattr(config, name, None))}


def model_inputs(model: Any, ids: torch.Tensor, media: Sequence[Medium]) -> dict[str, torch.Tensor]:
    """What the model's forward takes beside the tokens i64[1, n] of one sequence."""
    found = [read_tensors(medium) for medium in media]
    if not found:
        return {}
    base = model.get_base_model() if hasattr(model, "peft_config") else model
    accepted = inspect.signature(base.forward).parameters
    tiled_in_one_row = base.config.model_type in ("idefics3", "smolvlm")
    tensors = {name: _joined([one[name] for one in found], 1 if tiled_in_one_row else 0) for name in found[0]}
    kinds = torch.isin(ids, torch.tensor(sorted(image_ids(base)))).long()
    tensors |= {"mm_token_type_ids": kinds, "token_type_ids": kinds}
    return {name: tensor for name, tensor in tensors.items() if name in accepted}


def _joined(tensors: Sequence[torch.Tensor], axis: int) -> torch.Tensor:
    """Tensors of several media as the processor gives them together; those with fewer tiles are padded with zeros."""
    if axis == 0 and tensors[0].ndim == 5:
        tiles = max(int(tensor.shape[1]) for tensor in tensors)
        tensors = [torch.nn.functional.pad(t, [0] * 7 + [tiles - int(t.shape[1])]) for t in tensors]
    return torch.cat(list(tensors), dim=axis)
