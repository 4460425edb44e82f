"""The facts of the engine that a recipe names: one of ours, or a user's `package.module:Class`, asked in a child."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import asdict
from functools import lru_cache
from typing import Any

from pydantic import TypeAdapter, ValidationError

from align.engines import ENGINES, EngineFacts, facts_of_ours
from align.errors import PluginError
from align.plugins import asked_in_child, require_call, resolve

LIMIT_S = 180.0  # for the module of an engine, which may import torch and more


def known_engine(name: str) -> str:
    """`name`; ValueError where it can be no engine's."""
    module, _, attribute = name.partition(":")
    if module.endswith(".py"):
        raise ValueError(
            f"an engine is named package.module:Class, and {module!r} is a file: its processes import it by its name. "
            "Put its folder on PYTHONPATH, and write the module without .py"
        )
    if name in ENGINES or all(part.isidentifier() for part in (*module.split("."), attribute)):
        return name
    near = difflib.get_close_matches(name, ENGINES, n=1)
    hint = f"did you mean `{near[0]}`? " if near else ""
    raise ValueError(f"no rollout engine is named {name!r}: {hint}use {', '.join(ENGINES)}, or package.module:Class")


@lru_cache
def facts_of(name: str) -> EngineFacts:
    """Raises PluginError where a user's engine cannot be loaded, or its facts are none."""
    if ":" not in name:
        return facts_of_ours(name)
    try:
        answer: dict[str, Any] = asked_in_child(f"{__name__}:described", name, LIMIT_S)
    except PluginError as error:
        raise PluginError(f"the engine {name}: {error.what}", where="rollout.name", remedy=error.remedy) from None
    plain: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in answer.items()}
    return EngineFacts(**plain)


def described(name: str) -> dict[str, Any]:
    """A user's engine in plain JSON. It runs user code."""
    found = resolve(name, group="align.engines")
    facts = getattr(found, "facts", EngineFacts())
    if not callable(found) or not isinstance(facts, EngineFacts):
        raise PluginError(
            "an engine is a class whose `facts`, where it has some, are align.engines.EngineFacts",
            where=name,
            remedy="rollout/base.py says what an engine is, rollout/vllm_facts.py is an example of facts",
        )
    _require_members(found, name)
    try:
        TypeAdapter(EngineFacts).validate_python(asdict(facts))
    except ValidationError as error:
        first = error.errors()[0]
        what = f"`facts.{'.'.join(map(str, first['loc']))}`: {first['msg'].lower()}, got {first['input']!r}"
        raise PluginError(what, where=name, remedy="align/engines.py says what each of the facts is") from error
    return asdict(facts) | {"engine": name, "title": facts.title or name}


MEMBERS = ("add", "step", "abandon", "accepts", "publish", "logps", "close")
"""Methods of `rollout.base.Engine`, which this room does not know."""


def _require_members(found: Any, name: str) -> None:
    """A class has them all, and is made of a spec; a function that makes an engine may be anything."""
    known = isinstance(found, type) and not hasattr(found, "__getattr__")
    missing = [member for member in MEMBERS if known and not callable(getattr(found, member, None))]
    if missing:
        raise PluginError(
            f"an engine has the methods {', '.join(MEMBERS)}; this has no {' and no '.join(missing)}",
            where=name,
            remedy="rollout/base.py says what each of them does",
        )
    require_call(
        found,
        ("spec",),
        said="an engine is made of an EngineSpec, and nothing else",
        where=name,
        remedy="write `def __init__(self, spec)`",
    )


def those(which: Callable[[EngineFacts], Any]) -> list[str]:
    """Names of our engines whose facts are so, in the order of the table."""
    return [name for name in ENGINES if which(facts_of_ours(name))]
