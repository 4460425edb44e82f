"""What an environment's class has: members with a meaning, and tools, which all other public methods are."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from rewards.api import PluginError
from rewards.environments.schemas import Schema, tool_schema

MEMBERS = ("reset", "respond", "reward", "done", "state", "close")
_GIVEN = {"respond": "the reply", "reward": "", "state": "", "close": ""}
RESET = ("row", "seed", "episode_seed")


@dataclass(frozen=True, slots=True)
class Tool:
    """schema: as chat templates take it. function: of no class, None for a method. is_async: it runs beside others."""

    name: str
    schema: Schema
    function: Callable[..., Any] | None
    is_async: bool

    def of(self, episode: Any) -> Callable[..., Any]:
        """What is called, for the object of an episode."""
        found: Callable[..., Any] = getattr(episode, self.name) if self.function is None else self.function
        return found


def own_name(use: str) -> str:
    """`file.py:GuessNumber` -> guess_number."""
    name = use.rpartition(":")[2].rpartition(".")[2]
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()


def tools_of(kind: type, where: str) -> dict[str, Tool]:
    """The public methods that are no members, in the order in which they are written, those of base classes first.

    Raises:
        PluginError: a member that should be a method is none, or a tool cannot be described.
    """
    for name in MEMBERS:
        member = inspect.getattr_static(kind, name, None)
        if member is not None and name != "done" and _function(member) is None:
            raise PluginError(
                f"`{name}` of an environment is a method, not {type(member).__name__}",
                where=where,
                remedy=f"write `def {name}(self, ...)`, or give the attribute another name",
            )
        if member is not None and name in _GIVEN:
            _require_called(member, name, where)
    names = dict.fromkeys(name for base in reversed(kind.__mro__[:-1]) for name in vars(base))
    return {name: tool for name in names if (tool := _tool(kind, name, MEMBERS, where)) is not None}


def tool_schemas(kind: type) -> list[Schema]:
    """The tools of an environment's class as chat templates take them: what a row's `tools` are, for traces that an SFT
    stage learns from. Raises PluginError where one cannot be described."""
    return [tool.schema for tool in tools_of(kind, kind.__name__).values()]


def trl_tools_of(kind: type, where: str) -> dict[str, Tool]:
    """As TRL's trainer lists them: all public functions of the class but `reset`, `get_reward`, by name."""
    names = [name for name, _ in inspect.getmembers(kind, predicate=inspect.isfunction)]
    found = {name: _tool(kind, name, ("reset", "get_reward"), where) for name in names}
    return {name: tool for name, tool in found.items() if tool is not None}


def plain_tool(function: Any, where: str) -> Tool:
    """A function that is a tool. PluginError where it is none, or cannot be described."""
    if inspect.isclass(function) or not callable(function):
        raise PluginError(
            f"a tool is a function, not {function!r}",
            where=where,
            remedy="name functions under `tools:`, a class of several under `use:`",
        )
    name = getattr(function, "__name__", own_name(where))
    return Tool(name, tool_schema(function, name, where), function, inspect.iscoroutinefunction(function))


def _function(member: Any) -> Callable[..., Any] | None:
    """What stands behind a method, of whichever kind; None of an attribute or a property."""
    if isinstance(member, staticmethod | classmethod):
        return member.__func__
    return member if inspect.isroutine(member) else None


def _require_called(member: Any, name: str, where: str) -> None:
    """Raises PluginError where a member cannot be called with what it is given."""
    function, given = _function(member), _GIVEN[name]
    if function is None or inspect.isbuiltin(function):
        return
    own = () if isinstance(member, staticmethod) else ("self",)
    try:
        inspect.signature(function).bind(*own, *([given] if given else []))
    except TypeError as error:
        wanted = ", ".join([*own, "reply"] if given else own)
        raise PluginError(
            f"`{name}` is given {given or 'nothing'}, and cannot be called so: {error}",
            where=where,
            remedy=f"write `def {name}({wanted})`",
        ) from error


def _tool(kind: type, name: str, but: tuple[str, ...], where: str) -> Tool | None:
    member = inspect.getattr_static(kind, name, None)
    function = _function(member)
    if name.startswith("_") or name in but or function is None or inspect.isbuiltin(function):
        return None
    place = f"{where}.{name}"
    bound = function if isinstance(member, staticmethod) else _without_self(function, place)
    return Tool(name, tool_schema(bound, name, place), None, inspect.iscoroutinefunction(function))


def _without_self(function: Callable[..., Any], place: str) -> Callable[..., Any]:
    """The method bound to nothing in particular: its signature without the first parameter."""
    if not inspect.signature(function).parameters:
        raise PluginError("a method has `self` as its first parameter", where=place, remedy="add it, or @staticmethod")
    bound: Callable[..., Any] = function.__get__(object())
    return bound


def has_of(kind: type, trl: bool) -> dict[str, bool]:
    """Which members the class has. `done` may also be set by an object; TRL's classes have their own `get_reward`, and
    their public attributes are their state, as reward functions for TRL read those."""
    if trl:
        return {name: name in ("reset", "state") for name in MEMBERS} | {
            "reward": callable(getattr(kind, "get_reward", None))
        }
    annotated = {name for base in kind.__mro__ for name in vars(base).get("__annotations__", ())}
    return {name: inspect.getattr_static(kind, name, None) is not None or name in annotated for name in MEMBERS}


def reset_names(kind: type, where: str) -> tuple[str, ...]:
    """Which of row, seed and episode_seed its `reset` takes. PluginError where it needs anything else."""
    reset = inspect.getattr_static(kind, "reset", None)
    function = _function(reset)
    if function is None:
        return ()
    parameters = list(inspect.signature(function).parameters.values())[not isinstance(reset, staticmethod) :]
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return RESET
    names = tuple(p.name for p in parameters if p.name in RESET and p.kind is not p.POSITIONAL_ONLY)
    strange = [
        p.name for p in parameters if p.name not in names and p.default is p.empty and p.kind != p.VAR_POSITIONAL
    ]
    if strange:
        raise PluginError(
            f"`reset` needs {strange[0]!r}, which it is not given",
            where=where,
            remedy=f"its parameters may be {', '.join(RESET)}; for a class of TRL add `signature: trl`",
        )
    return names


def taken(function: Callable[..., Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Of what is given by name, what the function takes."""
    parameters = inspect.signature(function).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return dict(given)
    return {p.name: given[p.name] for p in parameters if p.name in given}
