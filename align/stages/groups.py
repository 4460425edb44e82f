"""From scored groups to trees, and the prompts that a turn draws. Pure functions of their arguments."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from align.data.order import epoch_order
from align.errors import RecipeError
from align.objectives import Grouped, before_whitening
from align.protocols.fleet import Completion, Group, PromptItem, group_seed
from align.protocols.scorer import ScoreTable
from align.protocols.trainer import Metrics
from align.protocols.trees import Segment, Tree
from align.recipe.objectives import Objectives

TRUNCATED = "truncated"  # the objective of `rollout.truncated: penalise`
_NO_SIGNAL = 1e-7  # whitening leaves a rounding residue where the advantages of a group are all zero


@dataclass(frozen=True)
class PromptCursor:
    """The prompts of a stage as one endless stream, epoch after epoch, each epoch in an order of its own.

    All is arithmetic of (order_seed, position): a checkpoint only needs how many were drawn. A group id is
    epoch * rows + row, unique in the stage; its seed is the hash of (run seed, stage, group id).
    """

    prompts: Sequence[PromptItem]
    run_seed: int
    stage_id: str
    order_seed: int

    def take(self, first: int, count: int) -> list[PromptItem]:
        """The `count` prompts from position `first` of the stream, in order of group id."""
        rows, ids, end = len(self.prompts), [], first + count
        for epoch in range(first // rows, (end - 1) // rows + 1):
            begin = epoch * rows
            order = epoch_order(rows, self.order_seed, epoch)
            ids += [begin + int(row) for row in order[max(first - begin, 0) : end - begin]]
        return self.of(sorted(ids))

    def of(self, ids: Iterable[int]) -> list[PromptItem]:
        """The prompts of these group ids, with the seeds they always have."""
        rows = len(self.prompts)
        return [
            replace(self.prompts[i % rows], group_id=i, seed=group_seed(self.run_seed, self.stage_id, i)) for i in ids
        ]


def group_ids(groups: Sequence[Group]) -> np.ndarray:
    """i64[S]: the group of each completion, in the order of a score table's rows."""
    ids = [group.prompt.group_id for group in groups for _ in group.completions]
    return np.asarray(ids, dtype=np.int64)


def penalise_truncated(
    groups: Sequence[Group], table: ScoreTable, objectives: Objectives, penalty: float
) -> tuple[ScoreTable, Objectives]:
    """The table with one more objective, `truncated`: a cost of 1 where max_tokens cut the completion off, else 0, with
    `penalty` as its weight.

    An objective of its own is defined for every combiner and any number of objectives; a number taken from each score
    would count as often as there are objectives, in units of each. Missing (NaN) where no objective is known, so that
    a completion which could not be scored does not come back into the training by its length alone.
    """
    refuse_second_truncated(table.objectives)
    cut = np.asarray([c.truncated for group in groups for c in group.completions], dtype=np.float32)
    cut[np.isnan(table.scores).all(axis=1)] = np.nan
    more = replace(
        table,
        objectives=(*table.objectives, TRUNCATED),
        kinds=(*table.kinds, "cost"),
        scores=np.concatenate([table.scores, cut[:, None]], axis=1),
    )
    return more, with_penalty(objectives, penalty)


def refuse_second_truncated(names: Iterable[str]) -> None:
    if TRUNCATED in names:
        raise RecipeError(
            f"`rollout.truncated: penalise` adds an objective {TRUNCATED!r}, and a reward of this stage has that name",
            where="rollout.truncated",
            remedy="rename the reward's with `as:`, or use `truncated: keep`",
        )


def with_penalty(objectives: Objectives, penalty: float) -> Objectives:
    """The objectives of a stage with the weight of `truncated` among them."""
    return objectives.model_copy(update={"weights": {**objectives.weights, TRUNCATED: penalty}})


def untrained(groups: Sequence[Group], table: ScoreTable, truncated: Literal["mask", "keep", "penalise"]) -> np.ndarray:
    """bool[S]: completions that must not be trained on: of a dropped group, empty, or truncated where that masks."""
    dropped = set(table.dropped)
    flags = [
        index in dropped or not c.length or (truncated == "mask" and c.truncated)
        for index, group in enumerate(groups)
        for c in group.completions
    ]
    return np.asarray(flags, dtype=bool)


def to_trees(groups: Sequence[Group], advantages: np.ndarray, masked: np.ndarray) -> list[Tree]:
    """A tree per group: the prompt, and a branch per completion with its advantage on every token; of an episode that
    began anew, a branch for each of its sequences, which losses count as one.

    advantages f32[S]; NaN (no objective could be scored) or masked bool[S] leaves the branch without a scored token.
    """
    assert advantages.shape == masked.shape == (sum(len(g.completions) for g in groups),)
    trees, first = [], 0
    for group in groups:
        rows = range(first, first + len(group.completions))
        first += len(group.completions)
        branches = [
            branch
            for c, i in zip(group.completions, rows, strict=True)
            for branch in _branches(c, float(advantages[i]), bool(masked[i]))
        ]
        ids = group.prompt.token_ids
        trunk = Segment(token_ids=ids, loss_mask=np.zeros(len(ids), dtype=bool), media=group.prompt.media)
        if branches:
            tree = Tree(id=group.prompt.group_id, trunk=trunk, branches=tuple(branches), origin=group.prompt.origin)
            trees.append(tree)
    return trees


def _branches(completion: Completion, advantage: float, masked: bool) -> list[Segment]:
    # an empty completion has no token to predict; the packer refuses an empty segment
    kept = [one for one in completion.sequences if len(one.token_ids)]
    trained = not masked and bool(np.isfinite(advantage))
    branches: list[Segment] = []
    for one in kept:
        scored = one.sampled & trained
        branch = Segment(
            token_ids=one.token_ids,
            loss_mask=scored,
            advantages=np.where(scored, np.float32(advantage if trained else 0.0), np.float32(0.0)),
            behavior_logps=one.logps,
            versions=one.versions,
            media=one.media,
            follows=bool(branches),
        )
        branches.append(branch)
    return branches


def group_metrics(groups: Sequence[Group], advantages: np.ndarray, masked: np.ndarray, version: int) -> Metrics:
    """Counts of a turn: lengths, truncated and masked shares, groups without signal, ages of the tokens."""
    completions = [c for g in groups for c in g.completions]
    drawn = [c for c in completions if not c.lost] or completions
    lengths = np.asarray([c.length for c in drawn], dtype=np.float64)
    ends = np.cumsum([len(g.completions) for g in groups])[:-1]
    shares = zip(np.split(advantages, ends), np.split(masked, ends), strict=True)
    live = [_has_signal(a[~out]) for a, out in shares]
    ages = np.concatenate([version - c.sampled_versions for c in completions]) if lengths.sum() else np.zeros(1)
    return {
        "completion/mean_length": float(lengths.mean()),
        "completion/max_length": float(lengths.max()),
        "completion/truncated": float(np.mean([c.truncated for c in drawn])),
        "completion/masked": float(np.mean(masked | ~np.isfinite(advantages))),
        "groups/total": float(len(groups)),
        "groups/dead": float(len(groups) - sum(live)),
        "staleness/mean": float(ages.mean()),
        "staleness/max": float(ages.max()),
        "tokens/generated": float(lengths.sum()),
    }


def carries_signal(
    group: Group,
    table: ScoreTable,
    objectives: Objectives,
    truncated: Literal["mask", "keep", "penalise"],
    penalty: float,
    state: Mapping[str, Any],
    step: int,
) -> bool:
    """Whether one scored group gives any completion that is trained an advantage other than 0, before whitening, which
    only the whole batch defines: what dynamic sampling asks (DAPO, 2503.14476, eq. 11). Objectives weigh as `state`,
    the last step's, leaves them."""
    if np.isinf(table.scores).any():
        return True  # `combine` refuses it with a message: it must not be replaced unheard
    masked = untrained([group], table, truncated)
    if truncated == "penalise":
        table, objectives = penalise_truncated([group], table, objectives, penalty)
    alone = Grouped(np.zeros(len(table.scores), dtype=np.int64), 1)
    scores = table.scores.astype(np.float64)
    found = before_whitening(scores, alone, table.objectives, table.kinds, objectives, state, step)
    return _has_signal(found[~masked])


def _has_signal(advantages: np.ndarray) -> bool:
    known = advantages[np.isfinite(advantages)]
    return bool(np.any(np.abs(known) > _NO_SIGNAL))
