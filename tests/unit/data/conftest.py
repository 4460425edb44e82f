from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from align.data.scratch import train_tokenizer
from align.data.tokenizer import ChatTokenizer, load_tokenizer
from align.recipe.inputs import TokenizerFromScratch
from tests.unit.data.build import write_jsonl

LINES = [
    "The quick brown fox jumps over the lazy dog.",
    "What is 12+7? 12+7 = 19.",
    "A user asks, the assistant answers;\nnew lines and  two spaces are kept.",
    "Grüße aus Köln, 日本語, 😊 and\ttabs.",
]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer folder: byte-level BPE with our ChatML template."""
    root = tmp_path_factory.mktemp("tokenizer")
    data = write_jsonl(root / "text.jsonl", [{"text": line} for line in LINES * 20])
    train_tokenizer(TokenizerFromScratch(train_on=str(data), vocab_size=400), root / "tokenizer")
    return root / "tokenizer"


@pytest.fixture(scope="session")
def tokenizer(folder: Path) -> ChatTokenizer:
    return load_tokenizer(folder)


@pytest.fixture(scope="session")
def vlm(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A function of a family's name that writes its tiny vision-language model, once."""
    from tests.tiny_vlms import write_tiny_vlm

    written: dict[str, Path] = {}

    def write(family: str) -> Path:
        if family not in written:
            written[family] = write_tiny_vlm(tmp_path_factory.mktemp(family), family)
        return written[family]

    return write
