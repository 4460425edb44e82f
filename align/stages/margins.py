"""Margins of preference pairs from rewards, computed once before a stage: m = sum_k w_k (r_k(chosen) - r_k(rejected)).

Scores are kept in `runs/.cache/margins/` by content: pairs, rewards and their source. Weights act later, so that a
study over weights scores its pairs once.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from align.errors import DataError, RewardError
from align.protocols.fleet import Group
from align.protocols.scorer import ErrorBudget
from align.protocols.trees import Tree
from align.recipe.capabilities import TrainStage
from align.stages.backend import Needs
from align.stages.context import Context, opened
from align.stages.files import write_json
from align.stages.jobs import scorer_job
from align.stages.reward_notes import NotedScorer

_CALL = 256  # pairs in one scoring call


@dataclass(frozen=True)
class PairScores:
    """names, kinds: of R objectives; scores: f32[P, 2, R] of chosen and rejected, NaN where missing; dropped: bool[P],
    pairs that an `on_error: drop_group` took out."""

    names: tuple[str, ...]
    kinds: tuple[str, ...]
    scores: np.ndarray
    dropped: np.ndarray


def require_margins(trees: Sequence[Tree]) -> None:
    """Raise DataError where a pair has no margin, for a loss that reads it."""
    for tree in trees:
        if "margin" not in tree.columns:
            raise DataError(
                "the pair has no `margin`, which the loss needs",
                where=tree.origin or None,
                remedy="give every row a number in its column `margin`, or the stage `rewards:` with weights",
            )


def refuse_own_margins(trees: Sequence[Tree]) -> None:
    """Raise DataError where a pair has a margin already, for a stage whose rewards would give another."""
    for tree in trees:
        if "margin" in tree.columns:
            raise DataError(
                "the row has a `margin` of its own, and the stage's rewards would give another",
                where=tree.origin or None,
                remedy="leave one of the two out: the column, or `rewards:`",
            )


def margins_of(found: PairScores, weights: Mapping[str, float]) -> np.ndarray:
    """f64[P]: costs enter negated, weights are by name and 1 where not given. NaN where a score of an objective whose
    weight is not 0 is missing on either side, and for dropped pairs."""
    signs = [-1.0 if kind == "cost" else 1.0 for kind in found.kinds]
    signed = np.array([weights.get(name, 1.0) for name in found.names]) * signs
    apart = found.scores[:, 0].astype(np.float64) - found.scores[:, 1]
    used = signed != 0
    return np.where(found.dropped, np.nan, apart[:, used] @ signed[used])


async def with_margins(
    context: Context, stage: TrainStage, trees: Sequence[Tree], groups: Sequence[Group], name: str
) -> list[Tree]:
    """The pairs of `trees` with their margins; those without a score are left out, counted in `<stage>/<name>.json` and
    on the screen. groups: each pair as a group of two completions, chosen first.

    Raises DataError where rows have a margin of their own, RewardError where no pair has all its scores, or a reward
    fails more often than it may.
    """
    refuse_own_margins(trees)
    found = await _scores(context, stage, groups)
    margins = margins_of(found, stage.weighed.weights if stage.weighed else {})
    known = np.isfinite(margins)
    missing = {k: int(np.isnan(found.scores[..., i]).any(axis=1).sum()) for i, k in enumerate(found.names)}
    report = {"pairs": len(trees), "left_out": int((~known).sum()), "missing": missing}
    if not known.any():
        raise RewardError(
            f"none of {len(trees)} pairs has all its scores (missing: {missing})",
            where=f"stage {stage.id!r}",
            remedy="see failures.jsonl in the stage's rewards/, or give the objective that is missing weight 0",
        )
    report |= {"mean": float(margins[known].mean()), "std": float(margins[known].std())}
    write_json(context.run.stage_folder(stage.id) / f"{name}.json", report)
    context.report.message(
        f"{stage.id}: margins of {int(known.sum())} pairs, mean {report['mean']:.4g}, std {report['std']:.4g}; "
        f"{report['left_out']} left out for lack of a score"
    )
    return [
        replace(tree, columns={**tree.columns, "margin": float(margin)})
        for tree, margin in zip(trees, margins, strict=True)
        if np.isfinite(margin)
    ]


async def _scores(context: Context, stage: TrainStage, groups: Sequence[Group]) -> PairScores:
    """From the cache, else from the stage's rewards."""
    path = context.run.path.parent / ".cache" / "margins" / f"{_key(context, stage, groups)}.npz"
    if path.is_file():
        with np.load(path, allow_pickle=False) as data:
            return PairScores(
                tuple(data["names"].tolist()), tuple(data["kinds"].tolist()), data["scores"], data["dropped"]
            )
    budget = ErrorBudget(0, 2 * len(groups))
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(context.backend.places(Needs(scorers=1)))
        [judge] = await opened(stack, context.backend.scorer(scorer_job(context, stage, stage.rewarded_by)))
        scorer = NotedScorer(judge, stage.id, frozenset(), context.report.message)  # their text is the data's own
        stack.callback(scorer.finish)
        context.record()
        tables = [await scorer.score(groups[i : i + _CALL], budget) for i in range(0, len(groups), _CALL)]
    dropped = np.zeros(len(groups), dtype=bool)
    for number, table in enumerate(tables):
        dropped[[number * _CALL + index for index in table.dropped]] = True
    first = tables[0]
    scores = np.concatenate([table.scores for table in tables]).reshape(len(groups), 2, len(first.objectives))
    found = PairScores(first.objectives, first.kinds, scores, dropped)
    _save(path, found)
    return found


def _save(path: Path, found: PairScores) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    with aside.open("wb") as file:
        np.savez(file, names=found.names, kinds=found.kinds, scores=found.scores, dropped=found.dropped)
    os.replace(aside, path)


def _key(context: Context, stage: TrainStage, groups: Sequence[Group]) -> str:
    """Of everything that decides the scores: the pairs with their rows, the rewards' options and source, the seed."""
    plugins = context.run.state["stages"][stage.id]["fingerprint"]["plugins"]
    rewards = [reward.model_dump(mode="json") for reward in stage.rewarded_by]
    digest = hashlib.sha256(json.dumps([rewards, plugins, context.recipe.seed], sort_keys=True).encode())
    for group in groups:
        texts = [completion.text for completion in group.completions]
        row = json.dumps([list(group.prompt.messages), dict(group.prompt.row), texts], sort_keys=True, default=str)
        digest.update(row.encode() + b"\0")
    return digest.hexdigest()[:32]
