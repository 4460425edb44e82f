"""A plugin tried on completions that are there, and the proof that what it calls the gold answer scores best."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any

from rewards.api import Sample
from rewards.pool import PoolResult, RewardPool

OTHERS = 3  # golds of other rows that each gold is compared with


@dataclass(frozen=True, slots=True)
class Beaten:
    """A gold answer that does not score best, or has no score (value None: `rival` says why)."""

    group_id: int
    objective: str
    value: float | None
    rival_value: float | None
    rival: str


@dataclass
class GoldProof:
    """rows: how many; with_gold: of them; above, equal: comparisons with answers of another text that a gold won, and
    that were even. errors: (group id, message) where `gold` raised."""

    rows: int = 0
    with_gold: int = 0
    above: int = 0
    equal: int = 0
    beaten: list[Beaten] = field(default_factory=list)
    errors: list[tuple[int, str]] = field(default_factory=list)

    @property
    def holds(self) -> bool:
        """No gold is beaten, and the plugin tells golds from other answers at all."""
        return not self.beaten and not self.errors and (self.above > 0 or self.with_gold == 0)


async def prove_gold(pool: RewardPool, samples: Sequence[Sample]) -> GoldProof:
    """Score each row's gold beside the row's completions and golds of OTHERS other rows: none may score better.

    samples: of one row side by side, with its group id. The pool has one plugin, whose objectives all count: for a
    cost, less is better.
    """
    rows = [list(group) for _, group in groupby(samples, key=lambda s: s.group_id)]
    found = await pool.golds([row[0].row for row in rows])
    proof = GoldProof(rows=len(rows))
    proof.errors = [(r[0].group_id, str(g)) for r, g in zip(rows, found, strict=True) if isinstance(g, Exception)]
    golds = [(row, gold) for row, gold in zip(rows, found, strict=True) if isinstance(gold, str)]
    proof.with_gold = len(golds)
    candidates: list[list[Sample]] = []
    for n, (row, gold) in enumerate(golds):
        others = dict.fromkeys(golds[(n + k) % len(golds)][1] for k in range(1, OTHERS + 1))
        texts = [gold, *(s.completion for s in row), *others]
        candidates.append(
            [
                replace(row[0], completion=t, raw=None, sample_id=i, token_ids=(), truncated=False)
                for i, t in enumerate(texts)
            ]
        )
    if candidates:
        result = await pool.score([s for group in candidates for s in group])
        _compare(candidates, result, proof)
    return proof


def _compare(candidates: Sequence[Sequence[Sample]], result: PoolResult, proof: GoldProof) -> None:
    causes = {f.index: f"{f.cause}: {f.message}" for f in result.failures}
    first = 0
    for group in candidates:
        for k, (objective, kind) in enumerate(zip(result.objectives, result.kinds, strict=True)):
            sign = -1.0 if kind == "cost" else 1.0
            values = [result.scores[first + i][k] for i in range(len(group))]
            _compare_one(group, objective, values, sign, causes.get(first), proof)
        first += len(group)


def _compare_one(
    group: Sequence[Sample], objective: str, values: Sequence[Any], sign: float, failed: str | None, proof: GoldProof
) -> None:
    gold, number = values[0], group[0].group_id
    if gold is None:
        if failed:
            proof.beaten.append(Beaten(number, objective, None, None, f"the gold answer has no score ({failed})"))
        return
    worst: Beaten | None = None
    for sample, value in zip(group[1:], values[1:], strict=True):
        if value is None or sample.completion == group[0].completion:
            continue
        proof.above += sign * gold > sign * value
        proof.equal += gold == value
        if sign * value > sign * gold and (worst is None or sign * value > sign * (worst.rival_value or 0.0)):
            worst = Beaten(number, objective, gold, value, sample.completion)
    if worst is not None:
        proof.beaten.append(worst)
