"""What a classifier's outputs mean: their names, and the problem they answer. One description for the recipe, the data,
the head and the folder that is written."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Problem = Literal["single_label", "multi_label", "regression"]

# our word -> transformers' `problem_type`
PROBLEM_TYPES: dict[Problem, str] = {
    "single_label": "single_label_classification",
    "multi_label": "multi_label_classification",
    "regression": "regression",
}
_GENERIC = re.compile(r"LABEL_\d+")  # transformers' own names, which say nothing


@dataclass(frozen=True)
class Labels:
    """names: one per output of the head, K in all. problem: None where nobody said, as of a reward model, whose one
    output is a score."""

    names: tuple[str, ...]
    problem: Problem | None = None

    @classmethod
    def numbered(cls, count: int, problem: Problem | None = None) -> Labels:
        return cls(tuple(f"LABEL_{k}" for k in range(count)), problem)

    @property
    def generic(self) -> bool:
        return all(_GENERIC.fullmatch(name) for name in self.names)

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the columns in which a sequence carries its label: one index, K of 0 or 1, or K numbers."""
        if self.problem == "single_label":
            return ("class",)
        word = "labels" if self.problem == "multi_label" else "targets"
        return tuple(f"{word}/{k}" for k in range(len(self.names)))

    def agrees_with(self, other: Labels) -> bool:
        """Whether a head made for one answers the other: the same outputs, as far as both say what they are."""
        same = self.names == other.names or self.generic or other.generic
        problems = {self.problem, other.problem} - {None}
        return len(self.names) == len(other.names) and same and len(problems) < 2

    @property
    def words(self) -> str:
        """For a message, behind "a"."""
        if self == Labels.numbered(1):
            return "reward model's one score"
        shown = ", ".join(self.names[:6]) + (", ..." if len(self.names) > 6 else "")
        return f"{self.problem or 'score'} of {len(self.names)} ({shown})"

    def called(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Metrics with those of single labels (f1/<number>) under the labels' names."""
        names = {f"f1/{k}": f"f1/{name}" for k, name in enumerate(self.names)}
        return {names.get(name, name): value for name, value in metrics.items()}

    def to_config(self) -> dict[str, Any]:
        """The entries of transformers' config.json."""
        config: dict[str, Any] = {
            "id2label": {str(k): name for k, name in enumerate(self.names)},
            "label2id": {name: k for k, name in enumerate(self.names)},
        }
        return config if self.problem is None else config | {"problem_type": PROBLEM_TYPES[self.problem]}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Labels:
        """Of a sequence classifier's config.json. Where it names no labels, transformers' own default is two."""
        names = config.get("id2label") or {"0": "LABEL_0", "1": "LABEL_1"}
        ordered = tuple(str(names[key]) for key in sorted(names, key=int))
        ours: dict[str, Problem] = {theirs: problem for problem, theirs in PROBLEM_TYPES.items()}
        return cls(ordered, ours.get(str(config.get("problem_type"))))
