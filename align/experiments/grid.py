"""Weight vectors: read from the command line, laid out on a simplex, and as names of folders."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence

from align.errors import UserError

Weights = dict[str, float]


def simplex(names: Sequence[str], points: int) -> list[Weights]:
    """Every weight vector over `names` whose entries are multiples of 1 / (points - 1) and add up to 1: `points` of
    them along each edge, (points + R - 2) choose (R - 1) in all (the simplex lattice of Scheffé, 1958).

    In order: all weight on the last name first. Raises UserError for fewer than two names or points.
    """
    if len(names) < 2:
        said = f"there is one, {names[0]!r}" if names else "there is none"
        raise UserError(f"a simplex needs two objectives; {said}", remedy="add a reward, or give --weights")
    if points < 2:
        raise UserError(f"a simplex with {points} point(s) along an edge", remedy="give 2 or more: 11 is steps of 0.1")
    parts = points - 1
    vectors = []
    for bars in itertools.combinations(range(parts + len(names) - 1), len(names) - 1):
        ends = (-1, *bars, parts + len(names) - 1)
        counts = [after - before - 1 for before, after in itertools.pairwise(ends)]
        vectors.append({name: count / parts for name, count in zip(names, counts, strict=True)})
    return vectors


def parse_weights(text: str) -> Weights:
    """`correct=1,brevity=0.5` as a dict of numbers >= 0. Raises UserError naming what is wrong."""
    found = parse_numbers(text, "--weights")
    for name, value in found.items():
        if value < 0:
            raise UserError(f"the weight of {name!r} is {value:g}", where="--weights", remedy="weights are 0 or more")
    return found


def parse_numbers(text: str, flag: str) -> dict[str, float]:
    """`a=1,b=-0.5` as a dict. Raises UserError naming the flag."""
    found: dict[str, float] = {}
    for word in text.split(","):
        name, _, number = (part.strip() for part in word.partition("="))
        value = _number(number)
        if not name or value is None:
            raise UserError(f"{word.strip()!r} is not name=number", where=flag, remedy="write a=1,b=0.5")
        if name in found:
            raise UserError(f"{name!r} is given twice", where=flag, remedy="give each objective one number")
        found[name] = value
    return found


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def label(weights: Mapping[str, float], seed: int | None = None) -> str:
    """A vector as a run's name: `correct-0.5_brevity-0.25`, with `_seed-3` where seeds differ."""
    words = [f"{re.sub(r'[^A-Za-z0-9.]+', '.', name)}-{weight:.6g}" for name, weight in weights.items()]
    return "_".join([*words, *([] if seed is None else [f"seed-{seed}"])])
