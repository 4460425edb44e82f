"""Does the completion follow the verifiable instructions of its prompt? IFEval's 25 kinds (2311.07911).

A row names its instructions in `instruction_id_list` and their arguments in `kwargs`, one for each, as in IFEval's
input_data.jsonl. Definitions are those of google-research/instruction_following_eval; where this differs from them
(sentences, capital words, languages) is said in `_ifeval/words.py`. Strict reads the completion as it is; loose
forgives a first or last line and asterisks. An unknown kind or argument is an error, never a score.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from rewards.api import Objective, Sample, Score, reward
from rewards.builtins._answers import row_gold
from rewards.builtins._ifeval import follows, parse


@reward(objectives={"ifeval": Objective(range=(0, 1))})
def ifeval(
    samples: Sequence[Sample],
    *,
    mode: Literal["strict", "loose"] = "strict",
    score: Literal["share", "all"] = "share",
    column: str = "instruction_id_list",
    kwargs_column: str = "kwargs",
) -> list[Score]:
    """The share of the row's instructions that the completion follows, or 1 only where it follows all.

    Args:
        mode: strict or loose. score: share (IFEval's instruction-level accuracy) or all (its prompt-level accuracy).
        column: the row's column with the list of kinds, such as "keywords:existence". kwargs_column: with the list of
            their arguments.
    """
    scores = []
    for sample in samples:
        instructions = parse(row_gold(sample.row, column), row_gold(sample.row, kwargs_column))
        followed = [follows(i, sample.completion, loose=mode == "loose") for i in instructions]
        broken = [i.kind for i, well in zip(instructions, followed, strict=True) if not well]
        value = float(not broken) if score == "all" else sum(followed) / len(followed)
        scores.append(Score(value, info={"not_followed": broken} if broken else {}))
    return scores
