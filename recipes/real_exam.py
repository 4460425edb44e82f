"""The exam of real.yaml: what a completion is judged by depends on the part of the exam that its row belongs to."""

from __future__ import annotations

from collections.abc import Sequence

from rewards import Objective, Sample, Score, reward
from rewards.builtins._ifeval import parse  # what the reward `ifeval` is made of
from rewards.builtins.length import length
from rewards.builtins.overlap import rouge_l

SHARE = Objective(range=(0, 1))
NAMES = ("follows", "overlap", "length", "elsewhere", "knows")
WORDS = 14  # as the recipe has it


@reward(objectives=dict.fromkeys(NAMES, SHARE))
def exam(samples: Sequence[Sample]) -> list[Score]:
    """Of held-out questions what training is paid by: follows, the share of the instructions that are followed;
    overlap, ROUGE-L with the documentation; length. elsewhere: the share that is followed in prompts about other
    things. knows: whether the answer to a general question has the right word in it."""
    return [Score({**dict.fromkeys(NAMES), **PARTS[s.row["part"]](s)}) for s in samples]


def _docs(sample: Sample) -> dict[str, float]:
    [long] = length([sample], target=WORDS, unit="words")
    return {"follows": _followed(sample), "overlap": rouge_l(sample.completion, [sample.row["answer"]]), "length": long}


def _elsewhere(sample: Sample) -> dict[str, float]:
    return {"elsewhere": _followed(sample)}


def _question(sample: Sample) -> dict[str, float]:
    answer = sample.row["answer"]
    right = any(word.lower() in sample.completion.lower() for word in ([answer] if isinstance(answer, str) else answer))
    return {"knows": float(right)}


PARTS = {"docs": _docs, "elsewhere": _elsewhere, "question": _question}


def _followed(sample: Sample) -> float:
    instructions = parse(sample.row["instruction_id_list"], sample.row["kwargs"])
    return sum(one.followed_by(sample.completion) for one in instructions) / len(instructions)
