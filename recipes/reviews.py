"""Short reviews with a label, generated: the data of classify.yaml. The same options give the same rows.

A review says two things about a hotel, and of each whether it is good, sometimes by a negation ("not clean"). Both good
is positive, both bad negative, and one of each mixed: single words do not tell, and neither does one half.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator

Row = dict[str, object]

GOOD = ("clean", "friendly", "quiet", "generous", "bright", "charming", "tasty")
BAD = ("dirty", "rude", "noisy", "stingy", "dark", "gloomy", "bland")
THINGS = ("room", "staff", "street", "breakfast", "lobby", "view", "dinner", "bar")
LABELS = ("negative", "mixed", "positive")
JOINS = {True: (", and", "; also,"), False: (", but", ", although")}
HELD_OUT_SHARE = 10  # one pair of statements in ten is held out


def reviews(*, rows: int = 4000, seed: int = 0, held_out: bool = False) -> Iterator[Row]:
    """Reviews {text, label}. held_out: pairs of statements that no training data show."""
    rng = random.Random(f"reviews/{held_out}/{seed}")
    while rows > 0:
        first, second = _statement(rng), _statement(rng)
        if _held_out(first[0], second[0]) != held_out:
            continue
        join = rng.choice(JOINS[first[1] == second[1]])
        yield {"text": f"The {first[0]}{join} the {second[0]}.", "label": LABELS[first[1] + second[1]]}
        rows -= 1


def _statement(rng: random.Random) -> tuple[str, bool]:
    """What is said, and whether it is good."""
    praises, negated = rng.random() < 0.5, rng.random() < 0.3
    word = rng.choice(GOOD if praises else BAD)
    return f"{rng.choice(THINGS)} was {'not ' if negated else ''}{word}", praises != negated


def _held_out(first: str, second: str) -> bool:
    """Decided by the two statements alone, so that no split can leak into another."""
    return hashlib.sha256(f"{first}|{second}".encode()).digest()[0] % HELD_OUT_SHARE == 0
