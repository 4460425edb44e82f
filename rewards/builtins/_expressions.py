"""Mathematical answers, in LaTeX or plain text, as trees that `_values.py` compares.

parse("\\\\frac{1}{2}x") is a tree of tuples. Nothing is simplified symbolically and nothing is executed, so that no
answer can hang.
"""

from __future__ import annotations

import cmath
import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any

Tree = tuple[Any, ...]  # ("number", Fraction) | ("name", text) | (operator or function, Tree, ...) | collections

_TOKEN = re.compile(
    r"\s*(?:(?P<number>\d+(?:\.\d+)?|\.\d+)|\\(?P<command>[A-Za-z]+)|(?P<word>[A-Za-z]+)|(?P<sign>\*\*|.))", re.DOTALL
)
FUNCTIONS: dict[str, Callable[[complex], complex]] = {
    "sin": cmath.sin, "cos": cmath.cos, "tan": cmath.tan, "exp": cmath.exp, "ln": cmath.log, "log": cmath.log10,
    "sinh": cmath.sinh, "cosh": cmath.cosh, "tanh": cmath.tanh, "arcsin": cmath.asin, "arccos": cmath.acos,
    "arctan": cmath.atan,
}  # fmt: skip
_FRACTIONS = ("frac", "dfrac", "tfrac", "cfrac")
_TIMES = {"*", "×", "·", "cdot", "times"}
_OVER = {"/", "÷", "div"}
_OPEN, _CLOSE = {"(": ")", "[": "]", "{": "}", "lbrace": "rbrace"}, {")", "]", "}", "rbrace"}
_LONGEST = 250  # characters of an answer; a tree is at most so deep
_DEEPEST = 60  # brackets within brackets


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
        if kind == "word" and word not in FUNCTIONS and word not in ("sqrt", "pi", "infinity", "inf"):
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
        if word in FUNCTIONS:
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
