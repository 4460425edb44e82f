"""From a name in a recipe to code: ours by bare name, an entry point, or the user's `pkg.mod:attr` / `file.py:attr`.

`resolve` imports what it finds, so it is for code that this process will run anyway. What a user's file merely
*offers* is asked of a child process (`describe_in_child`), which is killed at a limit: a plugin that hangs, exits or
prints while it is imported costs `align check` a message and nothing else.
"""

from __future__ import annotations

import ast
import contextlib
import difflib
import hashlib
import importlib
import importlib.metadata
import importlib.util
import inspect
import json
import os
import pkgutil
import re
import signal
import subprocess
import sys
import sysconfig
import traceback
from collections.abc import Iterator, Sequence
from os.path import expanduser
from pathlib import Path
from typing import Any

import align
from align.errors import AlignError, PluginError

DESCRIBE_LIMIT_S = 30.0
REWARDS = {"reward_model": "align.actors.reward_model:reward_model"}
"""Rewards by bare name that compute with torch, which the package `rewards` does not know."""


def resolve(
    name: str, *, group: str, package: str | None = None, hidden: Sequence[str] = (), folder: Path | None = None
) -> Any:
    """The object that `name` stands for.

    Args:
        name: a module of `package`, an entry point of `group`, `pkg.mod:attr`, `file.py:attr` or `file.py` (a module).
        group: entry-point group, such as "align.losses"; its last word names the kind of plugin in messages.
        package: our package with one module per plugin; `hidden` are modules of it that are none.
        folder: the recipe's; relative files and dotted modules are found from there.

    Raises PluginError: not found (with the choices), no such attribute, or importing it failed.
    """
    if name.endswith(".py"):
        return _from_file(name, folder, name)
    if ":" in name:
        return _attribute(name, folder)
    ours = builtin_names(package, hidden) if package else ()
    if name in ours:
        return importlib.import_module(f"{package}.{name}")
    if (point := _entry_point(name, group)) is not None:
        return _imported(point.load, f"{name}, the entry point {point.value} of {_owner(point)}")
    raise _unknown(name, group, ours, sorted({each.name for each in importlib.metadata.entry_points(group=group)}))


def _entry_point(name: str, group: str) -> importlib.metadata.EntryPoint | None:
    """What an installed package offers under this name. PluginError where two offer different things."""
    points = {point.value: point for point in importlib.metadata.entry_points(group=group, name=name)}
    if len(points) > 1:
        each = " and ".join(f"{value} of {_owner(point)}" for value, point in points.items())
        remedy = "write one of them as package.module:name"
        raise PluginError(f"installed packages offer two things called {name!r}: {each}", where=name, remedy=remedy)
    return next(iter(points.values()), None)


def _owner(point: importlib.metadata.EntryPoint) -> str:
    return str(point.dist.name) if point.dist else "a package"


def entry_point_target(name: str, group: str, ours: Sequence[str]) -> str:
    """`package.module:attr` of an entry point, attr empty where it is the module; any other name as it is."""
    point = _entry_point(name, group) if name not in ours else None
    return name if point is None else f"{point.module}:{point.attr}"


def shadowed(name: str, group: str, ours: Sequence[str]) -> str | None:
    """What is to be said of a name of ours that an installed package offers too."""
    points = list(importlib.metadata.entry_points(group=group, name=name)) if name in ours else []
    if not points:
        return None
    return f"{name} is ours; for that of {_owner(points[0])} write its module, {points[0].value}"


def known_module(name: str, package: str, kind: str) -> str:
    """`name`; ValueError where it is no module of our `package`, one for each `kind` of thing."""
    ours = builtin_names(package)
    if name not in ours:
        raise ValueError(f"{name!r} is no {kind}: use {' or '.join(ours)}")
    return name


def of_ours(path: str) -> Any:
    """What a table of ours names as `package.module:name`, or a whole `package.module`."""
    module, colon, name = path.partition(":")
    found = importlib.import_module(module)
    return getattr(found, name) if colon else found


def builtin_names(package: str, hidden: Sequence[str] = ()) -> tuple[str, ...]:
    """Modules of one of our packages, without those that are `hidden` or private."""
    path = importlib.import_module(package).__path__
    return tuple(sorted(m.name for m in pkgutil.iter_modules(path) if m.name not in hidden and m.name[0] != "_"))


def _unknown(name: str, group: str, ours: Sequence[str], installed: Sequence[str]) -> PluginError:
    kind = re.sub(r"(ss)?e?s$", r"\1", group.rpartition(".")[2])  # losses, rewards: what one of them is called
    near = difflib.get_close_matches(name, [*ours, *installed], n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    more = f"; installed: {', '.join(installed)}" if installed else ""
    remedy = f"{hint}ours: {', '.join(ours)}{more}; or your own as file.py:name or package.module:name"
    return PluginError(f"there is no {kind} named {name!r}", remedy=remedy)


def _attribute(name: str, folder: Path | None) -> Any:
    place, _, attribute = name.rpartition(":")
    if place.endswith(".py"):
        module = _from_file(place, folder, name)
    else:
        _append_to_path(folder)
        module = _imported(lambda: importlib.import_module(place), name)
    found = module
    for part in attribute.split("."):
        if not hasattr(found, part):
            offered = ", ".join(k for k in vars(module) if not k.startswith("_")) or "none"
            raise PluginError(f"{place} has no {attribute!r}", where=name, remedy=f"names there: {offered}")
        found = getattr(found, part)
    return found


def _from_file(place: str, folder: Path | None, name: str) -> Any:
    """A file under a module name of its own, so that it can neither hide nor become one of our packages."""
    path = Path(expanduser(place))
    path = (path if folder is None or path.is_absolute() else folder / path).resolve()
    if not path.is_file():
        remedy = "paths in a recipe start at its folder, in an override at the working directory"
        raise PluginError(f"there is no file {path}", where=name, remedy=remedy)
    alias = f"align_plugin_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    if alias in sys.modules:
        return sys.modules[alias]
    _append_to_path(path.parent)
    _refuse_twins(path, name)
    spec = importlib.util.spec_from_file_location(alias, path)
    assert spec is not None and spec.loader is not None
    module, loader = importlib.util.module_from_spec(spec), spec.loader
    sys.modules[alias] = module  # before execution: dataclasses look their module up there
    try:
        _imported(lambda: loader.exec_module(module), name)
    except PluginError:
        del sys.modules[alias]
        raise
    return module


def _append_to_path(folder: Path | None) -> None:
    """Sibling imports work, and nothing beside the recipe can hide an installed package: its folder goes last."""
    if folder is not None and str(folder) not in sys.path:
        sys.path.append(str(folder))
        _APPENDED.append(folder)


_APPENDED: list[Path] = []


def _refuse_twins(path: Path, name: str) -> None:
    """Of two modules with one name, each beside a plugin, Python would give both plugins the first, without a word."""
    with contextlib.suppress(SyntaxError, ValueError, RecursionError):  # whoever imports it says so
        for node in ast.walk(ast.parse(path.read_bytes())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module and not node.level else []
            for module in {each.partition(".")[0] for each in names}:
                own = [path.parent / f"{module}.py", path.parent / module]
                others = [place / one.name for place in _APPENDED if place != path.parent for one in own]
                loaded = getattr(sys.modules.get(module), "__file__", None)
                twin = next((o for o in others if loaded and o in (Path(loaded), Path(loaded).parent)), None)
                if twin is not None and any(one.exists() for one in own):
                    raise PluginError(
                        f"it imports {module!r}, which stands beside it, and {twin} has that name in this process",
                        where=name,
                        remedy="rename one of the two, or keep the plugins in one folder",
                    )


def _imported(load: Any, name: str) -> Any:
    with users_code(name, "importing it failed"):
        return load()


@contextlib.contextmanager
def users_code(name: str, doing: str, passing: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Whatever the user's code of the plugin `name` raises inside, `sys.exit` included, is a PluginError that says so
    and names the line. Our own errors pass, and what is in `passing`; so does want of memory: more of it is the remedy.
    """
    try:
        yield
    except PluginError as error:
        raise PluginError(error.what, where=error.where or name, remedy=error.remedy) from error
    except (Exception, SystemExit) as error:
        # torch's want of memory goes by its name: it is not imported here
        if isinstance(error, (AlignError, MemoryError, *passing)) or type(error).__name__ == "OutOfMemoryError":
            raise
        raise PluginError(f"{doing}: {words_of(error)}", where=name, remedy=_remedy(error, name)) from error


_NOT_USERS = ("<", str(Path(align.__file__).parent), *(sysconfig.get_path(k) for k in ("stdlib", "purelib", "platlib")))


def require_call(function: Any, takes: Sequence[str], *, said: str, where: str, remedy: str) -> None:
    """PluginError, `said` and why, where a user's function cannot be called with as many arguments as `takes` names."""
    try:
        inspect.signature(function).bind(*takes)
    except ValueError:  # of C: it has no signature to look at
        return
    except TypeError as error:
        raise PluginError(f"{said}: {error}", where=where, remedy=remedy) from error


def words_of(error: BaseException) -> str:
    """An exception's type and message."""
    return f"{type(error).__name__}: {error}".rstrip(": \n")


def place_of(error: BaseException) -> str | None:
    """`file:line` of the innermost line that is the user's own; None where none is."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno or 1}"
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(_NOT_USERS)]
    return f"{frames[-1].filename}:{frames[-1].lineno}" if frames else None


def _remedy(error: BaseException, name: str) -> str | None:
    place = place_of(error)
    if isinstance(error, ModuleNotFoundError) and error.name:
        if place is None and name.startswith(error.name):  # the plugin itself
            return f"install the package that has {error.name!r}, or put its folder on PYTHONPATH"
        at = f" (imported at {place})" if place else ""
        return f"install {error.name!r}, or put it beside the plugin{at}"
    return f"look at {place}" if place else None


def is_users(name: str) -> bool:
    """Whether a name is of the user's own code: `file.py`, `file.py:attr` or `pkg.mod:attr`."""
    return ":" in name or name.endswith(".py")


def asked_in_child(function: str, name: str, limit_s: float = DESCRIBE_LIMIT_S) -> Any:
    """What our `package.module:function` says of the plugin `name`, asked in a child process. Raises PluginError."""
    return describe_in_child("align.describe", [function, name], name=name, limit_s=limit_s)


def describe_in_child(module: str, arguments: Sequence[str], *, name: str, limit_s: float = DESCRIBE_LIMIT_S) -> Any:
    """What `python -m module arguments` answers as its last line of JSON; this process imports nothing of it.

    Args:
        module: one of ours that loads a plugin and describes it; {"error": {what, where, remedy}} is its refusal.
        name: the plugin, for messages. limit_s: seconds after which the child and what it started are killed.

    Raises PluginError with the child's refusal, or where it hangs, dies or answers no JSON.
    """
    # Our own root replaces the working directory at the head of sys.path: a user's rewards.py must not be imported.
    root = str(Path(align.__file__).parents[1])
    code = (
        f"import runpy, sys; sys.path[0] = {root!r}; sys.argv[0] = {module!r}; "
        f"runpy.run_module({module!r}, run_name='__main__')"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        out, err = child.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        raise PluginError(
            f"did not load within {limit_s:g} s",
            where=name,
            remedy="keep slow work (models, connections) out of the module's top level: do it on first use",
        ) from None
    finally:
        _end(child)
    return _answer(name, child.returncode, out, err)


def _end(child: subprocess.Popen[str]) -> None:
    """Kill the child's whole session: a plugin may have started processes of its own."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    for stream in (child.stdout, child.stderr):
        if stream is not None:
            stream.close()


def _answer(name: str, status: int, out: str, err: str) -> Any:
    lines = out.strip().splitlines()
    try:
        answer = json.loads(lines[-1]) if lines else None
    except json.JSONDecodeError:
        answer = None
    if not isinstance(answer, dict):
        last = (err.strip().splitlines() or ["it printed nothing"])[-1]
        raise PluginError(f"ended with status {status} while it was loaded: {last}", where=name)
    if "error" in answer:
        refusal = answer["error"]
        raise PluginError(refusal["what"], where=refusal.get("where") or name, remedy=refusal.get("remedy"))
    return answer
