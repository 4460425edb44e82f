"""Bytes to an RGB picture, or the reason why not. Nothing is guessed or replaced: a picture is whole, or its row is
refused.

What is converted is counted in the data report: 16-bit samples are scaled to 8, palettes and CMYK become RGB, what is
transparent is laid on white, and the camera's orientation (EXIF) is applied. How many pixels a file claims to have is
read from its header before any of them is decoded.
"""

from __future__ import annotations

import io
import math
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from align.data.records import RowError

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")
_FLAT = ("RGB", "L")
_ALPHA = ("RGBA", "LA", "PA", "RGBa", "La")
_KNOWN_STARTS = (
    (b"<svg", "an SVG drawing"),
    (b"<?xml", "XML, perhaps an SVG drawing"),
    (b"<", "HTML or XML: perhaps an error page that was saved under this name"),
    (b"%PDF", "a PDF document"),
    (b"II*\0", "a TIFF file"),
    (b"MM\0*", "a TIFF file"),
    (b"version https://git-lfs", "a Git LFS pointer: the file itself was not downloaded"),
    (b"PK\x03\x04", "a zip archive"),
    (b"\x1f\x8b", "a gzip file"),
    (b"\x89PNG", "a PNG picture whose header is damaged"),
    (b"\xff\xd8\xff", "a JPEG picture whose header is damaged"),
    (b"GIF8", "a GIF picture whose header is damaged"),
    (b"RIFF", "a RIFF file (a video or a sound)"),
)


def decode(data: bytes, name: str, max_source_pixels: int) -> tuple[Image.Image, list[str]]:
    """The picture in mode RGB, and what was converted (palette, CMYK, 16-bit, alpha, grey, EXIF orientation).

    Raises RowError where it is none of `FORMATS`, animated, truncated, damaged, or larger than max_source_pixels.
    """
    image = opened(data, name, max_source_pixels)
    if getattr(image, "is_animated", False) and image.format != "MPO":  # MPO: a camera's preview beside the picture
        frames = getattr(image, "n_frames", 2)
        raise RowError(
            f"{name} is an animated {image.format} of {frames} frames; give it as a video, or extract the frame that "
            "is meant"
        )
    deep = _is_deep(image)
    try:
        if image.format == "PNG":
            Image.open(io.BytesIO(data), formats=("PNG",)).verify()  # checksums, which loading alone does not read
        image.load()
    except (OSError, SyntaxError, ValueError, EOFError, IndexError) as e:  # SyntaxError: Pillow's word for bad chunks
        raise RowError(f"{name} is truncated or damaged: {e}") from e
    return flattened(image, deep)


def opened(data: bytes, name: str, max_source_pixels: int) -> Image.Image:
    """A picture whose header was read. Raises RowError where it is no picture, or too large."""
    Image.MAX_IMAGE_PIXELS = None  # ours is the limit, with a message that says what to do
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError as e:
        raise RowError(f"{name} is no picture that is read ({', '.join(FORMATS)}): {_what(data)}") from e
    except (OSError, SyntaxError, ValueError) as e:
        raise RowError(f"{name} has a damaged header: {e}") from e
    width, height = image.size
    if width * height > max_source_pixels:
        raise RowError(
            f"{name} has {width:,} x {height:,} pixels, more than `media.max_source_pixels` ({max_source_pixels:,}) "
            "allows; make it smaller, or raise that limit if it is no decompression bomb"
        )
    if not width or not height:
        raise RowError(f"{name} has {width} x {height} pixels")
    return image


def flattened(image: Image.Image, deep: bool = False) -> tuple[Image.Image, list[str]]:
    """A loaded picture as RGB in its camera's orientation, and what was converted."""
    done: list[str] = []
    if image.getexif().get(0x0112, 1) not in (0, 1):
        image = ImageOps.exif_transpose(image)
        done.append("EXIF orientation")
    if deep:
        done.append("16-bit")
    if image.mode.startswith("I") or image.mode == "F":
        image = _eight_bits(image)
    if image.mode == "P":
        done.append("palette")
    if image.mode == "CMYK":
        done.append("CMYK")
    if image.mode in _ALPHA or "transparency" in image.info:
        rgba = image.convert("RGBA")
        if np.asarray(rgba)[..., 3].min() < 255:
            done.append("alpha")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB"), done
    if image.mode in ("L", "1"):
        done.append("grey")
    return image.convert("RGB"), done


def _is_deep(image: Image.Image) -> bool:
    """Whether samples have 16 bits. (Of 16-bit RGB, Pillow keeps the high byte as it loads.)"""
    modes = [str(tile[3]) if len(tile) > 3 else "" for tile in getattr(image, "tile", ())]
    return image.mode.startswith("I") or any("16" in mode for mode in modes)


def _eight_bits(image: Image.Image) -> Image.Image:
    """Samples of 16 bits scaled to 8: 65535 is white."""
    samples: Any = np.asarray(image).astype(np.float64)
    return Image.fromarray(np.clip(np.rint(samples / 257.0), 0, 255).astype(np.uint8))


def _what(data: bytes) -> str:
    head = data.lstrip()[:64].lower()
    for start, words in _KNOWN_STARTS:
        if head.startswith(start.lower()):
            return f"it looks like {words}"
    if data[4:8] == b"ftyp":
        return "it looks like a HEIC or AVIF picture, or an MP4 video"
    return f"it begins with {data[:8].hex(' ')}"


# ------------------------------------------------------------------------------------------------- sizes


def within(size: tuple[int, int], min_pixels: int | None, max_pixels: int | None) -> tuple[int, int]:
    """(width, height) of the same aspect with at most max_pixels and, where that allows, at least min_pixels."""
    width, height = size
    pixels = width * height
    if max_pixels is not None and pixels > max_pixels:
        scale = math.sqrt(max_pixels / pixels)
        width, height = max(1, math.floor(width * scale)), max(1, math.floor(height * scale))
        if width * height > max_pixels:  # so thin that the one side is at 1 already
            width, height = min(width, max_pixels), min(height, max_pixels)
    elif min_pixels is not None and pixels < min_pixels:
        scale = math.sqrt(min_pixels / pixels)
        grown = math.ceil(width * scale), math.ceil(height * scale)
        if max_pixels is not None and grown[0] * grown[1] > max_pixels:
            grown = max(1, math.floor(width * scale)), max(1, math.floor(height * scale))
        width, height = grown
    return width, height


def resized(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    return image if image.size == size else image.resize(size, Image.Resampling.BICUBIC)
