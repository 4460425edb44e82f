"""Where processed media lie: one folder, two files for each, named by the key of what went into them.

    <store>/<key>.safetensors   what the model's processor made of it: its tensors by the processor's names
                                (pixel_values, image_grid_thw, ...), with the batch axis that the processor gives one
                                medium, and `token_ids` i64[length], the tokens that stand for it
    <store>/<key>.png           an image as the processor saw it, resized, RGB: for engines and rewards. A video is
                                <key>.frames.safetensors (`frames` u8[F, H, W, 3]), a sound <key>.wav

A file is written aside and renamed: it is whole, or absent. Whoever computes reads by key; `align.data.media` writes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from align.errors import DataError
from align.protocols.trees import Medium

TOKENS = "token_ids"
VIEW_SUFFIX = {"image": ".png", "video": ".frames.safetensors", "audio": ".wav"}
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")
"""Of a model folder: either says how images are made ready for the model."""


def processor_files(folder: Path) -> list[Path]:
    """Those of PROCESSOR_FILES that a model folder has."""
    return [folder / name for name in PROCESSOR_FILES if (folder / name).is_file()]


def pixel_bounds(lowest: int, highest: int, min_pixels: int | None, max_pixels: int | None) -> tuple[int, int]:
    """(least, most) pixels that a processor which counts them allows, from its own and the recipe's limits, which come
    first. Data, engines and exports ask this, so that one picture has one size everywhere."""
    most = max_pixels or max(highest, min_pixels or 0)
    return min_pixels or min(lowest, most), most


def tensors_path(store: str | Path, key: str) -> Path:
    return Path(store) / f"{key}.safetensors"


def view_path(medium: Medium) -> Path:
    """The file that shows the medium as the model sees it."""
    return Path(medium.store) / f"{medium.key}{VIEW_SUFFIX[medium.kind]}"


def read_tensors(medium: Medium) -> dict[str, Any]:
    """The processor's tensors (torch, CPU) of one medium. Raises DataError where the store has lost it."""
    from safetensors.torch import load_file

    path = tensors_path(medium.store, medium.key)
    try:
        found = load_file(path)
    except (OSError, ValueError) as error:
        raise DataError(
            f"the media store has lost a file: {error}",
            where=path,
            remedy="start again: the check writes it anew (on a cluster the folder must be shared)",
        ) from error
    return {name: tensor for name, tensor in found.items() if name != TOKENS}


def read_frames(medium: Medium) -> np.ndarray:
    """Frames u8[F, H, W, 3] of a video."""
    from safetensors.numpy import load_file

    frames: np.ndarray = load_file(view_path(medium))["frames"]
    return frames


def described(medium: Medium) -> Mapping[str, str]:
    """What rewards and logs see of it: its kind, and where the file lies that shows it."""
    return {"type": medium.kind, "path": str(view_path(medium))}
