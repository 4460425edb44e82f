"""Is the completion in the wanted language? 1 or 0.

The language is told by script, frequent words and letters: `_language.py` says which languages are known, and what it
cannot tell. A completion without any letters is in no language: its score is missing.
"""

from __future__ import annotations

from collections.abc import Sequence

from rewards.api import Objective, Sample, reward
from rewards.builtins._answers import row_gold
from rewards.builtins._language import check_language, detect, has_letters


def _check(language: str | None = None, column: str | None = None) -> None:
    if (language is None) == (column is None):
        raise ValueError("give `language` (such as de) or `column` (the row's column that names it)")
    if language is not None:
        check_language(language)


@reward(objectives={"language": Objective(range=(0, 1))}, validate=_check)
def language(
    samples: Sequence[Sample], *, language: str | None = None, column: str | None = None
) -> list[float | None]:
    """1 where most of the completion is in the wanted language, 0 where not or where that cannot be told, missing where
    it has no letters.

    Args:
        language: the ISO 639-1 code of all completions, such as de. column: the row's column that holds it instead.
    """
    scores: list[float | None] = []
    for sample in samples:
        wanted = check_language(str(row_gold(sample.row, column) if language is None else language))
        if not has_letters(sample.completion):
            scores.append(None)
        else:
            scores.append(float(detect(sample.completion) == wanted))
    return scores
