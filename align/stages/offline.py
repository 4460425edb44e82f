"""SFT, preference, reward model and classification stages: batches of prepared trees in a fixed order, one update each.

Turn k's batch is arithmetic of (seed, k): no iterator state exists, so a resumed stage draws what an undisturbed one
would have drawn.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

from align.data.order import BatchPlan
from align.errors import DataError
from align.protocols.trainer import Metrics, Trainer
from align.protocols.trees import Tree

EVAL_NAMES = {"loss/total": "eval/loss", "rewards/accuracies": "eval/accuracies"}


def offline_turn(trainer: Trainer, trees: Sequence[Tree], order: BatchPlan) -> Callable[[int], Awaitable[Metrics]]:
    """The coroutine that performs turn k: one update over its batch, in order of tree id."""

    async def turn(step: int) -> Metrics:
        batch = sorted((trees[row] for row in order.batch(step)), key=lambda tree: tree.id)
        return await trainer.step(batch, step=step, progress=step / order.total)

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
