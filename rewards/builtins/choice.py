"""Does the completion choose the right option? 1 or 0.

Chosen is by letter, "(B)", "B.", "option B" or B alone, or by the words of one option. A completion that names none, or
several where it should decide, is wrong; how the place of the answer is found is said at `_choices.chosen`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rewards.api import Objective, Sample, reward
from rewards.builtins._answers import gold, row_gold
from rewards.builtins._choices import Options, as_letter, chosen, lettered, listed_options


def _check(options: list[str] | str | None = None) -> None:
    if isinstance(options, list):
        lettered(options)


def _gold(row: Mapping[str, Any], *, column: str | None = None, options: list[str] | str | None = None) -> str:
    """The letter where the options are known, else the answer as it stands."""
    answer = row_gold(row, column)
    known = _own_options(row, options)
    return f"({as_letter(answer, known)})" if known else str(answer)


@reward(objectives={"choice": Objective(range=(0, 1))}, validate=_check, gold=_gold)
def choice(
    samples: Sequence[Sample], *, options: list[str] | str | None = None, column: str | None = None
) -> list[float]:
    """1 where the completion chooses the gold option, else 0.

    Args:
        options: the texts of the options, the same for all rows; or the row's column with them (a list, or letter ->
            text); default: what the prompt lists as "(A) text", "A. text" or "A) text", else letters alone.
        column: the row's column with the gold answer, a letter, an option's text or, with options, its index from 0;
            default: the first of reference_answer, answer, solution, ground_truth, target, label that the row has.
    """
    scores = []
    for sample in samples:
        known = _own_options(sample.row, options) or listed_options(prompt_text(sample))
        right = as_letter(gold(sample, column), known)
        scores.append(float(chosen(sample.completion, known) == right))
    return scores


def _own_options(row: Mapping[str, Any], options: list[str] | str | None) -> Options:
    """From the recipe or the row; empty where neither has them."""
    found = row_gold(row, options) if isinstance(options, str) else options
    if isinstance(found, Mapping):
        return {str(letter): str(text) for letter, text in found.items()}
    if isinstance(found, str):
        raise ValueError(f"the options of the row are the text {found!r}; a list or letter -> text is needed")
    return {} if found is None else lettered(found)


def prompt_text(sample: Sample) -> str:
    """The text of the prompt's last turn; "" where the sample has no messages."""
    content = sample.messages[-1].get("content") if sample.messages else ""
    if isinstance(content, list | tuple):
        return "\n".join(part.get("text") or "" for part in content if isinstance(part, Mapping))
    return str(content or "")
