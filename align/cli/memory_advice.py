"""Whether a stage's processes fit their devices, and the change that makes them fit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from align.cli.memory import Sizes, Table, Tower, human
from align.cli.memory_plan import Estimate, Work, trainer
from align.recipe.adapter import Adapter, Quant

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
    """One change if one is enough, else the changes one after the other, those first that change no result."""
    for words, changed in changes(asked):
        if changed.total <= budget:
            return [words], changed
    said: list[str] = []
    while True:
        step = next(((words, c) for words, c in changes(asked) if c.total < 0.98 * asked.total), None)
        if step is None:
            return None
        said, asked = [*[w for w in said if w.partition(":")[0] != step[0].partition(":")[0]], step[0]], step[1]
        if asked.total <= budget:
            return said, asked


def changes(asked: Asked) -> Iterator[tuple[str, Asked]]:
    """Settings that save memory, and the trainer under each: those of computing first, then those of numbers, then
    those that take more devices."""
    work, adapter = asked.work, asked.adapter
    if not work.checkpointing:
        yield (
            "`model.gradient_checkpointing: true`",
            replace(asked, work=replace(work, checkpointing=True)),
        )
    tokens = work.tokens // 2
    while tokens >= max(SMALLEST, asked.longest):
        yield f"`packing.max_tokens: {tokens}`", replace(asked, work=replace(work, tokens=tokens, several=True))
        tokens //= 2
    if work.optimizer == "adamw" and work.zero == 0:
        yield "`optim.name: adamw_8bit`", replace(asked, work=replace(work, optimizer="adamw_8bit"))
    if adapter.kind == "lora" and not adapter.mixed and asked.sizes.experts == 1:
        packed = adapter.model_copy(update={"kind": "qlora", "quant": Quant()})
        yield "`adapter.kind: qlora`", replace(asked, adapter=packed)
    if adapter.kind == "full" and asked.table is None:
        yield "`adapter.kind: lora`", replace(asked, adapter=Adapter())
    if adapter.quant is None and work.optimizer == "adamw":
        ranks = max(2, 2 * work.ranks if work.zero == 3 else work.ranks)
        while ranks <= MOST_RANKS:
            spread = replace(work, zero=3, ranks=ranks)
            yield f"`placement.trainer: {{ranks: {ranks}, strategy: zero3}}`", replace(asked, work=spread)
            ranks *= 2
