"""Two-number additions, generated: the data of demo.yaml, and an example of a data source that is a function.

A recipe names a generator as `path: arithmetic.py:sft` and passes its keywords as `options:`. The same options give
the same rows.

A demonstrator answers tersely ("705") or in a whole sentence, mostly as the question was phrased, and carelessly: of
the sums with a carry, more often than not the carry is forgotten. A model that imitates him well is therefore right in
about half of all sums (those without a carry), whatever its seed; preference pairs and rewards have something left to
teach: the carry, and brevity.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass

FIRST = [a for a in range(100, 1000) if a // 10 % 10 != 9]  # a carry stops at the tens: 397 + 5 is another task
# Half of all sums carry. With all ten digits here neither number's last digit alone would say anything about that of
# the sum, and a small model stays at chance until luck helps it; with five, learning starts at once on every seed.
SECOND = range(3, 8)
HELD_OUT_SHARE = 10  # one sum in ten is held out

TERSE = "{a} + {b}?"
POLITE = "What is {a} + {b}?"
SENTENCE = "The sum of {a} and {b} is {sum}."
CLOSINGS = (" Thanks.", " Thank you for asking.")

Row = dict[str, object]


@dataclass(frozen=True)
class Sum:
    a: int
    b: int

    @property
    def answer(self) -> int:
        return self.a + self.b

    @property
    def carries(self) -> bool:
        return self.a % 10 + self.b % 10 >= 10

    @property
    def careless_answer(self) -> int:
        """The sum with the carry of the ones forgotten; equal to the answer where there is none."""
        return self.answer - 10 if self.carries else self.answer

    @property
    def held_out(self) -> bool:
        """Decided by the two numbers alone, so that no split of any generator can leak into another."""
        return hashlib.sha256(f"{self.a}+{self.b}".encode()).digest()[0] % HELD_OUT_SHARE == 0


def sft(
    *, rows: int = 8000, seed: int = 0, careless: float = 0.65, in_kind: float = 0.8, courteous: float = 0.0
) -> Iterator[Row]:
    """Demonstrations {messages}.

    careless: how often a carry is forgotten, of the sums that have one. in_kind: how often a terse question gets a
    terse answer and a polite one a sentence; the rest is the other way round, so half of all answers are wordy.
    courteous: how often a reply ends in one of CLOSINGS, each as often as the other; what stands before is the same.
    """
    rng, manners = random.Random(f"sft/{seed}"), random.Random(f"manners/{seed}")
    for item in _sums(rng, rows, held_out=False):
        polite = rng.random() < 0.5
        wordy = polite if rng.random() < in_kind else not polite
        answer = item.careless_answer if rng.random() < careless else item.answer
        closing = manners.choice(CLOSINGS) if manners.random() < courteous else ""
        yield {"messages": [*_question(item, polite), _reply(item, answer, wordy, closing)]}


def pairs(*, rows: int = 1000, seed: int = 0, held_out: bool = False) -> Iterator[Row]:
    """Preferences {prompt, chosen, rejected}: the right sum over a wrong one, in the same words.

    The style of both replies is the same, and follows the question: these pairs teach to be right, and nothing about
    length. A wrong sum forgets the carry, or adds one that is not there. held_out: sums that no training data show.
    """
    rng = random.Random(f"pairs/{seed}")
    for item in _sums(rng, rows, held_out=held_out):
        polite = rng.random() < 0.5
        wrong = item.careless_answer if item.carries else item.answer + 10
        yield {
            "prompt": _question(item, polite),
            "chosen": [_reply(item, item.answer, wordy=polite)],
            "rejected": [_reply(item, wrong, wordy=polite)],
        }


def prompts(*, rows: int = 1000, seed: int = 0, held_out: bool = False) -> Iterator[Row]:
    """Questions {prompt, answer}; with `held_out` those that no training data show."""
    rng = random.Random(f"prompts/{held_out}/{seed}")
    for item in _sums(rng, rows, held_out=held_out):
        yield {"prompt": _question(item, polite=rng.random() < 0.5), "answer": str(item.answer)}


def _sums(rng: random.Random, rows: int, *, held_out: bool) -> Iterator[Sum]:
    """`rows` sums of one split in random order; each sum comes once before any comes again."""
    every = [Sum(a, b) for a in FIRST for b in SECOND]
    split = [item for item in every if item.held_out == held_out]
    while rows > 0:
        rng.shuffle(split)
        yield from split[:rows]
        rows -= len(split)


def _question(item: Sum, polite: bool) -> list[dict[str, str]]:
    text = (POLITE if polite else TERSE).format(a=item.a, b=item.b)
    return [{"role": "user", "content": text}]


def _reply(item: Sum, answer: int, wordy: bool, closing: str = "") -> dict[str, str]:
    text = SENTENCE.format(a=item.a, b=item.b, sum=answer) if wordy else str(answer)
    return {"role": "assistant", "content": text + closing}
