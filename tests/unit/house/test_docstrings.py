"""What is public says what it is: docstrings that name fields, shapes and dtypes of tensors, and errors."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np
import pytest

from align.errors import AlignError, DataError
from rewards import PluginError
from tests.guides import public

SHAPE = r"(?:[fiu]\d+\[[^\]]*\]|bool\[[^\]]*\]|of any shape|shaped as)"
"""`f32[N]`, `i64[S, R]`; a tensor whose shape is that of something else, or does not matter, says so."""


def parts(name: str) -> Iterator[tuple[str, Any]]:
    """What a dotted name stands for; of a module its own classes and functions too, of each class its own methods."""
    module, _, attribute = name.rpartition(".")
    subject = getattr(import_module(module), attribute, None) or import_module(name)
    yield name, subject
    own = [subject]
    if inspect.ismodule(subject):
        own = [
            thing
            for key, thing in vars(subject).items()
            if getattr(thing, "__module__", None) == name and key[0] != "_" and key == getattr(thing, "__name__", key)
        ]
        yield from ((f"{name}.{thing.__name__}", thing) for thing in own if hasattr(thing, "__name__"))
    for thing in filter(inspect.isclass, own):
        for part, method in vars(thing).items():
            defined = inspect.isroutine(method) and thing.__qualname__ in getattr(method, "__qualname__", "")
            if not part.startswith("_") and (defined or isinstance(method, property)):
                yield f"{thing.__qualname__}.{part}", method


ALL = dict(part for name in public() for part in parts(name))
assert len(ALL) > 100


def is_array(annotation: object) -> bool:
    return bool(re.search(r"\b(Tensor|ndarray)\b", str(annotation)))


def code_of(thing: Any) -> Any:
    """The function behind a method."""
    return thing.fget if isinstance(thing, property) else inspect.unwrap(getattr(thing, "__func__", thing))


def said_of(thing: Any) -> str:
    """Its own docstring, "" where it is the one that `dataclass` writes."""
    text = inspect.getdoc(thing) or ""
    return "" if inspect.isclass(thing) and text.startswith(f"{thing.__name__}(") else text


def fields_of(thing: type) -> Mapping[str, object]:
    """Its own fields, with their types."""
    own = vars(thing).get("__annotations__", {})
    return {name: kind for name, kind in own.items() if name[0] != "_" and name != "model_config"}


def lacking(thing: Any) -> Iterator[str]:
    """What the docstring of a class or function should say, and does not."""
    said = said_of(thing)
    if not said:
        yield "a docstring"
        return
    if inspect.isclass(thing):
        for name, kind in fields_of(thing).items():
            if not names(said, name):
                yield f"the field `{name}`"
            elif is_array(kind) and not shaped(said, name):
                yield f"the shape of `{name}`"
    elif not inspect.ismodule(thing):
        code = code_of(thing)
        given = {name: kind for name, kind in code.__annotations__.items() if name != "return"}
        yield from (
            f"the shape of `{name}`" for name, kind in given.items() if is_array(kind) and not shaped(said, name)
        )
        if is_array(code.__annotations__.get("return")) and not re.search(SHAPE, said):
            yield "the shape of what it returns"
        yield from (f"that it raises {error}" for error in raised_by(code) if error not in said)


def names(said: str, name: str) -> bool:
    return re.search(rf"(?<![\w.]){name}\b", said) is not None


def shaped(said: str, name: str) -> bool:
    """Whether a shape stands behind the name, in the same clause."""
    return re.search(rf"(?<![\w.]){name}\b[^.;]*?{SHAPE}", said) is not None


def raised_by(code: Any) -> list[str]:
    """The errors of ours that the function itself raises by name."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(code)))
    calls = [node.exc for node in ast.walk(tree) if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call)]
    called = {call.func.id for call in calls if isinstance(call.func, ast.Name)}
    kinds = {name: code.__globals__.get(name) for name in called}
    return sorted(
        name
        for name, kind in kinds.items()
        if inspect.isclass(kind) and issubclass(kind, AlignError | PluginError | ValueError)
    )


@pytest.mark.parametrize("name", ALL)
def test_what_is_public_names_its_fields_shapes_and_errors(name: str) -> None:
    assert list(lacking(ALL[name])) == []


@dataclass
class Silent:
    scores: np.ndarray


@dataclass
class Shapeless:
    """scores: of R objectives. The other is f32[S]."""

    scores: np.ndarray
    other: int
    third: int = 0


@dataclass
class Told:
    """scores f32[S, R]: of R objectives; other: how many."""

    scores: np.ndarray
    other: int


def shapeless(values: np.ndarray, rows: int) -> np.ndarray:
    """The sums of `values`."""
    return values.sum(axis=rows)


def told(values: np.ndarray, rows: int) -> np.ndarray:
    """The sums of `values` f32[S, R], f32[S]. Raises DataError where there are none."""
    if rows > 1:
        raise DataError("none")
    return values.sum(axis=rows)


def raising() -> None:
    """Does nothing."""
    raise DataError("always")


@pytest.mark.parametrize(
    ("thing", "what"),
    [
        (Silent, ["a docstring"]),
        (Shapeless, ["the shape of `scores`", "the field `third`"]),
        (Told, []),
        (shapeless, ["the shape of `values`", "the shape of what it returns"]),
        (told, []),
        (raising, ["that it raises DataError"]),
    ],
)
def test_what_a_docstring_leaves_out_is_noticed(thing: Any, what: list[str]) -> None:
    assert list(lacking(thing)) == what
