"""The generators beside the recipes, as modules: the folder is no package."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from types import ModuleType

import pytest

from tests import generators


@pytest.fixture(scope="module")
def generator() -> Iterator[Callable[[str], ModuleType]]:
    """A function of a file's name without .py. What it loads is forgotten after the tests of one file."""
    loaded: list[str] = []

    def load(name: str) -> ModuleType:
        loaded.append(name)
        return generators.load(name)

    yield load
    for name in loaded:
        del sys.modules[name]
