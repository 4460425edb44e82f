"""Tiny vision-language models with a media store, and random trees with pictures, for tests of the forward.

Each picture goes through the family's own processor alone, in a prompt of its own: its tokens and tensors are then
what the family makes of a picture anywhere.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import save_file

from align.mediastore import TOKENS, tensors_path
from align.model.media.placeholders import placeholder
from align.protocols.trees import Medium, Segment, Tree

NOT_MEDIA = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")
SIZES = ((60, 80), (64, 40), (112, 60))  # of pictures, height and width: one, two and several tiles or grids
_QWEN_VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"
VIDEO_MARKS = {  # what stands for a video in a prompt
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen3_vl"), _QWEN_VIDEO),
    **dict.fromkeys(("internvl", "llava_onevision"), "<video>"),
}
TEXT_IDS = range(3, 200)  # of the tokenizer: plain bytes, no mark of any family


@dataclass
class Workshop:
    """A family's folder, its model, and its pictures, processed and stored."""

    folder: Path
    model: Any
    store: Path
    pictures: list[Medium] = field(default_factory=list)
    tokens: dict[str, np.ndarray] = field(default_factory=dict)
    tensors: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)

    def segment(self, rng: np.random.Generator, n: int, *pictures: int, scored: bool = False) -> Segment:
        """`n` random text tokens and the pictures of these numbers, spread among them; the text is scored or not."""
        parts: list[np.ndarray] = []
        masks: list[np.ndarray] = []
        media: list[Medium] = []
        for k in range(len(pictures) + 1):
            text = rng.choice(np.array(TEXT_IDS), n // (len(pictures) + 1) + 1)
            parts.append(text)
            masks.append(np.full(len(text), scored))
            if k < len(pictures):
                medium = self.pictures[pictures[k]]
                media.append(replace(medium, start=sum(map(len, parts))))
                parts.append(self.tokens[medium.key])
                masks.append(np.zeros(medium.length, dtype=bool))
        return Segment(np.concatenate(parts), np.concatenate(masks), media=tuple(media))

    def trees(self, seed: int = 0) -> list[Tree]:
        """Text alone; a group of three on one picture; a pair on two; pictures in branches; a conversation with one."""
        rng = np.random.default_rng(seed)
        talk = self.segment(rng, 9, 0)
        scored = np.zeros(len(talk), dtype=bool)
        scored[-4:] = True
        answers = [self.segment(rng, 2 + k, scored=True) for k in range(3)]
        return [
            Tree(0, self.segment(rng, 5), tuple(self.segment(rng, n, scored=True) for n in (3, 5))),
            Tree(1, self.segment(rng, 6, 0), tuple(answers)),
            Tree(2, self.segment(rng, 5, 1, 2), tuple(self.segment(rng, n, scored=True) for n in (4, 2))),
            Tree(3, self.segment(rng, 5, 0), (self._ending_in_text(rng, 1), self._ending_in_text(rng, 2))),
            Tree(4, replace(talk, loss_mask=scored)),
        ]

    def _ending_in_text(self, rng: np.random.Generator, picture: int) -> Segment:
        """A branch with a picture of its own, and scored text behind it."""
        before = self.segment(rng, 3, picture)
        after = self.segment(rng, 4, scored=True)
        joined = {
            name: np.concatenate([getattr(before, name), getattr(after, name)]) for name in ("token_ids", "loss_mask")
        }
        return Segment(**joined, media=before.media)


def open_workshop(family: str, folder: Path, **changes: Any) -> Workshop:
    """Write a tiny model of `family` below `folder`, load it, and store three pictures."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from tests.tiny_vlms import write_tiny_vlm

    where = write_tiny_vlm(folder / family, family, **changes)
    model = AutoModelForImageTextToText.from_pretrained(where, attn_implementation="eager").eval()
    shop = Workshop(where, model, folder / "store")
    shop.store.mkdir(exist_ok=True)
    processor = AutoProcessor.from_pretrained(where)
    for number, size in enumerate(SIZES):
        pixels = np.random.default_rng(number).integers(0, 256, (*size, 3), dtype=np.uint8)
        add_picture(shop, processor, f"{family}-{number}", pixels)
    return shop


def add_picture(shop: Workshop, processor: Any, key: str, pixels: np.ndarray) -> None:
    from PIL import Image

    message = {"role": "user", "content": [{"type": "image", "image": Image.fromarray(pixels)}]}
    made = processor.apply_chat_template([message], tokenize=True, return_dict=True, return_tensors="pt")
    _store(shop, key, "image", made)


def add_video(shop: Workshop, key: str, frames: np.ndarray) -> None:
    """frames u8[F, H, W, 3]"""
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(shop.folder)
    made = processor(text=[f"a{VIDEO_MARKS[shop.model.config.model_type]}b"], videos=[frames], return_tensors="pt")
    _store(shop, key, "video", made)


def _store(shop: Workshop, key: str, kind: Literal["image", "video"], made: Any) -> None:
    ids = made["input_ids"][0].numpy()
    at = np.flatnonzero(ids == placeholder(shop.model.config, kind))
    tokens = ids[at[0] : at[-1] + 1]
    tensors = {name: torch.as_tensor(t).contiguous() for name, t in made.items() if name not in NOT_MEDIA}
    save_file(tensors | {TOKENS: torch.as_tensor(tokens.copy())}, tensors_path(shop.store, key))
    pixels = next(t for name, t in tensors.items() if name.startswith("pixel_values"))
    patches = pixels.shape[0] if pixels.dim() == 2 else pixels.numel() // (3 * 14 * 14)
    shop.pictures.append(Medium(kind, key, str(shop.store), 0, len(tokens), patches))
    shop.tokens[key], shop.tensors[key] = tokens, tensors
