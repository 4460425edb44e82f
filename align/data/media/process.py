"""The model's own processor, one medium at a time: tensors, the tokens that stand for the medium, and the picture that
the model sees.

What a processor writes for a medium may have plain text at its ends (Gemma 3: two newlines around the image; Qwen3-VL:
the first frame's time). Text merges with its neighbours in a tokenizer, marks do not: so the tokens of a medium are
those from the first mark to the last, and what is before and behind them is text of the conversation.

The picture is resized here, within the recipe's limits and, where a processor resizes to a grid of patches (Qwen), to
exactly that grid. So the saved PNG, given to any engine's copy of this processor, gives the same tokens again.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from align.data.media import video as videos
from align.data.media.decode import decode, resized, within
from align.data.media.shelf import FACTS
from align.data.records import MediaKind, RowError
from align.errors import ModelError
from align.mediastore import TOKENS, VIEW_SUFFIX, pixel_bounds, tensors_path

_TEXT_KEYS = frozenset({"input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"})


@dataclass(frozen=True)
class Limits:
    """Of `media:`, what decides tensors and refusals."""

    max_pixels: int | None
    min_pixels: int | None
    video_frames: int
    max_source_pixels: int


@dataclass
class Facts:
    """What is known of a processed medium without its tensors.

    source_size, size: (width, height) before and after. tokens: that stand for it; patches: see `Medium`. before,
    behind: text that its processor writes around the tokens. converted: see `decode`. frames: of a video.
    """

    kind: MediaKind
    source_size: tuple[int, int]
    size: tuple[int, int]
    tokens: int = 0
    patches: int = 0
    before: str = ""
    behind: str = ""
    converted: list[str] = field(default_factory=list)
    frames: int = 0


class Processor:
    """A model folder's processor. Raises ModelError where there is none."""

    def __init__(self, folder: Path, trust_remote_code: bool = False):
        from transformers import AutoProcessor
        from transformers.utils import logging

        logging.set_verbosity_error()
        try:
            self.hf: Any = AutoProcessor.from_pretrained(folder, trust_remote_code=trust_remote_code)
        except (OSError, ValueError, KeyError, TypeError, ImportError, RuntimeError) as e:
            why = next(iter(str(e).splitlines()), "")
            raise ModelError(
                f"the folder's processor cannot be loaded: {type(e).__name__}: {why}",
                where=folder,
                remedy="copy the model's preprocessor_config.json or processor_config.json beside its weights",
            ) from e
        if not hasattr(self.hf, "image_processor"):
            raise ModelError(
                "the folder has no image processor, and the data have images",
                where=folder,
                remedy="copy the model's preprocessor_config.json beside its weights, or use data without images",
            )
        self.tokenizer = self.hf.tokenizer
        # Gemma adds runs of newlines, of which neighbours become one
        self.marks = frozenset(i for i, token in self.tokenizer.added_tokens_decoder.items() if token.content.strip())
        self.patch = _patch_size(folder, self.hf)

    def describe(self) -> dict[str, Any]:
        """{"placeholders": {kind: the token that a template writes for one medium}, "reserved": [every token that a
        model takes for media]}; only kinds that are processed."""
        offered = {"image": "image_processor", "video": "video_processor"}
        found = {}
        for kind, part in offered.items():
            token = getattr(self.hf, f"{kind}_token", None)
            if token and getattr(self.hf, part, None) is not None:
                ids = self.tokenizer.encode(token, add_special_tokens=False)
                if len(ids) == 1 and ids[0] in self.marks:
                    found[kind] = token
        ids = [i for kind in offered for i in getattr(self.hf, f"{kind}_token_ids", None) or () if i is not None]
        inner = [self.tokenizer.convert_ids_to_tokens(i) for i in ids]
        return {"placeholders": found, "reserved": sorted({*found.values(), *(token for token in inner if token)})}

    # ----------------------------------------------------------------------------------------------- media

    def image(self, name: str, data: bytes, limits: Limits, store: Path, key: str) -> Facts:
        """Process an image into the store. Raises RowError."""
        image, converted = decode(data, name, limits.max_source_pixels)
        before = image.size
        image = resized(image, within(before, limits.min_pixels, limits.max_pixels))
        size = self._budget(self.hf.image_processor, limits)
        image = resized(image, self._grid(self.hf.image_processor, image, size, name))
        images_kwargs = {"size": size} if size else {}
        out = self._call(name, "image", images=[image], images_kwargs=images_kwargs)
        aside = _aside(store, key)
        image.save(aside, "PNG", compress_level=1)
        return self._write(Facts("image", before, image.size, converted=converted), out, store, key, aside)

    def video(
        self, name: str, frames: Sequence[tuple[str, bytes]] | bytes, limits: Limits, store: Path, key: str
    ) -> Facts:
        """Process a video, given as a file's bytes or as frames of (name, bytes), into the store. Raises RowError."""
        wanted = limits.video_frames
        if isinstance(frames, bytes):
            video = videos.from_bytes(frames, name, wanted, limits.max_source_pixels)
        else:
            video = videos.from_list(frames, wanted, limits.max_source_pixels)
        before = video.frames[0].size
        size = within(before, limits.min_pixels, limits.max_pixels)
        pictures = np.stack([np.asarray(resized(frame, size)) for frame in video.frames])
        metadata = {
            "total_num_frames": video.total,
            "fps": video.fps,
            "frames_indices": video.indices,
            "duration": video.total / video.fps,
            "width": size[0],
            "height": size[1],
        }
        videos_kwargs = {"do_sample_frames": False, "video_metadata": [[metadata]]}
        out = self._call(name, "video", videos=[[pictures]], videos_kwargs=videos_kwargs)
        grid = out.get("video_grid_thw")
        if grid is not None:  # as for images: what is saved is what the model sees
            patch = int(self.hf.video_processor.patch_size)
            size = (int(grid[0][2]) * patch, int(grid[0][1]) * patch)
            pictures = np.stack([np.asarray(resized(frame, size)) for frame in video.frames])
            out = self._call(name, "video", videos=[[pictures]], videos_kwargs=videos_kwargs)
        aside = _aside(store, key)
        _save_frames(aside, pictures, {**metadata, "width": size[0], "height": size[1]})
        return self._write(Facts("video", before, size, frames=len(pictures)), out, store, key, aside)

    def _budget(self, part: Any, limits: Limits) -> dict[str, int]:
        """The `size` of a processor that counts pixels (Qwen's), moved to the recipe's limits; {} of any other."""
        size = dict(getattr(part, "size", None) or {})
        lowest, highest = size.get("shortest_edge"), size.get("longest_edge")
        if _smart_resize(part) is None or lowest is None or highest is None:
            return {}
        least, most = pixel_bounds(int(lowest), int(highest), limits.min_pixels, limits.max_pixels)
        return {"shortest_edge": least, "longest_edge": most}

    def _grid(self, part: Any, image: Image.Image, size: Mapping[str, int], name: str) -> tuple[int, int]:
        """The size to which a processor that counts pixels would resize; of any other, the image's own."""
        smart = _smart_resize(part)
        if smart is None or not size:
            return image.size
        factor = int(part.patch_size) * int(part.merge_size)
        try:
            height, width = smart(
                image.size[1], image.size[0], factor=factor,
                min_pixels=size["shortest_edge"], max_pixels=size["longest_edge"],
            )  # fmt: skip
        except ValueError as e:
            raise RowError(f"the model's processor refuses {name}: {e}") from e
        return int(width), int(height)

    def _call(self, name: str, kind: str, images_kwargs: Any = None, videos_kwargs: Any = None, **media: Any) -> Any:
        """What the processor makes of one medium and its placeholder alone. Raises RowError with its words."""
        kwargs = {"images_kwargs": images_kwargs, "videos_kwargs": videos_kwargs}
        given = {key: value for key, value in kwargs.items() if value}
        try:
            return self.hf(
                text=[getattr(self.hf, f"{kind}_token")],
                text_kwargs={"add_special_tokens": False},
                return_tensors="pt",
                **media,
                **given,
            )
        except Exception as e:  # a processor is a family's own code and may raise anything; the row is refused with it
            raise RowError(f"the model's processor refuses {name}: {type(e).__name__}: {e}") from e

    # ----------------------------------------------------------------------------------------------- writing

    def _write(self, facts: Facts, out: Any, store: Path, key: str, aside: Path) -> Facts:
        """Tensors into the store beside the view, which waits in `aside`. The view is renamed first: where tensors are,
        all is."""
        import torch
        from safetensors.torch import save_file

        ids = [int(i) for i in out["input_ids"][0]]
        marked = [n for n, token in enumerate(ids) if token in self.marks]
        if not marked:
            raise RowError(f"the model's processor writes no mark for this {facts.kind}: it has no place in the text")
        first, last = marked[0], marked[-1] + 1
        facts.before, facts.behind = (
            self.tokenizer.decode(part, clean_up_tokenization_spaces=False) for part in (ids[:first], ids[last:])
        )
        tensors = {
            name: value.contiguous() if isinstance(value, torch.Tensor) else torch.as_tensor(np.asarray(value))
            for name, value in out.items()
            if name not in _TEXT_KEYS and value is not None
        }
        tensors[TOKENS] = torch.tensor(ids[first:last])
        facts.tokens, facts.patches = last - first, self._patches(tensors)
        written = aside.with_name(f"{aside.name}.tensors")
        save_file(tensors, written, metadata={FACTS: json.dumps(asdict(facts))})
        aside.replace(store / f"{key}{VIEW_SUFFIX[facts.kind]}")
        written.replace(tensors_path(store, key))
        return facts

    def _patches(self, tensors: Mapping[str, Any]) -> int:
        """What the tower computes: rows of patches (Qwen), or all pictures and tiles cut into patches."""
        pixels = next(value for name, value in sorted(tensors.items()) if name.startswith("pixel_values"))
        if pixels.dim() == 2:
            return int(pixels.shape[0])
        return int(pixels.numel() // (pixels.shape[-3] * self.patch * self.patch))


def _smart_resize(part: Any) -> Any:
    """The function by which Qwen's processors and their kin choose a size; None for any other."""
    return getattr(sys.modules[type(part).__module__], "smart_resize", None)


def _patch_size(folder: Path, processor: Any) -> int:
    """Side of the tower's patches in pixels."""
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    vision = config.get("vision_config") or {}
    size = vision.get("patch_size") or getattr(processor.image_processor, "patch_size", None) or 14
    return int(size[0] if isinstance(size, list | tuple) else size)


def _aside(store: Path, key: str) -> Path:
    store.mkdir(parents=True, exist_ok=True)
    return store / f".{key}.{os.getpid()}"


def _save_frames(path: Path, frames: np.ndarray, metadata: Mapping[str, Any]) -> None:
    from safetensors.numpy import save_file

    save_file({"frames": np.ascontiguousarray(frames)}, path, metadata={"video": json.dumps(metadata)})
