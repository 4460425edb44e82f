"""`align sweep`: one run for each vector of objective weights. From shared first stages; no torch here."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

from align.check.findings import Findings
from align.check.inputs import Rewards
from align.check.launch import divided, exit_code, outcome_lines
from align.check.validate import validate
from align.check.worlds import Worlds
from align.cli.arguments import add_parallel, add_recipe, add_stage, whole
from align.errors import RecipeError, RunFolderError
from align.experiments.children import Child, Outcome, Slot, run_all
from align.experiments.grid import Weights, parse_weights, simplex
from align.experiments.runs import SWEEP, chosen, exams, online_stages
from align.experiments.sweep import Planned, child_of, is_done, plan, take_over
from align.recipe.capabilities import SamplingStage
from align.recipe.load import load_document
from align.recipe.schema import Recipe


def add(parser: argparse.ArgumentParser) -> None:
    add_recipe(parser)
    add_stage(parser, "online")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument(
        "--simplex", type=whole(2), metavar="N", help="a grid of weights that add up to 1, N along an edge"
    )
    which.add_argument("--weights", action="append", default=[], metavar="a=1,b=0.5", help="one run; may be repeated")
    parser.add_argument(
        "--seeds", type=_seeds, default=[], metavar="0,1,2", help="each vector with each (default: the recipe's)"
    )
    add_parallel(parser)
    parser.add_argument("--resume", action="store_true", help="finished runs are kept, interrupted ones continue")


def run(arguments: argparse.Namespace) -> int:
    """Run them all; 0 where each of them finished, 1 where one failed. Raises AlignError with place and remedy.

    arguments: recipe, overrides, stage (id or None), simplex (points or None), weights (texts), seeds, parallel,
    resume.
    """
    recipe, document = load_document(arguments.recipe, arguments.overrides)
    folder = Path(arguments.recipe).absolute().parent
    stage = chosen(online_stages(recipe), arguments.stage, "online stage", document.name)
    free, part = divided(recipe, arguments.parallel)
    plugins = validate(recipe, folder, document=document, machine=part).plugins
    vectors = _vectors(arguments, stage, folder)
    planned = plan(recipe, stage.id, vectors, arguments.seeds)
    root = recipe.run_folder / SWEEP
    if root.exists() and not arguments.resume:
        raise RunFolderError(
            "the sweep exists", where=root, remedy="--resume continues it, with more weights too; name=<another>"
        )
    print(f"{len(planned)} runs, {len(free)} at once, in {root}", flush=True)
    outcomes = _run(planned, free, root, folder, plugins)
    print("\n".join(["", *outcome_lines(outcomes)]))
    if exams(recipe):
        print(f"\nthe front: align pareto {root}")
    return exit_code(outcomes)


def _seeds(text: str) -> list[int]:
    return [whole(0)(word) for word in text.split(",")]


def _vectors(arguments: argparse.Namespace, stage: SamplingStage, folder: Path) -> Sequence[Weights]:
    """Weight vectors as asked for, over objectives that the stage's rewards and its environment give."""
    found = Findings(None)
    names = Rewards(folder).objectives(stage.rewards, stage.id, "rewards", found)
    if stage.worlds:
        names = Worlds(folder).objectives(stage, names, found)
    found.raise_any()
    assert names is not None, "what could not be described was raised"
    if arguments.simplex:
        return simplex(list(names), arguments.simplex)
    vectors = [parse_weights(text) for text in arguments.weights]
    for weights in vectors:
        if set(weights) != set(names):
            odd = sorted(set(weights) ^ set(names))
            raise RecipeError(
                f"the weights {', '.join(weights)} and the objectives of {stage.id!r} differ in {odd[0]!r}",
                where="--weights",
                remedy=f"give each of them one: {','.join(f'{name}=1' for name in names)}",
            )
    return vectors


def _run(
    planned: Sequence[Planned], free: Sequence[Slot], root: Path, folder: Path, plugins: Mapping[str, str]
) -> list[Outcome]:
    """Shared stages first, then every run that is not finished. A run without its shared stages is not started."""

    def start(recipes: Sequence[Recipe]) -> dict[str, Outcome]:
        kept = {recipe.name: Outcome(recipe.name, "kept") for recipe in recipes if is_done(recipe, plugins, folder)}
        children: list[Child] = [child_of(recipe, root / "recipes") for recipe in recipes if recipe.name not in kept]
        ran = run_all(children, free, plugins=folder, logs=root / "logs", tell=lambda text: print(text, flush=True))
        return kept | {outcome.label: outcome for outcome in ran}

    shared = {one.shared.name: one.shared for one in planned if one.shared is not None}
    first = start(list(shared.values()))
    ready: list[Recipe] = []
    outcomes: dict[str, Outcome] = {}
    for one in planned:
        before = first[one.shared.name] if one.shared is not None else None
        if before is not None and before.state not in ("kept", "finished"):
            outcomes[one.label] = Outcome(one.label, "not started", message=f"{before.label}: {before.message}")
            continue
        if one.shared is not None:
            take_over(one.recipe.run_folder, one.shared)
        ready.append(one.recipe)
    outcomes |= start(ready)
    return [*first.values(), *(outcomes[one.label] for one in planned)]
