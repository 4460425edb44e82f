"""From the `use:` of a recipe to a loaded plugin: ours by bare name, entry points, pkg.mod:attr or file.py:attr."""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.metadata
import importlib.util
import inspect
import os
import sys
import sysconfig
import traceback
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from os.path import expanduser
from pathlib import Path
from types import ModuleType
from typing import Any

from rewards.api import PluginError
from rewards.plugin import Plugin, PluginSpec, make_plugin
from rewards.signatures import adapt

ENTRY_POINTS = "align.rewards"
_OURS = ("rewards", "align", "rollout", "__main__")
_HERE = os.path.dirname(__file__)
_BUILTINS = Path(__file__).parent / "builtins"


def builtin_names() -> tuple[str, ...]:
    """Our plugins; each is a file of that name with a function of that name."""
    return tuple(sorted(p.stem for p in _BUILTINS.glob("*.py") if not p.stem.startswith("_")))


def _entry_point(name: str) -> importlib.metadata.EntryPoint | None:
    """The plugin that an installed package offers under this name. PluginError where two offer different ones."""
    points = {point.value: point for point in importlib.metadata.entry_points(group=ENTRY_POINTS, name=name)}
    if len(points) > 1:
        each = " and ".join(f"{p.value} of {p.dist.name if p.dist else '?'}" for p in points.values())
        raise PluginError(
            f"installed packages offer two rewards called {name!r}: {each}",
            where=name,
            remedy="write one of them as package.module:function",
        )
    return next(iter(points.values()), None)


def installed() -> dict[str, importlib.metadata.EntryPoint]:
    """Plugins of other packages, by the name of their entry point."""
    return {p.name: p for p in importlib.metadata.entry_points(group=ENTRY_POINTS)}


def load(spec: PluginSpec, folder: str | Path, *, check: bool = True) -> Plugin:
    """Import the plugin's code and check its arguments. Runs user code: call it in a child process.

    Args:
        spec: what the recipe says. folder: the recipe's folder; relative files and dotted modules start there.
        check: False to learn what it offers, where its arguments are not known yet.

    Raises:
        PluginError: not found (with the choices), fails to import, is not callable, or its arguments do not fit.
    """
    function = find(spec.use, Path(folder))
    source, digest = origin(function)
    modules = modules_beside(source, Path(folder), str(_written(function).__module__).partition(".")[0])
    if spec.signature != "align":
        return replace(adapt(function, spec, source=source, sha256=digest), modules=modules)
    if inspect.isasyncgenfunction(function):
        raise PluginError(
            "an `async def` that yields cannot be awaited",
            where=spec.use,
            remedy="gather the scores in a list, and return it",
        )
    if inspect.isclass(function) or not callable(function):
        raise PluginError(
            f"a reward is a function, not {function!r}",
            where=spec.use,
            remedy="write f(samples) -> list of scores; for ms-swift's reward classes add `signature: swift`",
        )
    return replace(make_plugin(function, spec, source=source, sha256=digest, check=check), modules=modules)


def find(use: str, folder: Path) -> Any:
    """The object that `use` names."""
    if use.endswith(".py"):
        offered = _functions(_module_from_file(use, folder, use))
        raise PluginError(
            "a reward is a function, and this names a whole file",
            where=use,
            remedy=f"write {use}:NAME; functions there: {offered or 'none'}",
        )
    if ":" not in use:
        return _by_name(use)
    place, _, attribute = use.rpartition(":")
    module = _module_from_file(place, folder, use) if place.endswith(".py") else _module(place, folder, use)
    found: Any = module
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise PluginError(
                f"{place} has no {attribute!r}", where=use, remedy=f"functions there: {_functions(module) or 'none'}"
            )
        found = getattr(found, part)
    return found


def _by_name(use: str) -> Any:
    ours = builtin_names()
    if use in ours:
        return getattr(importlib.import_module(f"rewards.builtins.{use}"), use)
    if (point := _entry_point(use)) is not None:
        return _guard(point.load, f"{use}, the entry point {point.value} of {point.dist.name if point.dist else '?'}")
    points = installed()
    near = difflib.get_close_matches(use, [*ours, *points], n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    more = f"; installed: {', '.join(sorted(points))}" if points else ""
    raise PluginError(
        f"there is no reward called {use!r}",
        where=use,
        remedy=f"{hint}ours: {', '.join(ours)}{more}; or your own as file.py:function or package.module:function",
    )


def _module(name: str, folder: Path, use: str) -> ModuleType:
    append_path(folder)
    module: ModuleType = _guard(lambda: importlib.import_module(name), use)
    return module


def _module_from_file(place: str, folder: Path, use: str) -> ModuleType:
    """A file is loaded under a name of its own, so that a user's rewards.py neither hides nor becomes our package."""
    path = Path(expanduser(place))
    path = (path if path.is_absolute() else folder / path).resolve()
    if not path.is_file():
        remedy = "paths in a recipe start at its folder, in an override at the working directory"
        raise PluginError(f"there is no file {path}", where=use, remedy=remedy)
    append_path(path.parent)
    name = f"reward_plugin_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # before execution: dataclasses look their module up there
    loader = spec.loader
    _guard(lambda: loader.exec_module(module), use)
    return module


def append_path(folder: Path) -> None:
    """Sibling imports work, and nothing in the folder can hide an installed package: it goes last."""
    if str(folder) not in sys.path:
        sys.path.append(str(folder))


def _guard(load: Callable[[], Any], use: str) -> Any:
    try:
        return load()
    except (Exception, SystemExit) as error:  # the user's import may raise anything
        raise PluginError(
            f"importing it failed: {type(error).__name__}: {error}", where=use, remedy=_import_remedy(error)
        ) from error


def _import_remedy(error: BaseException) -> str:
    place = _place_of(error)
    if isinstance(error, ModuleNotFoundError):
        at = f" (imported at {place})" if place else ""
        return f"install {error.name!r}, or put it beside the plugin{at}"
    if isinstance(error, SystemExit):
        return f"keep what only a script does under `if __name__ == '__main__':` (at {place or 'the plugin'})"
    return f"look at {place or 'the plugin'}"


def _place_of(error: BaseException) -> str | None:
    """`file:line` of the innermost line of the user's, else of an installed package; None where there is neither."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno or 1}"
    ours = ("<", _HERE + os.sep, sysconfig.get_path("stdlib") + os.sep)
    kept = (sysconfig.get_path("purelib") + os.sep, sysconfig.get_path("platlib") + os.sep)
    frames = traceback.extract_tb(error.__traceback__)
    places = [
        (f.filename.startswith(kept), f"{f.filename}:{f.lineno}")
        for f in frames
        if f.filename.startswith(kept) or not f.filename.startswith(ours)
    ]
    return next((place for is_kept in (False, True) for kind, place in reversed(places) if kind == is_kept), None)


def _functions(module: ModuleType) -> str:
    own = [n for n, v in vars(module).items() if callable(v) and getattr(v, "__module__", None) == module.__name__]
    return ", ".join(own)


def _written(function: Any) -> Any:
    """The function or class that somebody wrote, of what was made of it: a partial, a method, an instance."""
    while isinstance(function, partial) or inspect.ismethod(function):
        function = function.func if isinstance(function, partial) else function.__func__
    if inspect.isfunction(function):
        return inspect.unwrap(function)
    return function if inspect.isclass(function) or inspect.isbuiltin(function) else type(function)


def origin(function: Any) -> tuple[str | None, str | None]:
    """The file that defines a plugin and the SHA-256 of its bytes."""
    try:
        file = inspect.getsourcefile(_written(function))
    except TypeError:  # a builtin or C function has no source
        file = None
    if file is None or not Path(file).is_file():
        return None, None
    return file, hashlib.sha256(Path(file).read_bytes()).hexdigest()


def modules_beside(source: str | None, folder: Path, package: str) -> dict[str, str]:
    """SHA-256 of every module that was imported from the plugin's folder or the recipe's, or of its own package where
    that is installed, its own file aside, by its name. One that is imported only when a function runs is not among
    them."""
    roots = {os.path.abspath(folder)} | ({os.path.dirname(os.path.abspath(source))} if source else set())
    found = {}
    for name, module in sorted(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if not file or not file.endswith(".py") or name.partition(".")[0] in _OURS or file == source:
            continue
        path = os.path.abspath(file)
        installed = "site-packages" in path or "dist-packages" in path
        beside = not installed and any(path.startswith(f"{root}{os.sep}") for root in roots)
        own = name.partition(".")[0] == package and package not in sys.stdlib_module_names
        if (beside or own) and os.path.isfile(path):
            found[name] = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    return found
