"""A recipe's `objectives` for a person, in the plan that `align check` prints."""

from __future__ import annotations

from collections.abc import Mapping

from align.recipe.objectives import Constraint, Gate, Objectives


def objective_words(config: Objectives) -> str:
    weights = [f"{name} {weight:g}" for name, weight in config.weights.items()]
    for name, points in config.schedule.items():
        weights.append(f"{name} " + " to ".join(f"{weight:g} at step {step}" for step, weight in points))
    said = [f"{config.combine} by weight ({', '.join(weights) or 'each 1'})"]
    said += [_limit(name, constraint) for name, constraint in config.constraints.items()]
    said += [_gate(name, gate) for name, gate in config.gates.items()]
    if config.reference_point:
        said.append(f"reference point ({_numbers(config.reference_point)})")
    compared = {"group": "the group", "leave_one_out": "the others of the group", "batch": "the batch"}
    said.append(f"compared with {compared[config.baseline]}")
    return "; ".join(said)


def _limit(name: str, constraint: Constraint) -> str:
    side = "at least" if constraint.max is None else "at most"
    return f"{name} {side} {constraint.limit:g} (lambda up to {constraint.lambda_max:g})"


def _gate(name: str, gate: Gate) -> str:
    bounds = {"at least": gate.at_least, "at most": gate.at_most}
    opens = " and ".join(f"{word} {bound:g}" for word, bound in bounds.items() if bound is not None)
    return f"{name} only where {gate.when} is {opens}, else {'missing' if gate.otherwise == 'mask' else gate.otherwise}"


def _numbers(values: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in values.items())
