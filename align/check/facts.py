"""What the rows that were read say about a stage's data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from align.data.audit import DataReport
from align.protocols.fleet import PromptItem
from align.protocols.trees import Tree
from align.recipe.capabilities import StageBase
from align.recipe.environment import Environment


@dataclass
class DataFacts:
    """What the rows that were read say about a stage's data.

    whole: every row was read, so that `rows` is the epoch's size. longest, mean: tokens of a tree, or of a prompt.
    patches: of its images, for each token, on average; most_patches: of one tree's or prompt's.
    shown: rows as the model sees them, in lines. trees: of rows that a loss learns from. prompts: those that are
    sampled from, as many as were read. openings: of a stage with environments, the longest prompt that each of them
    has, with the tools that stand in it as text.
    """

    report: DataReport | None = None
    rows: int = 0
    whole: bool = False
    longest: int = 0
    mean: float = 0.0
    patches: float = 0.0
    most_patches: int = 0
    notes: list[str] = field(default_factory=list)
    shown: list[str] = field(default_factory=list)
    trees: Sequence[Tree] = ()
    prompts: Sequence[PromptItem] = ()
    openings: Sequence[int] = ()

    def sampled(self, stage: StageBase) -> int:
        """Tokens of the longest prompt with all that may follow it in an engine."""
        return self._longest(stage, lambda world, turn: world.context_tokens(turn))

    def trained(self, stage: StageBase) -> int:
        """Tokens of the longest prompt with all that may be trained on of one of its completions."""
        return self._longest(stage, lambda world, turn: world.trained_tokens(turn))

    def _longest(self, stage: StageBase, more: Callable[[Environment, int], int]) -> int:
        assert stage.engines is not None
        turn = stage.engines.max_tokens
        if not stage.worlds:
            return self.longest + turn
        return max(n + more(world, turn) for n, world in zip(self.openings, stage.worlds, strict=True))

    def measure(self, items: Sequence[Tree | PromptItem]) -> None:
        """How many they are, and how large."""
        lengths = [_tokens(item) for item in items]
        patches = [sum(medium.patches for medium in item.media) for item in items]
        self.rows, self.longest, self.mean = len(items), max(lengths), sum(lengths) / len(lengths)
        self.patches, self.most_patches = sum(patches) / sum(lengths), max(patches)


def _tokens(item: Tree | PromptItem) -> int:
    return item.tokens if isinstance(item, Tree) else len(item.token_ids)
