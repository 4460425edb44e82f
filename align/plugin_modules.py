"""The Python files that a plugin of the user's is made of: its own, and the modules beside it that it imports.

They are found in the source, without running it: every import statement, wherever it stands, calls of `import_module`
and `__import__` with a name written out, and texts that name a Python file (`run_path`, `spec_from_file_location`,
`open`). A module counts where it lies in the plugin's folder or the recipe's, the two that imports of plugins are
looked for in after what is installed, or, where a file speaks of `sys.path`, in a folder that it names or the one
above it; of a package there, every Python file does.

Of what is installed, the package that a plugin itself lies in counts (`installed_hashes`), and one that its files
import from elsewhere than site-packages: it is being worked on, on PYTHONPATH or installed as editable. Of other files
that a plugin reads while it runs, those count that its source or its options name (`read_hashes`), and only where
that is asked for: of generators of data.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import os
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from importlib.machinery import PathFinder
from importlib.util import find_spec
from os.path import expanduser
from pathlib import Path
from typing import Any

from align.packages import PACKAGES

_DYNAMIC = ("import_module", "__import__")
_SEARCHED = (("sys", "path"), ("site", "addsitedir"))
_LONGEST = 1024
_KEPT = tuple(sysconfig.get_path(kind) + os.sep for kind in ("stdlib", "purelib", "platlib"))


def plugin_file(name: str, folder: Path) -> Path | None:
    """The file of `file.py`, `file.py:attr` or `pkg.mod:attr`; None where it is no file there (one of ours, or of an
    installed package). folder: the recipe's."""
    head, colon, _ = name.rpartition(":")
    place = head if colon else name
    if place.endswith(".py"):
        path = Path(expanduser(place))
        path = path if path.is_absolute() else folder / path
        return path if path.is_file() else None
    if not colon or not all(part.isidentifier() for part in place.split(".")):
        return None
    base = folder.joinpath(*place.split("."))
    return next((path for path in (base.with_suffix(".py"), base / "__init__.py") if path.is_file()), None)


def modules_of(name: str, folder: Path) -> list[Path]:
    """The plugin's file and every module that it imports from its folder or the recipe's, also through others."""
    first = plugin_file(name, folder)
    if first is None:
        return []
    roots = list(dict.fromkeys([_absolute(first.parent), _absolute(folder)]))
    first = _absolute(first)
    found: dict[Path, None] = {first: None}
    waiting = [first, *_package_of(first, roots)]
    while waiting:
        file = waiting.pop()
        found[file] = None
        for path in _imported(file, roots):
            if path not in found:
                found[path] = None
                waiting.append(path)
    return sorted(found)


def module_hashes(names: Iterable[str], folder: Path) -> dict[str, str]:
    """SHA-256 of every file of these plugins, by path. A file that cannot be read has none: the plugin itself says."""
    files = {path for name in names for path in modules_of(name, folder)}
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(files)}


def installed_hashes(names: Iterable[str], folder: Path) -> dict[str, str]:
    """SHA-256 of the Python files of installed packages that the plugins lie in, and of those being worked on that they
    import, by their paths from where the package lies: the same one installed elsewhere gives the same."""
    plugins = sorted(set(names))
    waiting = [top for name in plugins if (top := _top_of(name))]
    files = [file for name in plugins for file in modules_of(name, folder)]
    waiting += [top for file in files for top in _tops(_parsed(file)) if _is_worked_on(top)]
    beside = {_absolute(folder), *(file.parent for file in files)}  # `module_hashes` has these
    found: dict[str, dict[str, Path]] = {}
    while waiting:
        if (top := waiting.pop()) in found:
            continue
        found[top] = {shown: file for base, shown, file in _installed_files(top) if base not in beside}
        imported = {each for file in found[top].values() for each in _tops(_parsed(file))}
        waiting += [each for each in imported if _is_worked_on(each)]
    files_of = {shown: file for package in found.values() for shown, file in package.items()}
    return {shown: hashlib.sha256(files_of[shown].read_bytes()).hexdigest() for shown in sorted(files_of)}


def read_hashes(name: str, folder: Path, options: Iterable[str] = ()) -> dict[str, str]:
    """SHA-256 of the files, Python aside, that the source of a plugin or of its modules names, or one of these texts,
    by path: as they stand, or from the plugin's folder or the recipe's."""
    found: set[Path] = set()
    given = list(options)
    for file in modules_of(name, folder):
        texts = [*_texts(_parsed(file)), *given]
        found.update(_placed(texts, file, [_absolute(folder)], Path.is_file))
    return {str(path): _digest(path) for path in sorted(found) if path.suffix != ".py"}


def _digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        return f"unreadable: {error.strerror}"


def texts_in(value: Any) -> Iterator[str]:
    """Every string in a value of plain JSON."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list | tuple):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from texts_in(inner)


def _top_of(name: str) -> str | None:
    """The package of `pkg.mod:attr`; None of a file, and of one of ours."""
    place, colon, _ = name.rpartition(":")
    parts = place.split(".")
    usable = colon and not place.endswith(".py") and all(part.isidentifier() for part in parts)
    return parts[0] if usable and parts[0] not in PACKAGES else None


def _is_worked_on(top: str) -> bool:
    """Whether a package or module lies elsewhere than what is installed for good."""
    if top in PACKAGES or top in sys.stdlib_module_names:
        return False
    first = next((f"{place.parent}{os.sep}" for place in _places(top)), None)
    return not (first is None or first.startswith(_KEPT) or "site-packages" in first or "dist-packages" in first)


def _places(top: str) -> list[Path]:
    """The file or the folders that a top-level name stands for; [] where it is no Python. It imports nothing."""
    with contextlib.suppress(ImportError, ValueError, AttributeError):  # as `__main__`, or what another finder raises
        if (spec := find_spec(top)) is not None:
            folders = list(spec.submodule_search_locations or ())
            files = [spec.origin] if not folders and spec.origin and spec.origin.endswith(".py") else []
            return [_absolute(Path(place)) for place in folders or files]
    return []


def _installed_files(top: str) -> Iterator[tuple[Path, str, Path]]:
    """The Python files of what a top-level name stands for: the folder that it is found in, the path from there, the
    file."""
    for place in _places(top):
        for file in [place] if place.suffix == ".py" else sorted(place.rglob("*.py")):
            yield place.parent, file.relative_to(place.parent).as_posix(), file


def _absolute(path: Path) -> Path:
    return Path(os.path.abspath(path))  # links stay: names are compared with those in a copy of the recipe's folder


def _imported(file: Path, roots: list[Path]) -> Iterator[Path]:
    """Files of the modules that one file names."""
    tree = _parsed(file)
    texts = _texts(tree)
    yield from _placed(texts, file, roots, Path.is_file, ".py")
    if any(_searched(node) for node in ast.walk(tree)):
        more = [*_placed(texts, file, roots, Path.is_dir), file.parent.parent]
        roots += [place for place in more if place not in roots]  # for what is imported from there too
    if any(isinstance(node, ast.ImportFrom) and node.level for node in ast.walk(tree)):
        yield from _package_of(file, roots)
    for top in _tops(tree):
        yield from _found(top, roots)


def _parsed(file: Path) -> ast.Module:
    """Its source; nothing where it is none: whoever imports it says so."""
    with contextlib.suppress(SyntaxError, ValueError, RecursionError, MemoryError, OSError):
        return ast.parse(file.read_bytes())
    return ast.Module([], [])


def _tops(tree: ast.Module) -> list[str]:
    """Top-level names of the modules that are imported somewhere in it."""
    names: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.append(node.module or "")
        elif isinstance(node, ast.Call):
            names += _named(node)
    return list(dict.fromkeys(name.partition(".")[0] for name in names))


def _texts(tree: ast.Module) -> set[str]:
    return {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}


def _searched(node: ast.AST) -> bool:
    """Whether it is a word by which a folder comes to those that imports are looked for in."""
    return (
        isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and (node.value.id, node.attr) in _SEARCHED
    )


def _placed(
    texts: Iterable[str], file: Path, roots: list[Path], kind: Callable[[Path], bool], ending: str = ""
) -> list[Path]:
    """What of `kind` the texts name, from the file's folder or a root."""
    words = sorted(text for text in texts if 0 < len(text) < _LONGEST and text.endswith(ending) and "\0" not in text)
    places = dict.fromkeys([file.parent, *roots])
    named = [part for word in words if word.strip("./") for part in (word, word.lstrip("/"))]  # `folder + "/lib"`
    found = (_absolute(place / part) for part in named for place in places)
    return [path for path in dict.fromkeys(found) if _is(path, kind)]


def _is(path: Path, kind: Callable[[Path], bool]) -> bool:
    try:
        return kind(path)
    except (OSError, ValueError):  # letters that no file system takes
        return False


def _named(call: ast.Call) -> list[str]:
    target = call.func
    name = target.attr if isinstance(target, ast.Attribute) else target.id if isinstance(target, ast.Name) else ""
    first = call.args[0] if call.args else None
    known = name in _DYNAMIC and isinstance(first, ast.Constant) and isinstance(first.value, str)
    return [first.value] if known else []  # type: ignore[union-attr]


def _found(module: str, roots: list[Path]) -> Iterator[Path]:
    """Of a top-level name that is not installed, the first root's that has it: the roots come last on `sys.path`."""
    if not module.isidentifier() or _is_installed(module, roots):
        return
    for root in roots:
        package = root / module
        if package.is_dir() and (files := sorted(package.rglob("*.py"))):
            yield from files
            return
        if (path := root / f"{module}.py").is_file():
            yield path
            return


def _is_installed(module: str, roots: list[Path]) -> bool:
    if module in PACKAGES or module in sys.stdlib_module_names:
        return True
    places = [place for place in sys.path if _absolute(Path(place)) not in roots]
    return PathFinder.find_spec(module, places) is not None


def _package_of(file: Path, roots: list[Path]) -> Iterator[Path]:
    """Every file of the package that a module below a root belongs to."""
    for root in roots:
        if file.is_relative_to(root) and len(parts := file.relative_to(root).parts) > 1:
            yield from sorted((root / parts[0]).rglob("*.py"))
            return
