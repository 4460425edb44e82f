"""From a recipe's words to a loaded environment: a class, or functions that are tools without one."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from rewards.api import Objective, Options, PluginError
from rewards.environments.api import MARK, EnvironmentOptions
from rewards.environments.members import Tool, has_of, own_name, plain_tool, reset_names, tools_of, trl_tools_of
from rewards.find import find, modules_beside, origin
from rewards.plugin import Parameter, Plugin, check_args, read_parameters


@dataclass(frozen=True, slots=True)
class EnvironmentSpec:
    """What the recipe says of one environment. JSON-able as it stands.

    use: a class, as file.py:Class or package.module:Class; tools: functions instead of one. args: of the class.
    signature: "trl" for a class written for TRL's environment_factory. python: another interpreter, whose packages the
    environment sees. name: None: the class's in snake_case, or "tools".

    Raises:
        PluginError: not exactly one of `use` and `tools`, or options that need a class without one.
    """

    use: str | None = None
    tools: tuple[str, ...] = ()
    args: Mapping[str, Any] = field(default_factory=dict)
    signature: Literal["align", "trl"] = "align"
    python: str | None = None
    name: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "tools", tuple(self.tools))
        if (self.use is None) == (not self.tools):
            raise PluginError(
                "an environment is a class or a list of tools",
                where=self.use,
                remedy="write either `use: file.py:Class` or `tools: [file.py:function, ...]`",
            )
        if self.tools and (self.args or self.signature != "align"):
            raise PluginError(
                "`args` and `signature` are of a class, and these are functions",
                where=self.tools[0],
                remedy="leave them out, or write a class that has the functions as methods",
            )

    @property
    def where(self) -> str:
        """What errors name as the place."""
        return self.use or self.tools[0]

    @property
    def own_name(self) -> str:
        """What the environment is called in a run."""
        return self.name or (own_name(self.use) if self.use else "tools")

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "tools": list(self.tools), "args": dict(self.args)}


@dataclass(frozen=True, slots=True)
class Loaded:
    """A class or functions, imported and described. kind: None where there are only functions.

    has: which of the members with a meaning the class has; resets: what its `reset` takes. source, sha256: its file and
    the hash of it; modules: hashes of those beside it that it imports, and of further files of tools, by name.
    """

    spec: EnvironmentSpec
    kind: type | None
    tools: Mapping[str, Tool]
    has: Mapping[str, bool]
    resets: tuple[str, ...]
    objectives: Mapping[str, Objective]
    parameters: tuple[Parameter, ...]
    version: str
    doc: str
    source: str | None
    sha256: str | None
    modules: Mapping[str, str]

    def make(self) -> Any:
        """The object of one episode; whatever the constructor raises. None where there are only functions."""
        return None if self.kind is None else self.kind(**self.spec.args)

    def describe(self) -> dict[str, Any]:
        """Everything that a check and the parent need to know, as JSON."""
        return {
            "name": self.spec.own_name,
            "signature": self.spec.signature,
            "tools": [tool.schema for tool in self.tools.values()],
            "objectives": {n: {"kind": o.kind, "range": o.range} for n, o in self.objectives.items()},
            "has": dict(self.has),
            "parameters": {p.name: p.describe() for p in self.parameters},
            "args": dict(self.spec.args),
            "doc": self.doc,
            "version": self.version,
            "source": self.source,
            "sha256": self.sha256,
            "modules": dict(self.modules),
        }


def load(spec: EnvironmentSpec, folder: str | Path) -> Loaded:
    """Import the environment's code and check its arguments. Runs user code: call it in a child process.

    folder: the recipe's; relative files and dotted modules start there.

    Raises:
        PluginError: not found (with the choices), fails to import, is no class, has a tool that cannot be described, or
            its arguments do not fit.
    """
    return _load_class(spec, spec.use, Path(folder)) if spec.use is not None else _load_tools(spec, Path(folder))


def _load_class(spec: EnvironmentSpec, use: str, folder: Path) -> Loaded:
    kind = _found(use, folder, "Class")
    if not inspect.isclass(kind):
        raise PluginError(
            f"an environment is a class, and this is a {type(kind).__name__}",
            where=use,
            remedy="name the class itself, and what it is made with under `args:`; functions go under `tools:`",
        )
    trl = spec.signature == "trl"
    if not trl and hasattr(kind, "get_reward") and not hasattr(kind, MARK):
        raise PluginError(
            "it has `get_reward`, as TRL's environments have",
            where=use,
            remedy="say `signature: trl` beside `use`, or decorate the class with @environment",
        )
    if trl and hasattr(kind, MARK):
        raise PluginError(
            "it is decorated with @environment, and `signature: trl` is for classes written for TRL",
            where=use,
            remedy="leave `signature: trl` out; or the decorator, where the class has `get_reward`",
        )
    if trl and not callable(getattr(kind, "reset", None)):
        raise PluginError("an environment for TRL has `reset`, and this has none", where=use, remedy="add it")
    if trl and callable(getattr(kind, "reward", None)) and not hasattr(kind, "get_reward"):
        raise PluginError(
            "it has `reward`, which would be a tool for the policy: an environment for TRL scores by `get_reward`",
            where=use,
            remedy="call it `get_reward`; or leave `signature: trl` out and decorate the class with @environment",
        )
    options: EnvironmentOptions = getattr(kind, MARK, EnvironmentOptions())
    tools = trl_tools_of(kind, use) if trl else tools_of(kind, use)
    has = has_of(kind, trl)
    if not tools and not has["respond"]:
        raise PluginError(
            "it has no tool and no `respond`: a policy cannot act in it",
            where=use,
            remedy="write a public method with annotations, or `respond(reply)`",
        )
    if options.objectives is not None and not has["reward"]:
        raise PluginError("it declares objectives and has no `reward`", where=use, remedy="write `def reward(self)`")
    default = {spec.own_name: Objective()} if has["reward"] else {}
    source, digest = origin(kind)
    return Loaded(
        spec=spec,
        kind=kind,
        tools=tools,
        has=has,
        resets=() if trl else reset_names(kind, use),
        objectives=default if options.objectives is None else dict(options.objectives),
        parameters=_check_made(kind, spec, use, options),
        version=options.version,
        doc=(inspect.getdoc(kind) or "").strip() if kind.__doc__ else "",
        source=source,
        sha256=digest,
        modules=modules_beside(source, folder, kind.__module__.partition(".")[0]),
    )


def _load_tools(spec: EnvironmentSpec, folder: Path) -> Loaded:
    functions: dict[str, Any] = {}
    modules: dict[str, Any] = {}
    for use in spec.tools:  # a file is executed once, so that functions of one file share what it holds
        place, _, name = use.rpartition(":")
        shared = modules.get(place)
        functions[use] = getattr(shared, name) if hasattr(shared, name) else _found(use, folder, "function")
        modules.setdefault(place, inspect.getmodule(functions[use]))
    tools: dict[str, Tool] = {}
    for use, function in functions.items():
        tool = plain_tool(function, use)
        if tool.name in tools:
            raise PluginError(f"two tools are called {tool.name!r}", where=use, remedy="rename one of the functions")
        tools[tool.name] = tool
    source, digest = origin(functions[spec.tools[0]])
    beside = modules_beside(source, folder, "")
    for function in functions.values():
        file, _ = origin(function)
        if file is not None and file != source:
            beside[Path(file).stem] = hashlib.sha256(Path(file).read_bytes()).hexdigest()
    return Loaded(
        spec=spec, kind=None, tools=tools, has=dict.fromkeys(has_of(object, False), False), resets=(), objectives={},
        parameters=(), version="1", doc="", source=source, sha256=digest, modules=beside,
    )  # fmt: skip


def _found(use: str, folder: Path, what: str) -> Any:
    """As `rewards.find.find`, for what is written as PLACE:NAME."""
    place, _, name = use.rpartition(":")
    if not place or not name:
        raise PluginError(
            f"{use!r} names no {what.lower()}",
            where=use,
            remedy=f"write it as file.py:{what} or package.module:{what}",
        )
    return find(use, folder)


def _check_made(kind: type, spec: EnvironmentSpec, use: str, options: EnvironmentOptions) -> tuple[Parameter, ...]:
    """The constructor's parameters. PluginError where `args` do not fit them, as a reward's."""
    made = kind.__init__ if kind.__init__ is not object.__init__ else None  # type: ignore[misc]
    parameters, open_args = read_parameters(made, skip=("self",)) if made else ((), False)
    plugin = Plugin(
        name=spec.own_name, call=kind, options=Options(validate=options.validate), args=spec.args,
        parameters=parameters, objectives={}, is_async=False, open_args=open_args,
    )  # fmt: skip
    check_args(plugin, use)
    return parameters
