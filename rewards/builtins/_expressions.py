"""Mathematical answers, in LaTeX or plain text, as trees that can be compared.

parse("\\\\frac{1}{2}x") is a tree of tuples; `same` compares two by value: exactly where both are rational, else at
fixed points for the variables, to a relative 1e-9 (two different expressions of school mathematics do not agree at all
of them: Schwartz 1980). Nothing is simplified symbolically and nothing is executed, so that no answer can hang.
"""

from __future__ import annotations

import cmath
import math
import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any

Tree = tuple[Any, ...]  # ("number", Fraction) | ("name", text) | (operator or function, Tree, ...) | collections
Number = Fraction | complex

_TOKEN = re.compile(
    r"\s*(?:(?P<number>\d+(?:\.\d+)?|\.\d+)|\\(?P<command>[A-Za-z]+)|(?P<word>[A-Za-z]+)|(?P<sign>\*\*|.))", re.DOTALL
)
_FUNCTIONS: dict[str, Callable[[complex], complex]] = {
    "sin": cmath.sin, "cos": cmath.cos, "tan": cmath.tan, "exp": cmath.exp, "ln": cmath.log, "log": cmath.log10,
    "sinh": cmath.sinh, "cosh": cmath.cosh, "tanh": cmath.tanh, "arcsin": cmath.asin, "arccos": cmath.acos,
    "arctan": cmath.atan,
}  # fmt: skip
_CONSTANTS = {"pi": complex(math.pi), "e": complex(math.e), "i": 1j}
_FRACTIONS = ("frac", "dfrac", "tfrac", "cfrac")
_TIMES = {"*", "×", "·", "cdot", "times"}
_OVER = {"/", "÷", "div"}
_OPEN, _CLOSE = {"(": ")", "[": "]", "{": "}", "lbrace": "rbrace"}, {")", "]", "}", "rbrace"}
_POINTS = 4
_CLOSE_ENOUGH = 1e-9
_LONGEST = 250  # characters of an answer; a tree is at most so deep
_DEEPEST = 60  # brackets within brackets
_LARGEST = 4000  # bits of an exact number; beyond, floats, which overflow to an error


class NotMath(ValueError):
    """The text is no expression that this grammar knows."""


def parse(text: str) -> Tree:
    """The tree of an answer without its delimiters ($, \\boxed). NotMath where it is none."""
    if len(text) > _LONGEST:
        raise NotMath(f"{len(text)} characters")
    reader = _Reader(_tokens(text))
    tree = reader.relation()
    if reader.token is not None:
        raise NotMath(f"{reader.token[1]!r} after an expression")
    return tree


def _tokens(text: str) -> list[tuple[str, str]]:
    found = []
    for m in _TOKEN.finditer(text.strip()):
        kind = str(m.lastgroup)
        word = m[kind]
        if kind == "word" and word not in _FUNCTIONS and word not in ("sqrt", "pi", "infinity", "inf"):
            found += [("name", letter) for letter in word]  # xy is x times y
        else:
            found.append(("sign", "\\") if word == "\\" else (kind, word))
    return found


class _Reader:
    """Recursive descent: relation > list > sum > product > sign > power > atom."""

    def __init__(self, tokens: list[tuple[str, str]]):
        self.tokens, self.place, self.depth = tokens, 0, 0

    @property
    def token(self) -> tuple[str, str] | None:
        return self.tokens[self.place] if self.place < len(self.tokens) else None

    def sees(self, *words: str) -> bool:
        return self.token is not None and self.token[0] != "number" and self.token[1] in words

    def take(self, *words: str) -> bool:
        self.place += (taken := self.sees(*words))
        return taken

    def expect(self, word: str) -> None:
        if not self.take(word):
            raise NotMath(f"{word!r} is missing")

    def relation(self) -> Tree:
        left = self.items()
        if self.take("=") or (self.sees("in") and self.take("in")):
            return ("equals", left, self.items())
        return left

    def items(self) -> Tree:
        """One thing, or several divided by commas, in any order; unions of intervals likewise."""
        parts = [self.union()]
        while self.take(","):
            parts.append(self.union())
        return parts[0] if len(parts) == 1 else ("set", *parts)

    def union(self) -> Tree:
        parts = [self.sum()]
        while self.take("cup", "∪"):
            parts.append(self.sum())
        return parts[0] if len(parts) == 1 else ("union", *parts)

    def sum(self) -> Tree:
        tree = self.product()
        while self.sees("+", "-", "−", "pm", "±"):
            sign = "+" if self.take("+") else "-" if self.take("-", "−") else "±"
            self.place += sign == "±"
            tree = (sign, tree, self.product())
        return tree

    def product(self) -> Tree:
        tree = self.signed()
        while True:
            if self.take(*_TIMES):
                tree = ("*", tree, self.signed())
            elif self.take(*_OVER):
                tree = ("/", tree, self.signed())
            elif self.starts_atom():
                mixed = tree[0] == "number" and tree[1].denominator == 1 and self.sees(*_FRACTIONS)
                tree = ("+" if mixed else "*", tree, self.power())  # 1\frac{3}{4} is 7/4
            else:
                return tree

    def starts_atom(self) -> bool:
        if self.token is None:
            return False
        kind, word = self.token
        if kind == "number":
            return self.tokens[self.place - 1][0] != "number"  # "1 2" is no product
        return kind in ("name", "word") or word in ("(", "[", "{") or (kind == "command" and word not in _NO_ATOMS)

    def signed(self) -> Tree:
        if self.take("-", "−"):
            return ("neg", self.deeper(self.signed))
        if self.take("+"):
            return self.deeper(self.signed)
        if self.take("pm", "±"):
            return ("±", ("number", Fraction(0)), self.deeper(self.signed))
        return self.power()

    def power(self) -> Tree:
        tree = self.atom()
        while self.take("!"):
            tree = ("factorial", tree)
        if self.take("^", "**"):
            return ("^", tree, self.deeper(self.group if self.sees("{") else self.exponent))
        return tree

    def exponent(self) -> Tree:
        return ("neg", self.power()) if self.take("-", "−") else self.power()

    def deeper(self, read: Callable[[], Tree]) -> Tree:
        self.depth += 1
        if self.depth > _DEEPEST:
            raise NotMath("too many brackets")
        tree = read()
        self.depth -= 1
        return tree

    def group(self) -> Tree:
        self.expect("{")
        tree = self.deeper(self.sum)
        self.expect("}")
        return tree

    def argument(self) -> Tree:
        """Of \\frac and \\sqrt: a group, or the next digit or letter (\\frac12 is a half)."""
        if self.sees("{"):
            return self.group()
        if self.token is not None and self.token[0] == "number" and len(self.token[1]) > 1:
            digits = self.token[1]
            self.tokens[self.place : self.place + 1] = [("number", digits[0]), ("number", digits[1:])]
        return self.deeper(self.atom)

    def atom(self) -> Tree:
        if self.token is None:
            raise NotMath("an expression is missing")
        kind, word = self.token
        self.place += 1
        if kind == "number":
            return ("number", Fraction(word))
        if word in _OPEN and kind != "name":
            return self.bracket(word)
        if word == "|":
            tree = self.deeper(self.sum)
            self.expect("|")
            return ("abs", tree)
        if word in _FRACTIONS:
            return ("/", self.argument(), self.argument())
        if word == "sqrt" or word == "√":
            return self.root()
        if word in _FUNCTIONS:
            return self.function(word)
        if word in ("infty", "∞", "infinity", "inf"):
            return ("infinity",)
        if word in ("π", "pi"):
            return ("name", "pi")
        if word in ("emptyset", "varnothing", "∅"):
            return ("set",)
        if kind == "name" or (kind == "command" and word not in _NO_ATOMS):
            return self.name(word)
        raise NotMath(f"{word!r} begins no expression")

    def name(self, word: str) -> Tree:
        """A variable with its index."""
        if self.take("_"):
            index = self.group() if self.sees("{") else self.atom()
            return ("name", f"{word}_{index}")
        return ("name", word)

    def root(self) -> Tree:
        order: Tree = ("number", Fraction(2))
        if self.take("["):
            order = self.deeper(self.sum)
            self.expect("]")
        return ("root", self.argument(), order)

    def function(self, word: str) -> Tree:
        base = None
        if word == "log" and self.take("_"):
            base = self.argument()
        power = self.argument() if self.take("^") else None
        inside = self.deeper(self.power if self.sees("(", "{", "[") else self.product)
        tree: Tree = (word, inside) if base is None else ("/", ("ln", inside), ("ln", base))
        return tree if power is None else ("^", tree, power)

    def bracket(self, opening: str) -> Tree:
        """A group, a tuple, an interval or a set. A round or square pair of two may be a tuple or an interval: they
        are compared by their brackets and ends."""
        if self.take(*_CLOSE):
            return ("set",)
        parts = [self.deeper(self.union)]
        while self.take(","):
            parts.append(self.deeper(self.union))
        closing = self.token[1] if self.token else ""
        if not self.take(*_CLOSE):
            raise NotMath(f"{opening!r} is not closed")
        if opening in ("{", "lbrace"):
            return parts[0] if opening == "{" and len(parts) == 1 and closing == "}" else ("set", *parts)
        if len(parts) == 1 and closing == _OPEN[opening]:
            return parts[0]
        return (opening + closing, *parts)


_NO_ATOMS = {"cup", "in", "cdot", "times", "div", "pm", "rbrace", "text", "begin", "end"}


# ----------------------------------------------------------------------------------------------------------- comparing


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
    if kind not in _OPERATORS and kind not in _FUNCTIONS:
        raise ValueError(f"{kind} has no value")
    values = [_evaluate(t, point) for t in tree[1:]]
    return _OPERATORS[kind](*values) if kind in _OPERATORS else _FUNCTIONS[kind](complex(values[0]))


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
