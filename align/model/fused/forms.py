"""What a function really computes, by its compiled code: whether it is one that is known, whatever its names say.

A fused kernel may replace a module only where it computes what that module computes for every input: at large
activations, in training mode, in half precision. A few random tokens show none of these, and names show nothing: a
gate that is clamped at 7, a dropout on the result or a multiplier of 1 in this very config has the same parts and the
same values on them. So a model's code is held against code written out here: the same instructions on the same
attributes, globals that are the same objects (or functions that are the same again), and constants that are equal.
Names of arguments and locals, annotations and docstrings make no difference.
"""

from __future__ import annotations

import builtins
import dis
import inspect
import types
from collections.abc import Iterable
from typing import Any

from torch import nn

_LOCAL = frozenset({"LOAD_FAST", "STORE_FAST", "DELETE_FAST", "LOAD_FAST_CHECK", "LOAD_FAST_AND_CLEAR"})
_ABSENT = object()

FUSED = "is_fused"
"""Attribute of a class that was made here, in place of a model's own."""


def same_function(own: Any, known: Any) -> bool:
    """Whether both are Python functions that compute the same of the same globals."""
    if not isinstance(own, types.FunctionType) or not isinstance(known, types.FunctionType):
        return False
    if own.__closure__ or known.__closure__ or hasattr(own, "__wrapped__"):
        return False
    if _arguments(own) != _arguments(known):
        return False
    mine, theirs = _instructions(own.__code__), _instructions(known.__code__)
    return mine == theirs and all(
        _same_global(_global(own, name), _global(known, name)) for what, name in theirs if what == "LOAD_GLOBAL"
    )


def known_method(kind: type[nn.Module], known: Iterable[type]) -> type | None:
    """Of classes with a known `forward`, the one whose forward, and the methods that it calls, are those of `kind`."""
    return next((one for one in known if _same_class(kind, one)), None)


def _same_class(kind: type[nn.Module], known: Any) -> bool:
    if kind.__call__ is not nn.Module.__call__ or not same_function(kind.forward, known.forward):
        return False
    for name in set(known.forward.__code__.co_names):
        own = inspect.getattr_static(kind, name, _ABSENT)
        theirs = inspect.getattr_static(known, name, _ABSENT)
        if isinstance(theirs, types.FunctionType):
            if not same_function(own, theirs):
                return False
        elif own is not inspect.getattr_static(nn.Module, name, _ABSENT):
            return False  # a property, or a class attribute, where an instance's own value is expected
    return True


def replaced(module: nn.Module) -> bool:
    """Whether this one module's forward is not its class's: something was put around it."""
    return "forward" in vars(module)


def watched(module: Any) -> bool:
    """Whether hooks look at or change what goes in and out of a module: a kernel that reads its weights alone would
    pass them by."""
    return any(
        getattr(module, name, None)
        for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    )


def _arguments(function: types.FunctionType) -> tuple[Any, ...]:
    code = function.__code__
    spread = code.co_flags & (inspect.CO_VARARGS | inspect.CO_VARKEYWORDS)
    return code.co_argcount, code.co_kwonlyargcount, spread, function.__defaults__


def _instructions(code: types.CodeType) -> list[tuple[str, Any]]:
    """Name and argument of each instruction; locals by the order in which they are first used, arguments first."""
    places: dict[str, int] = {name: n for n, name in enumerate(code.co_varnames[: code.co_argcount])}
    found: list[tuple[str, Any]] = []
    for one in dis.get_instructions(code):
        value: Any = one.argval
        if one.opname.startswith(("LOAD_FAST", "STORE_FAST")) or one.opname in _LOCAL:
            names = value if isinstance(value, tuple) else (value,)
            value = tuple(places.setdefault(name, len(places)) for name in names)
        elif isinstance(value, types.CodeType):
            value = tuple(_instructions(value))
        elif one.opname == "LOAD_CONST":
            value = (type(value), value)  # 1 is not 1.0: the one keeps an integer's dtype
        if one.opname not in ("RESUME", "CACHE", "PRECALL"):
            found.append((one.opname, value))
    return found


def _global(function: types.FunctionType, name: str) -> Any:
    return function.__globals__.get(name, getattr(builtins, name, _ABSENT))


def _same_global(own: Any, known: Any) -> bool:
    return own is known or same_function(own, known)
