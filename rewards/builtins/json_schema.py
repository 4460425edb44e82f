"""Is the completion JSON that fits a schema? 1 or 0.

JSON Schema as the library `jsonschema` reads it: the draft that `$schema` names, else 2020-12. References within the
schema are followed; nothing is fetched, so that a reference to anything else is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, NoReturn

import jsonschema
from jsonschema.protocols import Validator
from jsonschema.validators import validator_for
from referencing import Registry

from rewards.api import Objective, Sample, Score, reward
from rewards.builtins._answers import row_gold

_FENCE = re.compile(r"\A```(?:json)?\s*(.*?)\s*```\Z", re.DOTALL | re.IGNORECASE)


def _check(schema: dict[str, Any] | None = None, column: str | None = None) -> None:
    if (schema is None) == (column is None):
        raise ValueError("give `schema`, or `column` (the row's column that holds it)")
    if schema is not None:
        _validator(schema)


@reward(objectives={"json_schema": Objective(range=(0, 1))}, validate=_check)
def json_schema(
    samples: Sequence[Sample], *, schema: dict[str, Any] | None = None, column: str | None = None
) -> list[Score]:
    """1 where the completion, a code fence around it aside, is JSON that fits the schema; else 0 and the reason.
    Special tokens are no part of it, unless the reward says `text: raw`.

    Args:
        schema: the schema of all completions. column: the row's column that holds it instead, as an object or as JSON.
    """
    one = None if schema is None else _validator(schema)
    scores = []
    for sample in samples:
        problem = _problem(sample.completion, one or _validator(row_gold(sample.row, str(column))))
        scores.append(Score(0.0, info={"wrong": problem}) if problem else Score(1.0))
    return scores


def _validator(schema: Any) -> Validator:
    """The schema, an object or JSON, ready to use; ValueError where it is none, or refers outside itself."""
    return _read(schema if isinstance(schema, str) else json.dumps(schema))


@lru_cache(maxsize=256)  # all completions of a group have one
def _read(text: str) -> Validator:
    schema = json.loads(text)
    kind = validator_for(schema, default=jsonschema.Draft202012Validator)
    try:
        kind.check_schema(schema)
    except jsonschema.SchemaError as error:
        raise ValueError(f"no JSON Schema: {error.message}") from error
    for reference in _references(schema):
        if not reference.startswith("#"):
            raise ValueError(f"the schema refers to {reference!r}; put it under $defs: nothing is fetched")
    return kind(schema, registry=Registry())


def _references(schema: Any) -> Iterator[str]:
    if isinstance(schema, dict):
        own = [schema.get("$ref"), schema.get("$dynamicRef")]
        yield from (r for r in own if isinstance(r, str))
        for value in schema.values():
            yield from _references(value)
    elif isinstance(schema, list):
        for value in schema:
            yield from _references(value)


def _problem(text: str, validator: Validator) -> str | None:
    text = text.strip()
    fenced = _FENCE.match(text)
    try:
        found = json.loads(fenced[1] if fenced else text, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        return f"no JSON: {error}"
    misfit = next(iter(validator.iter_errors(found)), None)
    return None if misfit is None else f"{misfit.json_path}: {misfit.message}"[:500]


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is none of its values")
