"""Which losses take rows with a weight of their own, and what a prompt's weight does."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from align.errors import DataError
from align.losses import Losses
from align.protocols.fleet import Group
from align.protocols.trees import Tree
from align.recipe.parts import LossTerm


def refuse_weights(trees: Sequence[Tree], losses: Sequence[LossTerm]) -> None:
    """Raise DataError where a row has another weight than 1 and a loss would pay no heed to it."""
    if not losses:
        return
    deaf = [(loss, term) for loss, term in zip(Losses.of(losses), losses, strict=True) if not loss.needs.weights]
    if not deaf:
        return
    loss, term = deaf[0]
    for tree in trees:
        columns = tree.sequences[0].columns
        if columns.get("weight", 1.0) != 1.0:
            variant = term.options.get("variant")
            name = f"{loss.name!r}" + (f" (variant {variant})" if variant else "")
            why = ": its terms join several rows of a batch" if loss.needs.scope == "batch" else ""
            raise DataError(
                f"the row has weight {columns['weight']:g}, and the loss {name} takes no weights{why}",
                where=tree.origin or None,
                remedy="give every row weight 1 or no column `weight`, or choose another loss or variant; a loss of "
                "your own multiplies its terms (`align.losses.reduce.weighted`) and says `weights=True` in `needs`",
            )


def by_prompt(groups: Sequence[Group]) -> np.ndarray:
    """f32[S]: the weight of each completion's prompt. Advantages are multiplied by it after all normalisation, so that
    it weighs against other prompts and changes nothing within a group."""
    return np.asarray([group.prompt.weight for group in groups for _ in group.completions], dtype=np.float32)
