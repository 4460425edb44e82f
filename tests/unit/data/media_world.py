"""Pictures, folders and libraries for the tests of media."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from align.data.media.library import Library
from align.data.media.pool import Pool
from align.data.media.worker import answer
from align.data.prepare import Prepared, prepare
from align.data.tokenizer import load_tokenizer
from align.recipe.inputs import DataSource, Media

MakeVlm = Callable[[str], Path]


def picture(width: int = 60, height: int = 40, seed: int = 0) -> Image.Image:
    """Noise over a slope: no two seeds are alike, and a shift or a flip shows."""
    noise = np.random.default_rng(seed).integers(0, 60, (height, width, 3))
    slope = np.linspace(0, 190, width)[None, :, None] * np.ones((height, 1, 3))
    return Image.fromarray((noise + slope).astype(np.uint8))


def png(image: Image.Image | None = None, **options: Any) -> bytes:
    return encoded(image or picture(), "PNG", **options)


def encoded(image: Image.Image, format: str, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


def data_uri(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def write_rows(folder: Path, rows: Sequence[Mapping[str, Any]], name: str = "data.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def shown(name: str) -> dict[str, Any]:
    return {"type": "image", "image": name}


def chat(*parts: Any, answer: str = "3.") -> dict[str, Any]:
    """A row of one question, in parts, and one answer."""
    content = [part if isinstance(part, dict) else {"type": "text", "text": part} for part in parts]
    return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]}


class InProcess(Pool):
    """A pool that works in this process: most tests are not about processes, and each takes seconds to start."""

    def __init__(self, folder: Path):
        super().__init__(folder, 1, 60.0)
        self.processor = _processor(folder)

    def describe(self) -> dict[str, Any]:
        return self.processor.describe()

    def ask(self, job: dict[str, Any], payload: Sequence[bytes]) -> dict[str, Any]:
        waiting = iter(payload)
        return answer(self.processor, job, [next(waiting) if "size" in blob else None for blob in job["blobs"]])


@lru_cache
def _processor(folder: Path) -> Any:
    from align.data.media.process import Processor

    return Processor(folder)


class World:
    """A folder of data, a model and a store. `prepare` opens and closes a library each time, as every command does."""

    def __init__(self, folder: Path, model: Path, **media: Any):
        self.folder, self.model, self.store = folder, model, folder / "store"
        self.media = Media(workers=1, **media)
        self.processed = 0

    def image(self, name: str, seed: int = 0, size: tuple[int, int] = (60, 40)) -> str:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(picture(*size, seed=seed)))
        return name

    def library(self, **media: Any) -> Library:
        return Library(self.media.model_copy(update=media), self.model, self.store, pool=InProcess(self.model))

    def prepare(
        self,
        rows: Sequence[Mapping[str, Any]] | Path,
        kind: Any = "conversation",
        *,
        template: str | None = None,
        **options: Any,
    ) -> Prepared:
        path = rows if isinstance(rows, Path) else write_rows(self.folder, rows)
        cache = options.pop("cache", None)
        answers = options.pop("answers", False)
        tokenizer = load_tokenizer(self.model, chat_template=template)
        library = self.library()
        try:
            source = (DataSource(path=str(path), **options),)
            return prepare(source, kind, tokenizer, seed=0, cache=cache, media=library, answers=answers)
        finally:
            self.processed = library.processed
            library.close()
