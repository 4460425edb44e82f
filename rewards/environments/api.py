"""`@environment`: marks the class of an environment. It stays a plain class that can be made and called in a test."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar, overload

from rewards.api import Objective, PluginError


@dataclass(frozen=True, slots=True)
class EnvironmentOptions:
    """What the decorator says; see `environment`. objectives None: one, named as the environment, where the class has
    `reward`."""

    objectives: Mapping[str, Objective] | None = None
    version: str = "1"
    validate: Callable[..., None] | None = None

    def __post_init__(self) -> None:
        if self.objectives is not None and not self.objectives:
            raise PluginError("objectives is empty: name at least one")
        for name, one in (self.objectives or {}).items():
            if not isinstance(one, Objective):
                raise PluginError(
                    f"the objective {name!r} is {one!r}", remedy="write an Objective, as Objective(range=(0, 1))"
                )


MARK = "__environment__"
"""Attribute of a marked class: its EnvironmentOptions."""

C = TypeVar("C", bound=type)


@overload
def environment(cls: C, /) -> C: ...
@overload
def environment(
    *,
    objectives: Mapping[str, Objective] | None = ...,
    version: str = ...,
    validate: Callable[..., None] | None = ...,
) -> Callable[[C], C]: ...


def environment(
    cls: Any = None,
    /,
    *,
    objectives: Mapping[str, Objective] | None = None,
    version: str = "1",
    validate: Callable[..., None] | None = None,
) -> Any:
    """Mark a class as an environment: one object is one episode, its public methods are the tools.

    Members with a meaning, all optional, each a plain method or a coroutine: `reset(row, seed, episode_seed)` (takes
    those that it names; text or messages that it returns are added to the prompt), `respond(reply)` (the next user turn
    where a reply calls no tool; None ends), `reward()`, `done` (an attribute, a property or a method), `state()`,
    `close()`. Every other public method is a tool: its parameters have annotations.

    Args:
        objectives: name -> Objective of what `reward` gives. Default: one objective with the environment's name.
        version: change it when the meaning of the environment changes.
        validate: receives those of the environment's arguments that it has a parameter for, when a recipe is checked;
            raises ValueError where they make no sense.

    Raises:
        PluginError: it stands above something that is no class, or an option has an impossible value.
    """
    settled = EnvironmentOptions(objectives, version, validate)

    def mark(kind: Any) -> Any:
        if not inspect.isclass(kind):
            raise PluginError(
                f"@environment stands above a class, {getattr(kind, '__name__', kind)!r} is none",
                remedy="write a class with the tools as methods, or name plain functions under `tools:`",
            )
        setattr(kind, MARK, settled)
        return kind

    return mark if cls is None else mark(cls)
