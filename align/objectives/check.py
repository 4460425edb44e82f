"""What of a recipe's `objectives` cannot work with the objectives that its rewards give. No torch."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from align.errors import RecipeError
from align.objectives.combiners import combiner_of
from align.plugins import is_users
from align.recipe.objectives import Constraint, Gate, Objectives


@dataclass(frozen=True, slots=True)
class Known:
    """An objective as its plugin describes it. range: the scores it may give, both ends included; None: any."""

    kind: str
    range: tuple[float, float] | None = None

    @property
    def low(self) -> float:
        return self.range[0] if self.range else float("-inf")

    @property
    def high(self) -> float:
        return self.range[1] if self.range else float("inf")

    @property
    def best(self) -> float:
        return self.low if self.kind == "cost" else self.high

    @property
    def worst(self) -> float:
        return self.high if self.kind == "cost" else self.low

    def better(self, one: float, other: float) -> bool:
        return one < other if self.kind == "cost" else one > other


def unknown_names(config: Objectives, names: Sequence[str]) -> Iterator[RecipeError]:
    """An error for every name in `config` that is none of `names`."""
    given: list[tuple[str, str]] = [(f"gates.{name}.when", gate.when) for name, gate in config.gates.items()]
    for option in ("weights", "schedule", "gates", "constraints", "reference_point"):
        given += [(f"{option}.{name}", name) for name in getattr(config, option)]
    for key, name in given:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f"did you mean `{near[0]}`? " if near else ""
            yield RecipeError(
                f"`objectives.{key}` names {name!r}, which no reward of this stage gives",
                where=f"objectives.{key}",
                remedy=f"{hint}the objectives here: {', '.join(names)}",
            )


def problems(config: Objectives, objectives: Mapping[str, Known]) -> list[RecipeError]:
    """All that is wrong with `config`, the names first: the rest is about objectives that exist."""
    unknown = list(unknown_names(config, list(objectives)))
    if unknown:
        return unknown
    found: list[RecipeError] = []
    for name, constraint in config.constraints.items():
        found += _of_constraint(name, constraint, objectives[name])
    for name, gate in config.gates.items():
        found += _of_gate(name, gate, objectives[name], objectives[gate.when])
    return found + list(_of_weights(config, objectives)) + list(_of_options(config))


def _of_options(config: Objectives) -> Iterator[RecipeError]:
    """Options that the user's combiner does not read; those of ours are refused with the recipe."""
    if is_users(config.combine):
        reads = combiner_of(config.combine).reads
        for option in config.unread(reads):
            yield RecipeError(
                f"`{option}` has no effect: {config.combine} does not read it",
                where=f"objectives.{option}",
                remedy=f"leave it out, or name it in the combiner's `reads` ({', '.join(reads) or 'none yet'})",
            )


def _of_constraint(name: str, constraint: Constraint, known: Known) -> Iterator[RecipeError]:
    key = "min" if constraint.max is None else "max"
    limit, span = constraint.limit, f"[{known.low:g}, {known.high:g}]"
    met = limit <= known.low if key == "min" else limit >= known.high
    if met or not known.low <= limit <= known.high:
        why = "is always met" if met else "can never be met"
        yield RecipeError(
            f"the constraint `{key}: {limit:g}` on {name!r} {why}: its scores lie in {span}",
            where=f"objectives.constraints.{name}.{key}",
            remedy=f"give a limit inside {span}, in the objective's own sign and units",
        )


def _of_gate(name: str, gate: Gate, known: Known, judge: Known) -> Iterator[RecipeError]:
    where = f"objectives.gates.{name}"
    low = float("-inf") if gate.at_least is None else gate.at_least
    high = float("inf") if gate.at_most is None else gate.at_most
    if low > judge.high or high < judge.low or (low <= judge.low and high >= judge.high):
        state = "never opens" if low > judge.high or high < judge.low else "is always open"
        yield RecipeError(
            f"the gate of {name!r} {state}: the scores of {gate.when!r} lie in [{judge.low:g}, {judge.high:g}]",
            where=where,
            remedy=f"give `at_least` or `at_most` a score between those of {gate.when!r}, or leave the gate out",
        )
    if gate.otherwise != "mask" and known.better(gate.otherwise, known.best):
        yield RecipeError(
            f"behind its gate {name!r} would be {gate.otherwise:g}, better than its best score {known.best:g}",
            where=f"{where}.otherwise",
            remedy="use mask, or a score as bad as a sample deserves that does not pass the gate",
        )


def _of_weights(config: Objectives, objectives: Mapping[str, Known]) -> Iterator[RecipeError]:
    """Something must be left to learn from, and what the combiner makes of it."""
    largest = {name: _largest_weight(name, config) for name in objectives}
    active = [name for name, weight in largest.items() if weight > 0]
    if not active:
        what = "every objective is constrained" if config.constraints else "every weight is 0"
        yield RecipeError(
            f"{what}: nothing is left to maximise",
            where="objectives.weights",
            remedy="give one of them a weight: `weights: {NAME: 1}`; objectives: " + ", ".join(objectives),
        )
    below = [name for name in active if objectives[name].kind == "cost" or objectives[name].low < 0]
    if config.scale == "mean" and below:
        why = "is a cost" if objectives[below[0]].kind == "cost" else "may be below 0: no range says otherwise"
        yield RecipeError(
            f"`scale: mean` divides by the mean of scores that are 0 or more, and {below[0]!r} {why}",
            where="objectives.scale",
            remedy="declare a range from 0 up where it has one, give it no weight, or use `scale: std`",
        )
    policy = combiner_of(config.combine).policy
    yield from getattr(policy, "problems", _none)(config, objectives, active)


def _none(config: Objectives, objectives: Mapping[str, Known], active: Sequence[str]) -> Iterator[RecipeError]:
    """Of combiners that can do with any objectives."""
    yield from ()


def needs_two(config: Objectives, active: Sequence[str]) -> Iterator[RecipeError]:
    """An error where a combiner that trades objectives off has only one. active: those that have a weight."""
    if len(active) == 1:
        yield RecipeError(
            f"`combine: {config.combine}` trades objectives off, and only {active[0]!r} has a weight",
            where="objectives.combine",
            remedy="use weighted_sum, or add a reward",
        )


def _largest_weight(name: str, config: Objectives) -> float:
    if name in config.schedule:
        return max(weight for _, weight in config.schedule[name])
    return config.weights.get(name, 0.0 if name in config.constraints else 1.0)
