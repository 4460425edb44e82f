"""SFT, preference, reward model and classification stages: one update for each batch of trees.

Of prepared trees turn k's batch is arithmetic of (seed, k): no iterator state exists, so a resumed stage draws what an
undisturbed one would have drawn. Of streams the next batch follows from a cursor, which every checkpoint keeps.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from align.data.order import BatchPlan
from align.errors import DataError
from align.protocols.trainer import Metrics, Trainer
from align.protocols.trees import Tree

EVAL_NAMES = {"loss/total": "eval/loss", "rewards/accuracies": "eval/accuracies"}


class Batches(Protocol):
    """What a stage trains on. total: its steps."""

    @property
    def total(self) -> int: ...

    async def of(self, step: int) -> list[Tree]:
        """The batch of step `step` (from 0); they are asked for in order."""
        ...

    def extra(self) -> dict[str, Any]:
        """What a checkpoint keeps of them, as JSON."""
        ...

    def restore(self, extra: dict[str, Any]) -> None:
        """Go on where that was kept; {} is the beginning."""
        ...


@dataclass(frozen=True)
class PreparedBatches:
    """Batches of rows that are all there; each in order of tree id."""

    trees: Sequence[Tree]
    order: BatchPlan

    @property
    def total(self) -> int:
        return self.order.total

    async def of(self, step: int) -> list[Tree]:
        return sorted((self.trees[row] for row in self.order.batch(step)), key=lambda tree: tree.id)

    def extra(self) -> dict[str, Any]:
        return {}

    def restore(self, extra: dict[str, Any]) -> None: ...


def offline_turn(trainer: Trainer, batches: Batches) -> Callable[[int], Awaitable[Metrics]]:
    """The coroutine that performs turn k: one update over its batch."""

    async def turn(step: int) -> Metrics:
        return await trainer.step(await batches.of(step), step=step, progress=step / batches.total)

    return turn


def offline_evaluation(trainer: Trainer, trees: Sequence[Tree]) -> Callable[[], Awaitable[Metrics]]:
    """The stage's loss metrics over all of `trees`, on the same forward, named "eval/..."."""

    async def evaluate() -> Metrics:
        return eval_names(await trainer.evaluate(trees))

    return evaluate


def refuse_padding_at_end(trees: Sequence[Tree], pad_id: int | None) -> None:
    """Raise DataError where a sequence to be scored ends in the padding token: whoever loads the reward model in
    transformers, or the classifier, has the token before it scored."""
    for tree in trees:
        for sequence in tree.sequences:
            last = sequence if len(sequence) else tree.trunk
            if pad_id is not None and int(last.token_ids[-1]) == pad_id:
                raise DataError(
                    f"a sequence ends in the tokenizer's padding token ({pad_id}), which hides where it ends",
                    where=tree.origin or None,
                    remedy="set `pad_token` in the model's tokenizer_config.json to a token that ends no completion",
                )


def eval_names(metrics: Metrics) -> Metrics:
    """loss/total is eval/loss and rewards/accuracies eval/accuracies; any other name keeps its group below eval/."""
    return {
        EVAL_NAMES.get(name, name if name.startswith("eval/") else f"eval/{name}"): value
        for name, value in metrics.items()
    }
