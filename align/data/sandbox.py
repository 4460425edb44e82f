"""Jinja as transformers runs it for chat templates, with bounds on what one render may cost.

A sandbox keeps a template from the machine, not from its time and memory: `'x' * 10**10`, a loop of loops, a variable
that doubles, a macro that calls itself. Here every step of a loop, every call and every text or list that is made is
counted against the render's `Budget`, and what would be too large is refused before it is made. Templates that stay
within (all that are known do by three orders of magnitude) render as in transformers.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterable, Mapping
from contextvars import ContextVar
from datetime import datetime
from functools import cached_property, wraps
from typing import Any, cast

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame, operators
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

MOST_STEPS = 1_000_000  # of loops; a call is several
_CALL, _ITEM = 5, 8  # steps of a call; characters that an item of a list counts for
MOST_VALUES = 200_000  # that one list holds, at any depth, where it becomes a text or is compared
LONGEST = 1 << 26  # characters of a text, items of a list
MOST_MADE = 1 << 30  # characters and items, of all texts and lists together
WIDEST = 1 << 16  # columns to which a text may be filled
SECONDS = 10.0  # beyond the counts above, which reach almost everything
_NUMBER = re.compile(r"\d{5,}|\*")
_FILLS = frozenset(
    {"center", "ljust", "rjust", "zfill", "expandtabs", "indent", "batch", "slice", "tojson", "generate_lorem_ipsum"}
)


class TemplateLimit(Exception):
    """A render would have cost more than any conversation is worth."""


class Budget:
    """What one render has used."""

    def __init__(self) -> None:
        self.steps = self.made = 0
        self.begun = time.monotonic()

    def step(self, count: int = 1) -> None:
        self.steps += count
        if self.steps > MOST_STEPS:
            raise TemplateLimit(f"it takes more than {MOST_STEPS} steps")
        if self.steps & 255 < count:
            self.clock()

    def clock(self) -> None:
        if time.monotonic() - self.begun > SECONDS:
            raise TemplateLimit(f"it takes more than {SECONDS:g} s")

    def make(self, length: int) -> None:
        self.made += length
        if length > LONGEST:
            raise TemplateLimit(f"it makes a text or list longer than {LONGEST}")
        if self.made > MOST_MADE:
            raise TemplateLimit(f"it makes texts and lists of more than {MOST_MADE} characters or items")
        if length > WIDEST:
            self.clock()


budget: ContextVar[Budget | None] = ContextVar("align_template_budget", default=None)


def _make(length: int) -> None:
    used = budget.get()
    if used is not None:
        used.make(length)
    elif length > LONGEST:  # while the template is compiled, where constants are computed
        raise TemplateLimit(f"it makes a text or list longer than {LONGEST}")


def _step(count: int = 1) -> None:
    used = budget.get()
    if used is not None:
        used.step(count)


def _length(value: Any) -> int:
    """Characters of a value as text, at least; a list that holds a list twice is as long as its text, not as itself."""
    if isinstance(value, str):
        return len(value)
    if not isinstance(value, list | tuple | dict):
        return 0
    total, count, waiting = 0, 0, [value]
    while waiting:
        inner = waiting.pop()
        count += len(inner)
        if count > MOST_VALUES:
            raise TemplateLimit(f"it shows or compares a list of more than {MOST_VALUES} values")
        if isinstance(inner, dict):
            inner = [*inner.keys(), *inner.values()]
        total += len(inner) + sum(len(item) for item in inner if isinstance(item, str))
        if total > LONGEST:
            return total
        waiting += [item for item in inner if isinstance(item, list | tuple | dict)]
    return total


def _shown(value: Any) -> Any:
    """A value that is about to be a text, or compared. What is one already was counted when it was made."""
    if not isinstance(value, str):
        _make(_length(value))
    return value


def _joined(*values: Any) -> str:
    return _concat([str(_shown(value)) for value in values])


def _made(value: Any) -> Any:
    """What a filter, a call or a format gave."""
    if isinstance(value, str):
        _make(len(value))
    return value


def _concat(parts: Iterable[str]) -> str:
    texts = list(parts)
    _make(sum(map(len, texts)))
    return "".join(texts)


def _refuse_widths(name: str, values: Iterable[Any]) -> None:
    for value in values:
        if name in _FILLS and isinstance(value, int | float) and abs(value) > WIDEST:
            raise TemplateLimit(f"`{name}` to a width of {value}")


def _refuse_wide_format(text: Any, values: Iterable[Any]) -> None:
    """Widths in a format, or given to it: `%99999999d`, `{:99999999}`, `%*d`."""
    found = _NUMBER.findall(str(text)) if isinstance(text, str) else []
    for value in values:
        _shown(value)
    given = "*" in found or ":{" in str(text)
    if any(n != "*" and int(n[:9]) > WIDEST for n in found) or (
        given and any(isinstance(v, int) and abs(v) > WIDEST for v in values)
    ):
        raise TemplateLimit("a format fills a text to a width beyond use")


def _refuse_replacement(text: Any, old: Any, new: Any) -> None:
    text, old, new = str(_shown(text)), str(old), str(new)
    _make((text.count(old) if old else len(text) + 1) * len(new))


def _refuse_join(separator: Any, values: Any) -> None:
    if isinstance(values, list | tuple | str):
        _make(_length(values) + len(values) * len(str(separator)))


_BINARY: dict[str, Callable[[Any, Any], Any]] = {}


def _repeated(left: Any, right: Any) -> None:
    for one, times in ((left, right), (right, left)):
        if isinstance(one, str | list | tuple | bytes) and isinstance(times, int):
            _make(len(one) * max(times, 0) * (1 if isinstance(one, str | bytes) else _ITEM))
            return
    _refuse_digits(left, right, lambda one, other: one + other)


def _refuse_digits(left: Any, right: Any, bits: Callable[[int, int], int]) -> None:
    if isinstance(left, int) and isinstance(right, int) and bits(left.bit_length(), right.bit_length()) > 1 << 12:
        raise TemplateLimit("it computes a number beyond use")


class Environment(ImmutableSandboxedEnvironment):
    """transformers' environment (utils/chat_template_utils.py) within a `Budget`."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, *extensions: type[jinja2.ext.Extension]) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[*extensions, jinja2.ext.loopcontrols],
            finalize=_shown,
        )
        self.concat = _concat  # type: ignore[method-assign]
        self.counted, self.joined = _step, _joined
        self.filters["tojson"] = _tojson
        self.filters = {name: _bounded(name, function) for name, function in self.filters.items()}
        self.tests = {name: _compared(cast(Callable[..., Any], test)) for name, test in self.tests.items()}
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = lambda format: datetime.now().strftime(format)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "+":
            if isinstance(left, str) and isinstance(right, str):
                _make(len(left) + len(right))
            elif isinstance(left, list | tuple) and isinstance(right, list | tuple):
                _make(_ITEM * (len(left) + len(right)))
            return left + right
        if operator == "*":
            _repeated(left, right)
        elif operator == "**":
            _refuse_digits(left, right, lambda one, other: one * min(1 << max(other, 0), 1 << 20))
        elif operator == "%" and isinstance(left, str):
            _refuse_wide_format(left, right if isinstance(right, tuple) else (right,))
        return _made(super().call_binop(context, operator, left, right))

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        _step(_CALL)
        name, owner = getattr(__obj, "__name__", ""), getattr(__obj, "__self__", None)
        if name in _FILLS:
            _refuse_widths(name, [*args, *kwargs.values()])
        if isinstance(owner, str):
            _make(len(owner))
            if name == "replace" and len(args) > 1:
                _refuse_replacement(owner, args[0], args[1])
            elif name == "join" and args:
                _refuse_join(owner, args[0])
        return _made(super().call(__context, __obj, *args, **kwargs))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None

        @wraps(wrapped)
        def bounded(*args: Any, **kwargs: Any) -> str:
            _refuse_wide_format(value.__self__, [*args, *kwargs.values()])
            return _made(wrapped(*args, **kwargs))

        return bounded


class _Counted(CodeGenerator):
    """Code in which every loop counts its steps, and `~` and comparisons what they go through."""

    def visit_For(self, node: nodes.For, frame: Frame) -> None:
        self._bodies.add(id(node.body))
        super().visit_For(node, frame)

    def blockvisit(self, block: Iterable[nodes.Node], frame: Frame) -> None:
        if id(block) in self._bodies:
            self.writeline("environment.counted()")
        super().blockvisit(block, frame)

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.write("environment.joined(")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write(")")

    def visit_Operand(self, node: nodes.Operand, frame: Frame) -> None:
        if isinstance(node.expr, nodes.Const):
            super().visit_Operand(node, frame)
            return
        self.write(f" {operators[node.op]} environment.finalize(")
        self.visit(node.expr, frame)
        self.write(")")

    @cached_property
    def _bodies(self) -> set[int]:
        return set()


Environment.code_generator_class = _Counted


def _bounded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter within the budget. Its first arguments may be Jinja's own (context, environment), as it says."""
    skipped = 1 if hasattr(function, "jinja_pass_arg") else 0

    @wraps(function)
    def within(*args: Any, **kwargs: Any) -> Any:
        value, *more = args[skipped:] or (None,)
        _refuse_widths(name, [*more, *kwargs.values()])
        if name == "format":
            _refuse_wide_format(value, [*more, *kwargs.values()])
        elif name == "replace" and len(more) > 1:
            _refuse_replacement(value, more[0], more[1])
        elif name == "join":
            value = value if isinstance(value, list | tuple | str) else list(value)
            args = (*args[:skipped], value, *more)
            _refuse_join(more[0] if more else kwargs.get("d", ""), value)
        elif name == "sum" and ("start" in kwargs or len(more) > 1):
            return _sum(value, function, args[:skipped], more, kwargs)
        elif isinstance(value, str):
            _make(len(value))
            if name in _SLOW and len(value) > WIDEST:
                raise TemplateLimit(f"`{name}` of {len(value)} characters")
        elif name not in _STRUCTURAL:
            _shown(value)
        return _made(function(*args, **kwargs))

    return within


_STRUCTURAL = frozenset({
    "attr", "batch", "count", "d", "default", "first", "items", "last", "length", "list", "map", "random", "reject",
    "rejectattr", "reverse", "select", "selectattr", "slice",
})  # fmt: skip
_SLOW = frozenset({"dictsort", "groupby", "sort", "striptags", "unique", "urlize", "wordwrap"})  # of long texts


def _compared(test: Callable[..., Any]) -> Callable[..., Any]:
    """A test whose operands are within the budget."""

    @wraps(test)
    def within(*args: Any) -> Any:
        for value in args[1:]:
            _shown(value)
        return test(*args)

    return within


def _sum(value: Any, function: Callable[..., Any], head: Any, more: list[Any], kwargs: Mapping[str, Any]) -> Any:
    """A sum that starts from a list joins lists; each step makes a new one."""
    attribute = more[0] if more else kwargs.get("attribute")
    total = more[1] if len(more) > 1 else kwargs["start"]
    for item in value:
        _step()
        before = total
        total = function(*head, [item], attribute, before)
        _make(_ITEM * len(total) if isinstance(total, list | tuple) else 0)
    return total


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(_shown(message))


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
