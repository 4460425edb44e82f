"""Whether a stage's processes fit their devices, and the change that makes them fit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from align.check.memory.plan import Estimate, Work, trainer
from align.check.memory.sizes import Sizes, Table, Tower, human
from align.recipe.adapter import Adapter, Quant
from align.recipe.optimizers import OPTIMIZERS
from align.recipe.sharding import STRATEGIES

SMALLEST = 512  # tokens: below it a microbatch gains little, and products become slow
MOST_RANKS = 64


@dataclass(frozen=True)
class Asked:
    """A trainer as a recipe asks for it. longest: tokens of its largest example, which is never divided."""

    sizes: Sizes
    adapter: Adapter
    work: Work
    longest: int
    table: Table | None = None
    tower: Tower | None = None

    @property
    def estimate(self) -> Estimate:
        return trainer(self.sizes, self.adapter, self.work, table=self.table, tower=self.tower)

    @property
    def total(self) -> float:
        return self.estimate.total


Change = tuple[str, Callable[[Asked], Asked]]


def verdict(asked: Asked, budget: float, device: str) -> str | None:
    """None where it fits `budget` bytes; else a line with what makes it fit, or that nothing does."""
    if asked.total <= budget:
        return None
    missing = f"note: the trainer needs about {human(asked.total)}, and {device} has {human(budget)}"
    found = _first_that_fits(asked, budget)
    if found is None:
        return f"{missing}: no setting makes it fit; take a smaller model, or a larger device"
    changes, after = found
    return f"{missing}: {' and '.join(changes)} would make it {human(after.total)}"


def _first_that_fits(asked: Asked, budget: float) -> tuple[list[str], Asked] | None:
    """One change where one is enough; else the fewest that are found by leaving out of all what is not needed, each as
    weak as it may be."""
    offered = changes(asked)
    for words, change in offered:
        if (after := change(asked)).total <= budget:
            return [words], after
    chosen = {_key(words): (words, change) for words, change in offered}  # of those alike the last, the strongest
    if _all(chosen, asked).total > budget:
        return None
    for key in reversed(list(chosen)):  # the most far-reaching first
        fewer = {other: change for other, change in chosen.items() if other != key}
        if _all(fewer, asked).total <= budget:
            chosen = fewer
    for words, change in reversed(offered):
        weaker = {**chosen, _key(words): (words, change)} if _key(words) in chosen else chosen
        if _all(weaker, asked).total <= budget:
            chosen = weaker
    return [words for words, _ in chosen.values()], _all(chosen, asked)


def _key(words: str) -> str:
    return words.partition(":")[0]


def _all(chosen: Mapping[str, Change], asked: Asked) -> Asked:
    for _, change in chosen.values():
        asked = change(asked)
    return asked


def _work(**settings: Any) -> Callable[[Asked], Asked]:
    return lambda asked: replace(asked, work=replace(asked.work, **settings))


def _adapter(adapter: Adapter) -> Callable[[Asked], Asked]:
    return lambda asked: replace(asked, adapter=adapter)


def changes(asked: Asked) -> list[Change]:
    """Settings that save memory, in the order to try them: those that change no result, those of numbers, those that
    take more devices, and last another kind of training. Of those alike the stronger come later."""
    work, adapter, found = asked.work, asked.adapter, list[Change]()
    if not work.checkpointing:
        found.append(("`model.gradient_checkpointing: true`", _work(checkpointing=True)))
    tokens = work.tokens // 2
    while tokens >= max(SMALLEST, asked.longest):
        found.append((f"`packing.max_tokens: {tokens}`", _work(tokens=tokens, several=True)))
        tokens //= 2
    spreads = adapter.quant is None and not OPTIMIZERS[work.optimizer].whole
    if not STRATEGIES[work.strategy].spreads:
        smaller = [name for name, one in OPTIMIZERS.items() if one.saves == work.optimizer]
        found += [(f"`optim.name: {name}`", _work(optimizer=name)) for name in smaller]
    if adapter.kind == "lora" and not adapter.mixed and asked.sizes.experts == 1:
        packed = adapter.model_copy(update={"kind": "qlora", "quant": Quant()})
        found.append(("`adapter.kind: qlora`", _adapter(packed)))
    elif spreads:
        most = max(STRATEGIES, key=lambda name: len(STRATEGIES[name].spreads))
        ranks = 2 * work.ranks if work.strategy == most else max(2, work.ranks)
        while ranks <= MOST_RANKS:
            words = f"`placement.trainer: {{ranks: {ranks}, strategy: {most}}}`"
            found.append((words, _work(strategy=most, ranks=ranks, optimizer=work.optimizer)))
            ranks *= 2
    if adapter.kind == "full" and asked.table is None:
        found.append(("`adapter.kind: lora`", _adapter(Adapter())))
    return found
