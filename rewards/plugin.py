"""A loaded plugin: its function, options, arguments and objectives, and how it is called."""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from rewards.api import Context, Objective, Options, PluginError, Sample, Scope

Signature = Literal["align", "trl", "swift"]


@dataclass(frozen=True, slots=True)
class PluginSpec:
    """What the recipe says of one plugin. `options` (those in OVERRIDES) override the decorator's. JSON-able as it
    stands."""

    use: str
    name: str | None = None
    args: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    signature: Signature = "align"

    @property
    def own_name(self) -> str:
        """What the plugin is called where `as:` does not say: the last part of `use`."""
        return self.use.rpartition(":")[2].rpartition(".")[2]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Parameter:
    """One argument of a plugin, as `args:` may set it."""

    name: str
    required: bool
    default: Any
    hint: Any

    def describe(self) -> dict[str, Any]:
        described: dict[str, Any] = {"required": self.required, "type": _hint_name(self.hint)}
        if not self.required:
            described["default"] = self.default if _is_plain(self.default) else repr(self.default)
        return described


@dataclass(frozen=True, slots=True)
class Plugin:
    """`call(samples, ctx, **args)` returns one result per sample (awaitable if `is_async`).

    open_args: it takes any argument by name. source, sha256: its file and the hash of it; modules: hashes of those
    beside it that it imports, by name. columns: of the rows, those that it cannot be called without.
    """

    name: str
    call: Callable[..., Any]
    options: Options
    args: Mapping[str, Any]
    parameters: tuple[Parameter, ...]
    objectives: Mapping[str, Objective]
    is_async: bool
    open_args: bool = False
    source: str | None = None
    sha256: str | None = None
    doc: str = ""
    modules: Mapping[str, str] = field(default_factory=dict)
    columns: tuple[str, ...] = ()

    @property
    def scope(self) -> Scope:
        """What a call holds, and what a failed one may be cut into; see `rewards.reward`."""
        return self.options.scope or "sample"

    def run(self, samples: Sequence[Sample], ctx: Context) -> Any:
        return self.call(samples, ctx, **self.args)

    def gold(self, row: Mapping[str, Any]) -> str | None:
        """The completion that must score best on a row; None where the row, or the plugin, has none."""
        if self.options.gold is None:
            return None
        answer = self.options.gold(row, **self.named(self.options.gold))
        if answer is not None and not isinstance(answer, str):
            raise TypeError(f"gold gave a {type(answer).__name__}, where a text or None is needed")
        return answer

    def prepare(self) -> None:
        """Once in the plugin's own process, before its first sample. Raises PluginError where it cannot work here."""
        if self.options.prepare is not None:
            self.options.prepare(**self.named(self.options.prepare))

    def named(self, function: Callable[..., Any]) -> dict[str, Any]:
        """The arguments whose names are among the function's parameters; all of them where it takes any name."""
        wanted, open_args = read_parameters(function, skip=())
        names = {p.name for p in wanted}
        return {k: v for k, v in self.args.items() if open_args or k in names}

    def describe(self) -> dict[str, Any]:
        """Everything `align check` and the pool need to know, as JSON."""
        options = {f: getattr(self.options, f) for f in SHOWN_OPTIONS}
        return {
            "name": self.name,
            "doc": self.doc,
            "objectives": {n: {"kind": o.kind, "range": o.range} for n, o in self.objectives.items()},
            "scope": self.scope,
            "options": options,
            "parameters": {p.name: p.describe() for p in self.parameters},
            "open_args": self.open_args,
            "args": dict(self.args),
            "is_async": self.is_async,
            "gold": self.options.gold is not None,
            "version": self.options.version,
            "source": self.source,
            "sha256": self.sha256,
            "modules": dict(self.modules),
            "columns": list(self.columns),
        }


OVERRIDES = (
    "scope", "text", "batch", "concurrency", "timeout_s", "retries", "on_error", "max_error_rate", "processes", "rate",
    "cache",
)  # fmt: skip
SHOWN_OPTIONS = (*OVERRIDES, "isolation", "memory_mb")


def make_plugin(
    function: Callable[..., Any],
    spec: PluginSpec,
    *,
    call: Callable[..., Any] | None = None,
    parameters: tuple[Parameter, ...] | None = None,
    open_args: bool = False,
    is_async: bool | None = None,
    source: str | None = None,
    sha256: str | None = None,
    check: bool = True,
) -> Plugin:
    """A Plugin from a decorated or plain function; signature adapters give their own `call` and `parameters`.

    Raises:
        PluginError: unknown or missing argument, wrong type, or the plugin's `validate` refused the values.
    """
    options = _resolve_options(getattr(function, "__reward__", Options()), spec)
    if options.scope is None and spec.signature != "align":  # such trainers call with whole groups, and many compare
        options = replace(options, scope="batch")
    if call is None:
        call, parameters, open_args = _own_signature(function, spec.use)
    plugin = Plugin(
        name=spec.name or spec.own_name,
        call=call,
        options=options,
        args=dict(spec.args),
        parameters=parameters or (),
        objectives={spec.own_name: Objective()} if options.objectives is None else dict(options.objectives),
        is_async=inspect.iscoroutinefunction(function) if is_async is None else is_async,
        open_args=open_args,
        source=source,
        sha256=sha256,
        doc=(inspect.getdoc(function) or "").strip(),
    )
    if check:
        check_args(plugin, spec.use)
    if options.cache and sha256 is None:
        raise PluginError(
            f"{plugin.name} says `cache`, and its source is not known: a changed score would not be noticed",
            where=spec.use,
            remedy="define the function in a file, or leave `cache` out",
        )
    return plugin


def _resolve_options(options: Options, spec: PluginSpec) -> Options:
    unknown = sorted(set(spec.options) - set(OVERRIDES))
    if unknown:
        raise PluginError(
            f"{unknown[0]!r} is no option that a recipe can set", where=spec.use, remedy=f"use {', '.join(OVERRIDES)}"
        )
    return replace(options, **{k: v for k, v in spec.options.items() if v is not None})


_THEIRS = {"verl": {"solution_str", "ground_truth"}, "OpenRLHF": {"queries", "prompts", "labels"}}


def _own_signature(function: Callable[..., Any], where: str) -> tuple[Callable[..., Any], tuple[Parameter, ...], bool]:
    """How `f(samples, [ctx,] **args)` is called, and which arguments it takes."""
    found = list(inspect.signature(function).parameters.values())
    if not found or found[0].kind not in (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD):
        raise PluginError(
            "a reward function's first parameter receives the samples, and this one has none",
            where=where,
            remedy="write it as f(samples) or f(samples, ctx, *, option=default)",
        )
    names = {p.name for p in found}
    peer = next((peer for peer, theirs in _THEIRS.items() if theirs <= names), None)
    if not hasattr(function, "__reward__") and peer is not None:
        theirs = ", ".join(p.name for p in found)
        raise PluginError(
            f"its parameters ({theirs}) are those of {peer}'s reward functions; here a reward takes samples",
            where=where,
            remedy="write one that calls it: `@reward`, `def mine(samples): return [theirs(..., s.completion, "
            's.row["ground_truth"]) for s in samples]`',
        )
    if not hasattr(function, "__reward__") and "completions" in names:
        raise PluginError(
            "its parameter `completions` is that of TRL's and ms-swift's reward functions; here a reward takes samples",
            where=where,
            remedy="say `signature: trl` or `signature: swift` beside `use` (`--signature` of `align rewards try`), or "
            "decorate a function of samples with @reward",
        )
    wants_ctx = any(p.name == "ctx" for p in found[1:])
    parameters, open_args = read_parameters(function, skip=(found[0].name, "ctx"))

    def call(samples: Sequence[Sample], ctx: Context, **args: Any) -> Any:
        return function(samples, ctx=ctx, **args) if wants_ctx else function(samples, **args)

    return call, parameters, open_args


def read_parameters(function: Callable[..., Any], skip: Sequence[str]) -> tuple[tuple[Parameter, ...], bool]:
    """The named parameters of a function, and whether it takes any name (`**kwargs`)."""
    hints = _hints(function)
    parameters = []
    open_args = False
    for p in inspect.signature(function).parameters.values():
        if p.kind is inspect.Parameter.VAR_KEYWORD:
            open_args = True
        elif p.name not in skip and p.kind in (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD):
            required = p.default is inspect.Parameter.empty
            parameters.append(Parameter(p.name, required, None if required else p.default, hints.get(p.name, Any)))
    return tuple(parameters), open_args


def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    try:
        return typing.get_type_hints(function)
    except (
        NameError,
        TypeError,
        AttributeError,
    ):  # annotations under TYPE_CHECKING: types stay unchecked, names do not
        return {}


def check_args(plugin: Plugin, where: str) -> None:
    """Every argument is known and fits its annotation, none is missing; PluginError otherwise."""
    known = {p.name: p for p in plugin.parameters}
    choices = ", ".join(known) or "none"
    for name, value in plugin.args.items():
        parameter = known.get(name)
        if parameter is None:
            if not plugin.open_args:
                raise PluginError(
                    f"{plugin.name} has no argument {name!r}", where=where, remedy=f"its arguments: {choices}"
                )
        elif not fits(value, parameter.hint):
            expected = _hint_name(parameter.hint)
            raise PluginError(
                f"argument {name!r} of {plugin.name} is {value!r}",
                where=where,
                remedy=f"give a value of type {expected}",
            )
    missing = [p.name for p in plugin.parameters if p.required and p.name not in plugin.args]
    if missing:
        raise PluginError(
            f"{plugin.name} needs the argument {missing[0]!r}",
            where=where,
            remedy=f"add it to `args:`; its arguments: {choices}",
        )
    if plugin.options.validate is not None:
        try:
            plugin.options.validate(**plugin.named(plugin.options.validate))
        except ValueError as error:
            raise PluginError(f"{plugin.name} refuses its arguments: {error}", where=where) from error
        except PluginError:
            raise
        except Exception as error:  # the user's code may raise anything
            said = f"{type(error).__name__}: {error}"
            raise PluginError(f"`validate` of {plugin.name} failed: {said}", where=where) from error


def fits(value: Any, hint: Any) -> bool:
    """Whether a YAML value can stand where `hint` is annotated; hints that are not plain types accept everything."""
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, part) for part in typing.get_args(hint))
    if origin is Literal:
        return value in typing.get_args(hint)
    if hint is None or hint is type(None):
        return value is None
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if origin in (list, Sequence, typing.Sequence):
        items = typing.get_args(hint)
        return isinstance(value, list | tuple) and all(fits(v, items[0]) for v in value if items)
    plain = origin or hint
    if plain in (str, bool, list, dict, tuple):
        return isinstance(value, plain)
    return True


def _hint_name(hint: Any) -> str:
    return "any" if hint is Any else getattr(hint, "__name__", str(hint)) if isinstance(hint, type) else str(hint)


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, str | int | float | bool | list | dict)
