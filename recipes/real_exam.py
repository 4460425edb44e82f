"""The exam of real.yaml: what a completion is judged by depends on the part of the exam that its row belongs to."""

from __future__ import annotations

from collections.abc import Sequence

from rewards import Objective, Sample, Score, reward
from rewards.builtins._ifeval import parse  # what the reward `ifeval` is made of
from rewards.builtins.overlap import rouge_l

SHARE = Objective(range=(0, 1))


@reward(objectives={"follows": SHARE, "overlap": SHARE, "elsewhere": SHARE, "knows": SHARE})
def exam(samples: Sequence[Sample]) -> list[Score]:
    """follows: the share of a held-out question's instructions that are followed; overlap: ROUGE-L with the
    documentation; elsewhere: the share that is followed in prompts about other things; knows: whether the answer to a
    general question has the right word in it."""
    return [Score(PARTS[s.row["part"]](s)) for s in samples]


def _docs(sample: Sample) -> dict[str, float | None]:
    overlap = rouge_l(sample.completion, [sample.row["answer"]])
    return {"follows": _followed(sample), "overlap": overlap, "elsewhere": None, "knows": None}


def _elsewhere(sample: Sample) -> dict[str, float | None]:
    return {"follows": None, "overlap": None, "elsewhere": _followed(sample), "knows": None}


def _question(sample: Sample) -> dict[str, float | None]:
    answer = sample.row["answer"]
    right = any(word.lower() in sample.completion.lower() for word in ([answer] if isinstance(answer, str) else answer))
    return {"follows": None, "overlap": None, "elsewhere": None, "knows": float(right)}


PARTS = {"docs": _docs, "elsewhere": _elsewhere, "question": _question}


def _followed(sample: Sample) -> float:
    instructions = parse(sample.row["instruction_id_list"], sample.row["kwargs"])
    return sum(one.followed_by(sample.completion) for one in instructions) / len(instructions)
