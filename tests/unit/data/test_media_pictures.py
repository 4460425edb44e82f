"""Pictures: what is converted, to which pixels; what is refused, and why."""

from __future__ import annotations

import io
import re
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from align.data.media.decode import decode, within
from align.data.media.sources import frames_of
from align.data.media.video import from_bytes, from_list
from align.data.records import RowError
from tests.unit.data.media_world import encoded, picture, png

LIMIT = 100_000_000


def pixels(data: bytes) -> tuple[np.ndarray, list[str]]:
    image, converted = decode(data, "x", LIMIT)
    assert image.mode == "RGB"
    return np.asarray(image), converted


def header(width: int, height: int) -> bytes:
    """A PNG that claims so many pixels and holds next to nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    start = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + start + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")


def animated(format: str) -> bytes:
    first, *more = [picture(seed=i) for i in range(3)]
    return encoded(first, format, save_all=True, append_images=more, duration=100)


def test_rgb_is_left_as_it_is() -> None:
    for data in (png(), encoded(picture(), "BMP"), encoded(picture(), "WEBP", lossless=True)):
        found, converted = pixels(data)
        assert (found == np.asarray(picture())).all() and converted == []


def test_a_palette_becomes_its_colours() -> None:
    palette = picture().quantize(32)
    for format in ("PNG", "GIF"):
        found, converted = pixels(encoded(palette, format))
        assert (found == np.asarray(palette.convert("RGB"))).all() and converted == ["palette"]


def test_sixteen_bits_are_scaled_to_eight_and_not_cut_off() -> None:
    deep = np.array([[0, 257 * 3, 257 * 128, 65535]], np.uint16).repeat(3, 0)
    found, converted = pixels(encoded(Image.fromarray(deep), "PNG"))
    assert found[0, :, 0].tolist() == [0, 3, 128, 255] and (found[..., 0] == found[..., 2]).all()
    assert converted == ["16-bit", "grey"]


def test_sixteen_bit_colour_keeps_its_high_bytes() -> None:
    row = b"\0" + struct.pack(">6H", 65535, 0, 32768, 256, 512, 1024)
    body = b"".join(
        struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d))
        for k, d in (
            (b"IHDR", struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0)),
            (b"IDAT", zlib.compress(row)),
            (b"IEND", b""),
        )
    )
    found, converted = pixels(b"\x89PNG\r\n\x1a\n" + body)
    assert found.tolist() == [[[255, 0, 128], [1, 2, 4]]] and converted == ["16-bit"]


def test_cmyk_becomes_rgb() -> None:
    solid = Image.new("CMYK", (16, 16), (0, 255, 255, 0))  # red ink
    found, converted = pixels(encoded(solid, "JPEG", quality=95))
    assert converted == ["CMYK"] and (abs(found.astype(int) - [255, 0, 0]) <= 6).all()


def test_what_is_transparent_lies_on_white() -> None:
    half = Image.new("RGBA", (4, 2), (255, 0, 0, 255))
    half.paste((0, 0, 255, 0), (2, 0, 4, 2))
    half.putpixel((0, 0), (0, 0, 0, 128))
    found, converted = pixels(encoded(half, "PNG"))
    assert found[0, 3].tolist() == [255, 255, 255] and found[1, 0].tolist() == [255, 0, 0]
    assert (abs(found[0, 0].astype(int) - 127) <= 1).all() and converted == ["alpha"]
    indexed = Image.new("P", (2, 1), 1)
    indexed.putpalette([0, 0, 0, 0, 255, 0])
    found, converted = pixels(encoded(indexed, "PNG", transparency=1))
    assert found.tolist() == [[[255] * 3] * 2] and converted == ["palette", "alpha"]
    assert pixels(encoded(picture().convert("RGBA"), "PNG"))[1] == [], "nothing was transparent"


def test_the_cameras_orientation_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned: the picture's top is at the right
    found, converted = pixels(encoded(picture(60, 40), "PNG", exif=exif))
    assert found.shape == (60, 40, 3) and converted == ["EXIF orientation"]
    assert (found == np.rot90(np.asarray(picture(60, 40)), -1)).all()


def test_grey_becomes_three_equal_channels() -> None:
    grey = picture().convert("L")
    found, converted = pixels(encoded(grey, "PNG"))
    assert (found == np.asarray(grey)[..., None]).all() and converted == ["grey"]


def damaged() -> bytes:
    data = bytearray(png())
    data[len(data) // 2] ^= 0xFF
    return bytes(data)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: header(30_000, 30_000), r"30,000 x 30,000 pixels, more than `media.max_source_pixels` .100,000,000."),
        (lambda: header(2_000_000_000, 1), "2,000,000,000 x 1 pixels, more than"),
        (lambda: header(50, 50), "x is truncated or damaged"),
        (lambda: png()[:300], "x is truncated or damaged"),
        (lambda: encoded(picture(200, 200), "JPEG")[:2000], "truncated or damaged: image file is truncated"),
        (lambda: png()[:20], "x is truncated or damaged|x is no picture|damaged header"),
        (damaged, "x is truncated or damaged"),
        (lambda: animated("GIF"), "an animated GIF of 3 frames; give it as a video, or extract the frame"),
        (lambda: animated("WEBP"), "an animated WEBP of 3 frames"),
        (lambda: animated("PNG"), "an animated PNG of 3 frames"),
        (lambda: b"<svg xmlns='http://www.w3.org/2000/svg'/>", "no picture that is read .*: it looks like an SVG"),
        (lambda: b"<!DOCTYPE html><html>Not found</html>", "it looks like HTML or XML: perhaps an error page"),
        (lambda: b"%PDF-1.7 ...", "it looks like a PDF document"),
        (lambda: encoded(picture(), "TIFF"), "it looks like a TIFF file"),
        (lambda: b"\0\0\0\x1cftypavif" + b"\0" * 40, "it looks like a HEIC or AVIF picture, or an MP4 video"),
        (lambda: b"version https://git-lfs.github.com/spec/v1\noid", "a Git LFS pointer: the file itself was not"),
        (lambda: b"PK\x03\x04rest", "it looks like a zip archive"),
        (lambda: b"\xff\xd8\xff\xe0" + b"\0" * 20, "it looks like a JPEG picture whose header is damaged"),
        (lambda: b"just some words", "it begins with 6a 75 73 74"),
        (lambda: b"", "it begins with"),
    ],
)  # fmt: skip
def test_what_is_no_whole_picture_is_refused_with_the_reason(make: Callable[[], bytes], reason: str) -> None:
    with pytest.raises(RowError) as error:
        decode(make(), "x", LIMIT)
    assert re.search(reason, str(error.value)), str(error.value)


def test_a_limit_of_pixels_is_judged_by_the_header_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("pixels were decoded"))
    with pytest.raises(RowError, match="900 x 900 pixels, more than"):
        decode(header(900, 900), "x", 10_000)


@pytest.mark.parametrize("size", [(100, 100), (640, 480), (3, 2000), (1, 1), (57, 1031)])
@pytest.mark.parametrize("limits", [(None, 1000), (5000, None), (400, 900), (10, 10)])
def test_sizes_come_within_their_limits_and_keep_their_aspect(
    size: tuple[int, int], limits: tuple[int | None, int | None]
) -> None:
    low, high = limits
    width, height = within(size, low, high)
    assert high is None or width * height <= high
    assert low is None or width * height >= low or width * height >= 0.5 * low or high is not None
    if width > 8 and height > 8:
        assert width / height == pytest.approx(size[0] / size[1], rel=0.15)
    assert within((width, height), low, high) == (width, height), "resizing again changes nothing"


# ------------------------------------------------------------------------------------------------- videos


def film(path: Path, frames: int = 20, fourcc: str = "mp4v", size: tuple[int, int] = (64, 48)) -> bytes:
    """Frame i is a plane of brightness 10 i."""
    import cv2

    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*fourcc), 10.0, size)  # type: ignore[attr-defined]
    for i in range(frames):
        writer.write(np.full((size[1], size[0], 3), 10 * i % 250, np.uint8))
    writer.release()
    return path.read_bytes()


@pytest.mark.parametrize(("name", "fourcc"), [("a.mp4", "mp4v"), ("a.avi", "MJPG")])
def test_frames_are_taken_evenly_first_and_last_among_them(name: str, fourcc: str, tmp_path: Path) -> None:
    video = from_bytes(film(tmp_path / name, fourcc=fourcc), "x", 5, LIMIT)
    assert video.indices == [0, 5, 10, 14, 19] and video.total == 20 and video.fps == pytest.approx(10.0)
    brightness = [float(np.asarray(frame).mean()) for frame in video.frames]
    assert np.allclose(brightness, [0, 50, 100, 140, 190], atol=6)


def test_an_animation_is_a_video_and_so_is_a_list_of_pictures() -> None:
    for format in ("GIF", "WEBP"):
        video = from_bytes(animated(format), "x", 2, LIMIT)
        assert video.indices == [0, 2] and video.total == 3
        assert video.frames[0].size == (60, 40) and video.frames[0].mode == "RGB"
    listed = from_list([(f"{i}", png(picture(seed=i))) for i in range(5)], 3, LIMIT)
    assert listed.indices == [0, 2, 4]
    assert (np.asarray(listed.frames[1]) == np.asarray(picture(seed=2))).all()


def test_videos_that_cannot_be_used_say_why(tmp_path: Path) -> None:
    whole = film(tmp_path / "a.avi", 40, "MJPG")
    cases: list[tuple[Callable[[], Any], str]] = [
        (lambda: from_bytes(b"just some words", "x", 4, LIMIT), "x is no video that OpenCV's FFmpeg reads"),
        (lambda: from_bytes(whole, "x", 4, 1000), "frames of 64 x 48 pixels, more than `media.max_source_pixels`"),
        (lambda: from_bytes(animated("GIF")[:3000], "x", 4, LIMIT), "x is truncated or damaged"),
        (lambda: from_list([("f0", png()), ("f1", png(picture(10, 10)))], 4, LIMIT), "frame 1 of a video has 10 x 10"),
        (lambda: from_list([("f0", png()[:99])], 4, LIMIT), "f0 is truncated or damaged"),
    ]
    for make, reason in cases:
        with pytest.raises(RowError) as error:
            make()
        assert re.search(reason, str(error.value)), str(error.value)


def test_a_film_that_ends_early_is_refused_or_taken_from_what_is_there(tmp_path: Path) -> None:
    whole = film(tmp_path / "a.avi", 40, "MJPG")
    with pytest.raises(RowError, match=r"x ends after \d+ of 40 frames|x is no video|x has no frame"):
        from_bytes(whole[: len(whole) // 4], "x", 4, LIMIT)


def test_evenly_taken_frames() -> None:
    assert list(frames_of(3, 8)) == [0, 1, 2]
    assert list(frames_of(100, 1)) == [50]
    assert list(frames_of(10, 4)) == [0, 3, 6, 9]


def test_the_header_helper_makes_a_png_that_others_would_open() -> None:
    assert Image.open(io.BytesIO(header(50, 50))).size == (50, 50)
