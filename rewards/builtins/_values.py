"""Trees of `_expressions.py`, compared by value: exactly where both are rational, else at fixed points for the
variables, to a relative 1e-9 (two different expressions of school mathematics do not agree at all of them: Schwartz
1980).
"""

from __future__ import annotations

import cmath
import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

from rewards.builtins._expressions import FUNCTIONS, Tree

Number = Fraction | complex

_CONSTANTS = {"pi": complex(math.pi), "e": complex(math.e), "i": 1j}
_POINTS = 4
_CLOSE_ENOUGH = 1e-9
_LARGEST = 4000  # bits of an exact number; beyond, floats, which overflow to an error


def same(a: Tree, b: Tree) -> bool:
    """Whether two trees mean the same; an equation of a name counts as its value ("x = 5" is 5)."""
    a, b = _value_side(a, b), _value_side(b, a)
    a, b = _split_signs(a), _split_signs(b)
    if _is_collection(a) or _is_collection(b):
        if a[0] != b[0] or len(a) != len(b):
            return False
        if a[0] in ("set", "union"):
            return _same_unordered(list(a[1:]), list(b[1:]))
        return all(map(same, a[1:], b[1:]))
    if a == ("infinity",) or b == ("infinity",) or ("neg", ("infinity",)) in (a, b):
        return a == b
    return _same_values(a, b)


def _is_collection(tree: Tree) -> bool:
    return tree[0] in ("set", "union", "equals", "()", "[]", "(]", "[)")


def _value_side(tree: Tree, other: Tree) -> Tree:
    if tree[0] == "equals" and other[0] != "equals" and tree[1][0] == "name":
        return tree[2]
    return tree


def _split_signs(tree: Tree) -> Tree:
    """a ± b is the set of both."""
    return ("set", ("+", *tree[1:]), ("-", *tree[1:])) if tree[0] == "±" else tree


def _same_unordered(a: list[Tree], b: list[Tree]) -> bool:
    for tree in a:
        match = next((i for i, other in enumerate(b) if same(tree, other)), None)
        if match is None:
            return False
        b.pop(match)
    return True


def _same_values(a: Tree, b: Tree) -> bool:
    compared = 0
    for point in range(_POINTS):
        x, y = _try(a, point), _try(b, point)
        if x is None and y is None:
            continue
        if x is None or y is None or not _close(x, y):
            return False
        compared += 1
    return compared > 0 or a == b


def _close(x: Number, y: Number) -> bool:
    if isinstance(x, Fraction) and isinstance(y, Fraction):
        return x == y
    try:
        x, y = complex(x), complex(y)
    except OverflowError:  # an exact number beyond floats, against a float
        return False
    return abs(x - y) <= _CLOSE_ENOUGH * max(abs(x), abs(y))


def _try(tree: Tree, point: int) -> Number | None:
    try:
        value = _evaluate(tree, point)
        return value if isinstance(value, Fraction) or cmath.isfinite(value) else None
    except (ArithmeticError, ValueError):
        return None


def _evaluate(tree: Tree, point: int) -> Number:
    kind = tree[0]
    if kind == "number":
        return tree[1]
    if kind == "name":
        return _CONSTANTS.get(tree[1]) or _place(tree[1], point)
    if kind not in _OPERATORS and kind not in FUNCTIONS:
        raise ValueError(f"{kind} has no value")
    values = [_evaluate(t, point) for t in tree[1:]]
    return _OPERATORS[kind](*values) if kind in _OPERATORS else FUNCTIONS[kind](complex(values[0]))


def _place(name: str, point: int) -> complex:
    """Where a variable stands at a point: positive, of no simple relation to another's."""
    seed = sum(ord(letter) * 31**i for i, letter in enumerate(name))
    return complex(0.5 + math.modf(math.sqrt(seed + 7) * (point + 1) * math.sqrt(2))[0] * 2)


def _power(base: Number, exponent: Number) -> Number:
    if isinstance(base, Fraction) and isinstance(exponent, Fraction) and exponent.denominator == 1:
        bits = max(base.numerator.bit_length(), base.denominator.bit_length()) * abs(exponent.numerator)
        if bits <= _LARGEST:
            return base**exponent.numerator
    return complex(base) ** complex(exponent)


def _root(value: Number, order: Number) -> Number:
    """The principal one, but the real one of a negative number where the order is odd."""
    if isinstance(order, Fraction) and order.denominator == 1 and order % 2 == 1 and complex(value).imag == 0:
        return complex(math.copysign(abs(complex(value)) ** (1 / float(order)), complex(value).real))
    if order == 2:
        return cmath.sqrt(complex(value))
    return complex(value) ** (1 / complex(order))


def _factorial(value: Number) -> Number:
    if not isinstance(value, Fraction) or value.denominator != 1 or not 0 <= value <= 400:
        raise ValueError(f"{value}! is not computed")
    return Fraction(math.factorial(value.numerator))


def _both(exact: Callable[[Any, Any], Any]) -> Callable[[Number, Number], Number]:
    """An operator that stays exact where both sides are."""

    def apply(a: Number, b: Number) -> Number:
        if isinstance(a, Fraction) and isinstance(b, Fraction):
            return exact(a, b)
        return exact(complex(a), complex(b))

    return apply


_OPERATORS: dict[str, Callable[..., Number]] = {
    "+": _both(lambda a, b: a + b),
    "-": _both(lambda a, b: a - b),
    "*": _both(lambda a, b: a * b),
    "/": _both(lambda a, b: a / b),
    "^": _power,
    "root": _root,
    "neg": lambda a: -a,
    "abs": lambda a: abs(a) if isinstance(a, Fraction) else complex(abs(a)),
    "factorial": _factorial,
}
