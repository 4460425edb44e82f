"""What the verbs that start runs share: how many fit beside each other, and the table of what came of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from align.check.machine import Machine, check_fits, stage_roles
from align.errors import PlacementError
from align.experiments.children import Outcome, Slot, slots
from align.recipe.schema import Recipe
from align.report.table import text_table


def divided(recipe: Recipe, parallel: int) -> tuple[list[Slot], Machine]:
    """The machine in `parallel` parts that each hold the recipe. Raises PlacementError naming how many fit."""
    machine = Machine.here()
    part = _part(machine, parallel)
    try:
        _check(recipe, machine, parallel)
    except PlacementError as error:
        fit = _largest(recipe, machine, parallel)
        if not fit:
            raise
        raise PlacementError(
            f"{parallel} runs at once do not fit: of {machine.cores} cores and {machine.gpus:g} GPUs each would have "
            f"{part.cores} and {part.gpus:g}: {error.what}",
            where="--parallel",
            remedy=f"at most {fit}; or lower `placement:`",
        ) from error
    return slots(parallel, machine.cores, int(machine.gpus)), part


def _part(machine: Machine, parallel: int) -> Machine:
    return replace(machine, cores=max(1, machine.cores // parallel), gpus=int(machine.gpus) // parallel)


def _check(recipe: Recipe, machine: Machine, parallel: int) -> None:
    if parallel > machine.cores or 0 < machine.gpus < parallel:
        raise PlacementError("each run needs a core, and a GPU where there are any", where="--parallel")
    part = _part(machine, parallel)
    for stage in recipe.stages:
        check_fits(stage_roles(recipe, stage, part), part)


def _largest(recipe: Recipe, machine: Machine, below: int) -> int:
    for parallel in range(min(below - 1, machine.cores), 0, -1):
        try:
            _check(recipe, machine, parallel)
        except PlacementError:
            continue
        return parallel
    return 0


def outcome_lines(outcomes: Sequence[Outcome]) -> list[str]:
    rows = [
        ["run", "state", "seconds"],
        *([o.label, o.state, f"{o.seconds:.0f}" if o.seconds else ""] for o in outcomes),
    ]
    return [*text_table(rows), *(f"{o.label}: {o.message}" for o in outcomes if o.message)]


def exit_code(outcomes: Sequence[Outcome]) -> int:
    return 0 if all(o.state in ("kept", "finished") for o in outcomes) else 1
