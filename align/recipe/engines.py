"""The facts of the engine that a recipe names: one of ours, or a user's `package.module:Class`, asked in a child."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import asdict
from functools import lru_cache
from typing import Any

from align.engines import ENGINES, EngineFacts, facts_of_ours
from align.errors import PluginError
from align.plugins import asked_in_child, resolve

LIMIT_S = 180.0  # for the module of an engine, which may import torch and more


def known_engine(name: str) -> str:
    """`name`; ValueError where it can be no engine's."""
    module, _, attribute = name.partition(":")
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
    return asdict(facts) | {"engine": name, "title": facts.title or name}


def those(which: Callable[[EngineFacts], Any]) -> list[str]:
    """Names of our engines whose facts are so, in the order of the table."""
    return [name for name in ENGINES if which(facts_of_ours(name))]
