"""Questions about the grammar of schema.py: which type stands at a path, what it expects, which keys it has."""

from __future__ import annotations

import types
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel

from align.recipe.document import Path_
from align.recipe.schema import Recipe


def strip(annotation: Any) -> Any:
    """Without Annotated and without None."""
    while True:
        if get_origin(annotation) is Annotated:
            annotation = get_args(annotation)[0]
            continue
        members = [m for m in members_of(annotation) if m is not type(None)]
        if len(members) == 1 and members[0] is not annotation:
            annotation = members[0]
            continue
        return annotation


def members_of(annotation: Any) -> tuple[Any, ...]:
    if get_origin(annotation) in (Union, types.UnionType):
        return get_args(annotation)
    return (annotation,)


def is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def keys_of(model: type[BaseModel]) -> dict[str, Any]:
    """The keys as they are written in a recipe, with the types that they take."""
    return {field.alias or name: field.annotation for name, field in model.model_fields.items()}


def stage_models() -> dict[str, type[BaseModel]]:
    """Stage kinds with their types, in the order of the schema."""
    stage = strip(get_args(keys_of(Recipe)["stages"])[0])
    return {get_args(m.model_fields["kind"].annotation)[0]: m for m in members_of(stage)}


def _tag(annotation: Any) -> str:
    """The word that pydantic puts into a location for this member of a union."""
    if is_model(annotation):
        return annotation.__name__
    if get_origin(annotation) is Literal:
        return f"literal[{','.join(repr(v) for v in get_args(annotation))}]"
    return getattr(annotation, "__name__", str(annotation)) if not get_args(annotation) else str(annotation)


def descend(annotation: Any, step: str | int, raw: Any) -> Any:
    """The type below `step`; of a union, the member that `raw` looks like. None where there is none."""
    annotation = choose(annotation, raw)
    if is_model(annotation):
        return keys_of(annotation).get(str(step))
    arguments = get_args(annotation)
    if get_origin(annotation) is tuple and isinstance(step, int):
        return arguments[0] if arguments[-1] is Ellipsis else arguments[min(step, len(arguments) - 1)]
    if get_origin(annotation) is dict:
        return arguments[1]
    return None


def choose(annotation: Any, raw: Any) -> Any:
    """Of a union, the member that `raw` looks like: by `kind`, else a type for a map, else one for a list."""
    annotation = strip(annotation)
    members = [strip(m) for m in members_of(annotation) if m is not type(None)]
    if len(members) == 1:
        return members[0]
    models = [m for m in members if is_model(m)]
    if isinstance(raw, dict):
        kinds = {get_args(m.model_fields["kind"].annotation)[0]: m for m in models if "kind" in m.model_fields}
        if kinds:
            return kinds.get(raw.get("kind"), annotation)
        return models[0] if models else annotation
    if isinstance(raw, list):
        return next((m for m in members if get_origin(m) is tuple), annotation)
    return annotation


def locate(loc: tuple[str | int, ...], data: Any) -> tuple[Path_, Any, Any]:
    """pydantic's location -> (path in the file, value there, type there).

    A location also has union tags, and the index 0 where a lone map was wrapped into a list: both have no place in
    the file and are passed over.
    """
    path: Path_ = ()
    raw, annotation = data, Recipe
    for i, step in enumerate(loc):
        last = i == len(loc) - 1
        if isinstance(step, int):
            below = descend(annotation, step, [])
            annotation = below if below is not None else annotation
            if isinstance(raw, list) and step < len(raw):
                path, raw = (*path, step), raw[step]
            continue
        chosen = choose(annotation, raw)
        is_kind = isinstance(raw, dict) and step == raw.get("kind") and not last and step in stage_models()
        if isinstance(raw, dict) and not is_kind and (step in raw or (is_model(chosen) and step in keys_of(chosen))):
            annotation = descend(chosen, step, raw)
            path, raw = (*path, step), raw.get(step)
    return path, raw, annotation


def words(annotation: Any) -> str:
    """What a type expects, for a sentence that begins with `expected`."""
    annotation = strip(annotation)
    members = [strip(m) for m in members_of(annotation) if m is not type(None)]
    if len(members) > 1:
        if all("kind" in getattr(m, "model_fields", {}) for m in members):
            return "a stage, {id: ..., kind: ..., ...}"
        return " or ".join(words(m) for m in members)
    if is_model(annotation):
        return "a map with keys " + ", ".join(keys_of(annotation))
    if get_origin(annotation) is Literal:
        return " or ".join(str(v) for v in get_args(annotation))
    if get_origin(annotation) is tuple:
        return "a list of " + words(get_args(annotation)[0])
    if get_origin(annotation) is dict:
        return "a map"
    plain = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
    return plain.get(annotation, "a value")


def misplaced_booleans(raw: Any, annotation: Any = Recipe, path: Path_ = ()) -> Iterator[tuple[Path_, Any]]:
    """Places where true or false stands for a number: Python counts True as 1, a recipe does not."""
    chosen = choose(annotation, raw)
    if isinstance(raw, bool):
        if strip(annotation) in (int, float):
            yield path, strip(annotation)
    elif isinstance(raw, dict):
        for key, value in raw.items():
            below = descend(chosen, key, raw) if is_model(chosen) or get_origin(chosen) is dict else None
            if get_origin(chosen) is tuple:  # a lone map where a list may stand
                below = descend(get_args(chosen)[0], key, raw)
            if below is not None:
                yield from misplaced_booleans(value, below, (*path, key))
    elif isinstance(raw, list) and get_origin(chosen) is tuple:
        for i, value in enumerate(raw):
            yield from misplaced_booleans(value, get_args(chosen)[0], (*path, i))
