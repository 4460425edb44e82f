"""The frames of a video: a file (OpenCV's FFmpeg decodes it), an animated GIF or WebP, or a list of pictures."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageSequence

from align.data.media.decode import decode, flattened, opened
from align.data.media.sources import frames_of
from align.data.records import RowError

FRAME_LIST_FPS = 2.0
"""What a list of frames is taken to have been sampled at, as the Qwen processors do; the list does not say."""


@dataclass
class Video:
    """frames: RGB, all of one size. indices: which of the `total` frames of the file they are. fps: of the file."""

    frames: list[Image.Image]
    indices: list[int]
    total: int
    fps: float


def from_list(blobs: Sequence[tuple[str, bytes]], wanted: int, max_source_pixels: int) -> Video:
    """Frames that a row lists as (name, bytes). Raises RowError, naming the frame."""
    indices = list(frames_of(len(blobs), wanted))
    frames = [decode(blobs[i][1], blobs[i][0], max_source_pixels)[0] for i in indices]
    for i, frame in zip(indices, frames, strict=True):
        if frame.size != frames[0].size:
            raise RowError(
                f"frame {i} of a video has {frame.size[0]} x {frame.size[1]} pixels, and frame {indices[0]} "
                f"{frames[0].size[0]} x {frames[0].size[1]}; all frames must have one size"
            )
    return Video(frames, indices, len(blobs), FRAME_LIST_FPS)


def from_bytes(data: bytes, name: str, wanted: int, max_source_pixels: int) -> Video:
    """Frames taken evenly from a file's bytes. Raises RowError."""
    if data[:4] == b"GIF8" or (data[:4] == b"RIFF" and data[8:12] == b"WEBP"):
        return _from_animation(data, name, wanted, max_source_pixels)
    descriptor, path = tempfile.mkstemp(prefix="align-video-")
    try:
        with os.fdopen(descriptor, "wb") as f:
            f.write(data)
        return _from_file(Path(path), name, wanted, max_source_pixels)
    finally:
        os.unlink(path)


def _from_animation(data: bytes, name: str, wanted: int, max_source_pixels: int) -> Video:
    image = opened(data, name, max_source_pixels)
    total = int(getattr(image, "n_frames", 1))
    indices = list(frames_of(total, wanted))
    seconds, frames = 0.0, []
    try:
        for i, frame in enumerate(ImageSequence.Iterator(image)):
            seconds += float(frame.info.get("duration", 100)) / 1000
            if i in indices:
                frames.append(flattened(frame.copy())[0])
    except (OSError, EOFError, ValueError) as e:
        raise RowError(f"{name} is truncated or damaged: {e}") from e
    return Video(frames, indices, total, total / seconds if seconds else 10.0)


def _from_file(path: Path, name: str, wanted: int, max_source_pixels: int) -> Video:
    import cv2

    reader = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG)
    try:
        if not reader.isOpened():
            raise RowError(f"{name} is no video that OpenCV's FFmpeg reads (damaged, or a codec that it lacks)")
        width, height = int(reader.get(cv2.CAP_PROP_FRAME_WIDTH)), int(reader.get(cv2.CAP_PROP_FRAME_HEIGHT))
        if width * height > max_source_pixels:
            raise RowError(
                f"{name} has frames of {width:,} x {height:,} pixels, more than `media.max_source_pixels` "
                f"({max_source_pixels:,}) allows"
            )
        claimed = int(reader.get(cv2.CAP_PROP_FRAME_COUNT))
        fps = float(reader.get(cv2.CAP_PROP_FPS))
    finally:
        reader.release()
    total = claimed if claimed > 0 else _count(path)
    found = _read(path, list(frames_of(total, wanted)))
    if len(found) < min(total, wanted):  # headers are often off by a few frames: count, and take them anew
        total = _count(path)
        if total < max(1, claimed // 2):
            raise RowError(f"{name} ends after {total} of {claimed} frames: truncated or damaged")
        found = _read(path, list(frames_of(total, wanted)))
    if not found:
        raise RowError(f"{name} has no frame that can be decoded")
    rate = fps if math.isfinite(fps) and fps > 0 else FRAME_LIST_FPS
    return Video(list(found.values()), list(found), total, rate)


def _count(path: Path) -> int:
    import cv2

    reader = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG)
    count = 0
    while reader.grab():
        count += 1
    reader.release()
    return count


def _read(path: Path, indices: list[int]) -> dict[int, Image.Image]:
    """The frames of these numbers, as far as they come. Read from the start: seeking is exact in few containers."""
    import cv2

    reader = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG)
    found: dict[int, Image.Image] = {}
    wanted = set(indices)
    for i in range(max(indices, default=-1) + 1):
        if not reader.grab():
            break
        if i in wanted:
            good, frame = reader.retrieve()
            if not good:
                break
            found[i] = Image.fromarray(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB))
    reader.release()
    return found
