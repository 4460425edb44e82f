"""What runs inside a sandbox: the candidate, the tests, or a whole program. Standard library only.

The candidate and its tests run in two sandboxes. The candidate's holds the solution and answers calls; the other one
holds the tests and the connection on which the verdict is given.
"""

from __future__ import annotations

import ast
import builtins
import contextlib
import importlib
import json
import linecache
import os
import random
import sys
import time
import traceback
import types
from collections.abc import Callable, Iterator
from typing import Any

from rewards.sandbox.peer import HEADER, Peer, PeerLost, read_exactly, write_all

_SHOWN = 600  # characters of what failed


def candidate(link: int) -> None:
    """Run the solution that arrives on `link`, then answer calls until the tests are done."""
    peer = Peer(link, open=True)
    source = peer.receive()[1]
    module = types.ModuleType("solution")
    sys.modules["solution"] = module
    try:
        exec(compile(source, "<solution>", "exec"), module.__dict__)
    except BaseException as error:  # noqa: BLE001  also SystemExit: it ends the solution, not the judgement
        peer.send(["got", brief(error, "<solution>")])
        os._exit(1)
    peer.send(["got", ["ready", ""]])
    found = module.__dict__
    peer.export(lambda name: (found[name],) if name in found else ())
    peer.serve()


def script(channel: int) -> None:
    """Run the program that arrives on `channel` as __main__, with our standard input and output."""
    parts = []
    while part := os.read(channel, 1 << 16):
        parts.append(part)
    module = types.ModuleType("__main__")
    sys.modules["__main__"] = module
    sys.stdin = open(0, encoding="utf-8", errors="replace", closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", encoding="utf-8", errors="replace", closefd=False)  # noqa: SIM115
    status: object = 0
    try:
        exec(compile(b"".join(parts), "<solution>", "exec"), module.__dict__)
    except SystemExit as error:
        status = error.code
    except BaseException as error:  # noqa: BLE001
        status = brief(error, "<solution>")
    try:
        sys.stdout.flush()
    except OSError as error:
        status = str(error)
    if status not in (None, 0):
        write_all(channel, str(status).encode(errors="replace")[:_SHOWN])
        os._exit(1)
    os._exit(0)


def brief(error: BaseException, file: str) -> str:
    """Type, message and the last line in `file` that led to it."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == file]
    line = frames[-1].lineno if frames else error.lineno if isinstance(error, SyntaxError) else None
    place = f" (line {line})" if line else ""
    shown = linecache.getline(file, line).strip() if line else ""
    try:
        text = str(error)
    except Exception:  # noqa: BLE001  a solution's own exception may refuse
        text = ""
    return f"{type(error).__name__}{': ' if text else ''}{text}{place}{': ' if shown else ''}{shown}"[:_SHOWN]


# ------------------------------------------------------------------------------------------------ tests


class BadTests(Exception):
    """The row's tests cannot run, whatever the solution."""


class Cases:
    """Counts assertions: each is a case. go_on: a failed one does not end the tests.

    reached: with those under a `try`, whose failure the test may expect: they are no cases of their own.
    """

    def __init__(self, go_on: bool) -> None:
        self.go_on = go_on
        self.tried = self.passed = self.reached = 0
        self.failure = ""

    def __enter__(self) -> None:
        self.tried += 1
        self.reached += 1

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> bool:
        if error is None:
            self.passed += 1
            return False
        if not self.go_on or not isinstance(error, Exception):
            return False
        self.note(error)
        return True

    @contextlib.contextmanager
    def guarded(self) -> Iterator[None]:
        self.reached += 1
        yield

    def note(self, error: BaseException) -> None:
        self.failure = self.failure or brief(error, "<tests>")


class _CountAsserts(ast.NodeTransformer):
    """`assert x` -> `with __cases__: assert x`; under a `try`, `with __cases__.guarded(): assert x`."""

    def __init__(self) -> None:
        self._context = "__cases__"

    def visit_Assert(self, node: ast.Assert) -> ast.AST:
        context = ast.parse(self._context, mode="eval").body
        return ast.copy_location(ast.With([ast.withitem(context)], [node]), node)

    def visit_Try(self, node: ast.Try) -> ast.AST:
        before, self._context = self._context, "__cases__.guarded()"
        self.generic_visit(node)
        self._context = before
        return node


def tests(channel: int, link: int) -> None:
    """Judge the candidate on `link` by the tests that arrive on `channel`; the verdict goes back there.

    The job: solution, setup (trusted source that the tests may use), tests (sources), entry (a name that is always the
    candidate's), fraction (go on after a failure), wall_s. The verdict: passed, total, failure, cause, bad.
    """
    (size,) = HEADER.unpack(read_exactly(channel, HEADER.size))
    job = json.loads(read_exactly(channel, size))
    random.seed(0)
    peer = Peer(link, open=False, deadline=time.monotonic() + job["wall_s"])
    verdict = {"passed": 0, "total": 1, "failure": "", "cause": "", "bad": ""}
    try:
        verdict.update(_judge(job, peer))
    except BadTests as error:
        verdict["bad"] = str(error)
    write_all(channel, json.dumps(verdict).encode("ascii"))
    os._exit(0)


def _judge(job: dict[str, Any], peer: Peer) -> dict[str, Any]:
    namespace: dict[str, Any] = {"__name__": "tests"}
    units = [_parse(source) for source in job["tests"]]
    expected = sum(isinstance(n, ast.Assert) for unit in units for n in ast.walk(unit))
    if not expected:
        raise BadTests("the row's tests hold no assertion")
    _prepare(job["setup"], namespace)
    wanted = _of_the_solution(units, namespace, job["entry"])
    try:
        peer.send(["ask", job["solution"]])
        state = peer.receive()[1]
        if state != ["ready", ""]:
            return {"total": expected, "failure": str(state)[:_SHOWN], "cause": "broken"}
        _bind(wanted, namespace, peer)
        return _run(units, namespace, expected, fraction=job["fraction"])
    except PeerLost as error:
        return {"total": expected, "failure": str(error), "cause": error.cause}
    except (MemoryError, RecursionError) as error:  # by the size or depth of what the solution sent
        return {"total": expected, "failure": type(error).__name__, "cause": "failed"}


def _parse(source: str) -> ast.Module:
    try:
        return ast.parse(source, "<tests>")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise BadTests(f"the row's tests are no Python: {error}") from None


def _prepare(setup: str, namespace: dict[str, Any]) -> None:
    try:
        exec(compile(setup, "<setup>", "exec"), namespace)
    except BaseException as error:  # noqa: BLE001
        raise BadTests(f"what the row's tests need first fails: {brief(error, '<setup>')}") from None


def _of_the_solution(units: list[ast.Module], namespace: dict[str, Any], entry: str | None) -> list[str]:
    """The names that tests use and do not define, but for those of the standard library's modules, which are imported.

    A built-in's name is the built-in: else a solution could bring an `abs` or `all` of its own.
    """
    names = [n for unit in units for n in ast.walk(unit) if isinstance(n, ast.Name)]
    stored = {n.id for n in names if not isinstance(n.ctx, ast.Load)} | set(namespace)
    wanted = []
    for name in dict.fromkeys(n.id for n in names if isinstance(n.ctx, ast.Load)):
        if name == entry:
            wanted.append(name)
        elif not (name in stored or hasattr(builtins, name) or _defined(units, name)):
            if name in sys.stdlib_module_names:
                namespace[name] = importlib.import_module(name)
            else:
                wanted.append(name)
    if not wanted:
        raise BadTests("the row's tests use nothing of the solution")
    return wanted


def _bind(names: list[str], namespace: dict[str, Any], peer: Peer) -> None:
    """What the solution lacks stays unbound."""
    for name in names:
        value = _fetch(name, peer)
        if isinstance(value, tuple) and len(value) == 1:
            namespace[name] = value[0]
        else:
            namespace.pop(name, None)


def _fetch(name: str, peer: Peer) -> Any:
    try:
        found = peer.ask("call", 0, [name], peer.encode({}))
    except Exception:  # noqa: BLE001  an answer that cannot be read: the name stays unbound
        return None
    return found[0] if isinstance(found, tuple) and found else None


def _defined(units: list[ast.Module], name: str) -> bool:
    definitions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    for node in (n for unit in units for n in ast.walk(unit)):
        if (isinstance(node, definitions) and node.name == name) or (isinstance(node, ast.arg) and node.arg == name):
            return True
        if isinstance(node, ast.alias) and (node.asname or node.name).split(".")[0] == name:
            return True
    return False


def _run(units: list[ast.Module], namespace: dict[str, Any], expected: int, *, fraction: bool) -> dict[str, Any]:
    cases = Cases(go_on=fraction)
    namespace["__cases__"] = cases
    aborted, cause = 0, ""
    for unit in units:
        source = ast.unparse(unit)
        linecache.cache["<tests>"] = (len(source), None, source.splitlines(True), "<tests>")
        tree = ast.fix_missing_locations(_CountAsserts().visit(ast.parse(source, "<tests>")))
        try:
            exec(compile(tree, "<tests>", "exec"), namespace)
        except (Exception, SystemExit, KeyboardInterrupt) as error:  # noqa: BLE001
            aborted += 1
            cases.note(error)
        except PeerLost as error:
            aborted += 1
            cases.failure, cause = cases.failure or str(error), error.cause
        if cause or (cases.failure and not fraction):
            break
    if not cases.failure and not cases.reached:
        cases.failure = "no assertion was reached"
    if not cases.failure:
        return {"passed": expected, "total": expected}
    passed = cases.passed if fraction else 0
    total = max(expected, cases.tried + aborted, passed + 1)
    return {"passed": passed, "total": total, "failure": cases.failure, "cause": cause or "failed"}


ROLES: dict[str, Callable[..., None]] = {"candidate": candidate, "tests": tests, "script": script}
