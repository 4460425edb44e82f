"""What the real sets with pictures hold, read without the engine (rows, pictures, sizes, tokens); and a small model."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import statistics
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from tests.prove.entry import CHECKOUT
from tests.prove.prove_real_data import lines_of

DATA = Path(os.environ.get("ALIGN_SHARED_DATA", CHECKOUT.parent / "shared" / "data"))
SETS = DATA / "multimodal"
MERGED = 2  # patches a side that stand for one token in Qwen2.5-VL
LEAST_TOKENS = 4  # of a picture, in the processor of a model from scratch

SEED = 1  # tuned on 0
EVERYTHING = {"kind": "full", "tune": {"vision": "full", "projector": "full"}}
QUESTIONS = {"prompt": "question", "completion": "answer"}  # columns of most sets

Row = dict[str, Any]
Found = tuple[dict[str, Any], dict[str, bool]]
"""Figures and checks."""


def config(patch: int, window: int) -> dict[str, Any]:
    """A Qwen2.5-VL of under a million parameters. patch: pixels a side; window: pixels that see each other in the
    tower's first block."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}
    text = {
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "initializer_range": 0.05,
        "rope_parameters": rope,
    }
    vision = {
        "depth": 2,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_heads": 4,
        "out_hidden_size": 128,
        "patch_size": patch,
        "window_size": window,
        "fullatt_block_indexes": [1],
        "initializer_range": 0.06,  # at the family's 0.02 all pictures look alike to the language model for long
    }
    return {"model_type": "qwen2_5_vl", "tie_word_embeddings": True, "text_config": text, "vision_config": vision}


def recipe(folder: Path, name: str, settings: dict[str, Any]) -> Path:
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps({"name": name, "seed": SEED, **settings}), encoding="utf-8")  # JSON is YAML
    return path


def rows_of(path: Path) -> list[Row]:
    """The rows of a file, or of all files of a folder in order of name."""
    if path.is_dir():
        return [row for file in sorted(path.glob("*.json")) for row in rows_of(file)]
    text = path.read_text(encoding="utf-8")
    return list(json.loads(text)) if path.suffix == ".json" else [json.loads(line) for line in text.splitlines()]


def write_rows(path: Path, rows: Iterable[Row]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


# ------------------------------------------------------------------------------------------------- what reports say


def rows_said(name: str) -> int:
    """How many rows SOURCES.md gives a file, or all files of a folder."""
    found = re.findall(rf"^\| multimodal/{re.escape(name)}(?:/[\w.]+)? \| (\d+) \|", _sources(), re.MULTILINE)
    assert found, f"SOURCES.md names no multimodal/{name}"
    return sum(int(n) for n in found)


def pictures_said(folder: str) -> int:
    """How many pictures SOURCES.md gives a folder of media."""
    [kinds] = re.findall(rf"^\| multimodal/{re.escape(folder)}/ \| \d+ \| ([^|]+) \|", _sources(), re.MULTILINE)
    return sum(int(n) for n in re.findall(r"(\d+) (?:png|jpg)", kinds))


@lru_cache
def _sources() -> str:
    return (DATA / "SOURCES.md").read_text(encoding="utf-8")


def facts(rows: Iterable[Row], folder: Path, *, max_pixels: int, patch: int) -> dict[str, Any]:
    """What a data report should say of the pictures of `rows`, whose paths start at `folder`."""
    shown = [str(folder / name) for row in rows for name in _pictures(row)]
    before = [_size(path) for path in shown]
    after = [_resized(size, max_pixels, patch * MERGED) for size in before]
    return {
        "images": len(shown),
        "distinct": len({_digest(path) for path in set(shown)}),
        "source_sizes": _three(before),
        "sizes": _three(after),
        "tokens": _spread([w * h // (patch * MERGED) ** 2 for w, h in after]),
        "patches": _spread([w * h // patch**2 for w, h in after]),
    }


def reported(source: Mapping[str, Any]) -> dict[str, Any]:
    """The same of one source of a data report."""
    media = source["media"]
    return {"images": media["counts"].get("image", 0), **{k: v for k, v in media.items() if k in SAID}}


SAID = ("distinct", "source_sizes", "sizes", "tokens", "patches")


def names_of(rows: Iterable[Row]) -> set[str]:
    """The paths of the pictures that rows show; two may hold the same picture."""
    return {name for row in rows for name in _pictures(row)}


def digests(folder: Path, rows: Iterable[Row]) -> set[str]:
    """SHA-256 of the pixels of the pictures that rows show."""
    from PIL import Image

    found = set()
    for name in names_of(rows):
        with Image.open(folder / name) as image:
            found.add(hashlib.sha256(image.convert("RGB").tobytes()).hexdigest())
    return found


def _pictures(row: Row) -> list[str]:
    return [row["image"]] if "image" in row else list(row.get("images", ()))


@lru_cache(None)
def _size(path: str) -> tuple[int, int]:
    from PIL import Image, ImageOps

    with Image.open(path) as image:
        return ImageOps.exif_transpose(image).size


@lru_cache(None)
def _digest(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


@lru_cache(None)
def _resized(size: tuple[int, int], max_pixels: int, unit: int) -> tuple[int, int]:
    """Shrunk to `max_pixels` with its aspect, and then by Qwen's processor to sides of whole `unit`s."""
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

    scale = min(1.0, math.sqrt(max_pixels / (size[0] * size[1])))
    width, height = math.floor(size[0] * scale), math.floor(size[1] * scale)
    height, width = smart_resize(height, width, unit, LEAST_TOKENS * unit * unit, max_pixels)
    return width, height


def _three(sizes: list[tuple[int, int]]) -> list[str]:
    """The smallest, median and largest, by pixels."""
    ordered = sorted(sizes, key=lambda size: (size[0] * size[1], size))
    return [f"{w}x{h}" for w, h in (ordered[0], ordered[len(ordered) // 2], ordered[-1])]


def _spread(values: list[int]) -> dict[str, float]:
    return {"min": min(values), "median": statistics.median(values), "max": max(values), "sum": sum(values)}


# ------------------------------------------------------------------------------------------------- what a run wrote


def report_of(run: Path, stage: str) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((run / stage / "data.json").read_text(encoding="utf-8"))
    return loaded


def rollouts(folder: Path) -> list[Row]:
    """The rows of a folder of rollouts, in the order of its files."""
    import pyarrow.parquet as pq

    return [row for file in sorted(folder.glob("*.parquet")) for row in pq.read_table(file).to_pylist()]


def all_finite(run: Path, *stages: str) -> bool:
    values = [value for stage in stages for line in lines_of(run, stage) for value in line.values()]
    return bool(values) and all(value is not None and math.isfinite(value) for value in values)
