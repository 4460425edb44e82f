from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from align.data.tokenizer import ChatTokenizer
from tests.chat_families import load_family


@pytest.fixture(scope="session")
def family(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., ChatTokenizer]:
    """A function of a family's name, and of variables of its template, that gives its tokenizer."""
    known: dict[str, ChatTokenizer] = {}

    def get(name: str, **variables: Any) -> ChatTokenizer:
        key = f"{name}-{variables}"
        if key not in known:
            known[key] = load_family(tmp_path_factory.mktemp(name), name, **variables)
        return known[key]

    return get
