"""`align soup`: interpolate adapters, exactly. One or a whole grid; with a recipe, examined without any training."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from align.check.launch import divided, exit_code, outcome_lines
from align.cli.arguments import add_parallel, add_stage, whole
from align.cli.pareto import gather, publish
from align.errors import RecipeError, UserError
from align.experiments.children import run_all
from align.experiments.front import front
from align.experiments.grid import simplex
from align.experiments.runs import chosen, exams
from align.experiments.sweep import child_of
from align.hub import resolve_model_folder
from align.recipe.capabilities import JudgingStage
from align.recipe.engines import facts_of, those
from align.recipe.load import load_recipe
from align.recipe.schema import Recipe
from align.stages.manifest import require_artefact

if TYPE_CHECKING:
    from align.export.soup import SoupReport

STAGE = "soup"  # of the recipes that examine: merges base and soup


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapters", nargs="+", metavar="ADAPTER", help="peft adapters of one base: folders or hub ids")
    how = parser.add_mutually_exclusive_group(required=True)
    how.add_argument("--grid", type=whole(2), metavar="N", help="all weights that add up to 1, N along an edge")
    how.add_argument(
        "--weights", type=_numbers, action="append", metavar="0.3,0.7", help="one for each adapter; may be repeated"
    )
    parser.add_argument(
        "--out", required=True, metavar="FOLDER", help="new folder; of several soups, one below it for each"
    )
    parser.add_argument("--base", metavar="MODEL", help="of all adapters, where their folders name it differently")
    parser.add_argument(
        "--other-base", action="store_true", help="although they were trained on another, or on several"
    )
    parser.add_argument(
        "--recipe", metavar="RECIPE", help="examine every soup by this recipe's evaluate stage; the front"
    )
    add_stage(parser, "evaluate")
    add_parallel(parser)
    parser.add_argument("--resume", action="store_true", help="keep soups and examinations that are there")


def run(arguments: argparse.Namespace) -> int:
    """Write the soups, and examine them where a recipe is given. Raises UserError or ExportError.

    arguments: adapters, weights (lists of numbers), grid (points or None), base, out, recipe, stage, parallel, resume.
    """
    adapters = [resolve_model_folder(word) for word in arguments.adapters]
    base = resolve_model_folder(arguments.base, weights=False) if arguments.base else None
    for folder in adapters:
        require_artefact(folder)
    vectors = _vectors(arguments, len(adapters))
    recipe = load_recipe(arguments.recipe) if arguments.recipe else None
    stage = chosen(exams(recipe), arguments.stage, "evaluate stage", arguments.recipe) if recipe else None
    out = Path(arguments.out).absolute()
    alone = len(vectors) == 1 and recipe is None
    soups: list[tuple[str, SoupReport]] = []
    for weights in vectors:
        name = "_".join(f"{weight:.6g}" for weight in weights)
        soups.append(
            (name, _soup(adapters, weights, out if alone else out / name, base, arguments.other_base, arguments.resume))
        )
    if recipe is None or stage is None:
        return 0
    return _examine(arguments, recipe, stage, soups, out)


def _numbers(text: str) -> list[float]:
    try:
        found = [float(word) for word in text.split(",")]
    except ValueError:
        found = [math.nan]
    if not all(map(math.isfinite, found)):
        raise argparse.ArgumentTypeError(f"{text!r}: give a number for each adapter, such as 0.3,0.7")
    return found


def _vectors(arguments: argparse.Namespace, count: int) -> Sequence[Sequence[float]]:
    if arguments.weights:
        given: list[list[float]] = arguments.weights
        return given
    if count < 2:
        raise UserError("a grid needs two adapters", where="--grid", remedy="name more, or give --weights")
    return [list(vector.values()) for vector in simplex([str(n) for n in range(count)], arguments.grid)]


def _soup(
    adapters: Sequence[Path], weights: Sequence[float], out: Path, base: Path | None, other: bool, resume: bool
) -> SoupReport:
    from align.export.soup import kept, soup  # torch: only once the folders are there

    found = kept(adapters, weights, out) if resume else None
    report = found or soup(adapters, weights, out, base=base, other_base=other)
    shown = ", ".join(f"{weight:g}" for weight in weights)
    print(
        f"{report.out}: weights {shown}; rank {report.rank}, {report.modules} modules, "
        f"relative error {report.error:.1e}" + (" (kept)" if found else ""),
        flush=True,
    )
    for engine in those(lambda one: one.largest_rank is not None):
        largest = facts_of(engine).largest_rank
        if largest is not None and report.rank > largest:
            print(
                f"  note: {engine} serves adapters up to rank {largest}: align merge --base {report.base} makes a model"
            )
    return report


def _examine(
    arguments: argparse.Namespace,
    recipe: Recipe,
    stage: JudgingStage,
    soups: Sequence[tuple[str, SoupReport]],
    out: Path,
) -> int:
    """A run for each soup: base and soup merged, and the recipe's evaluate stage over it. Then the front of them."""
    recipes = [_recipe(recipe, stage, name, report, out) for name, report in soups]
    free, _ = divided(recipes[0], arguments.parallel)
    children = [child_of(one, out / "recipes") for one in recipes]
    folder = Path(arguments.recipe).absolute().parent
    outcomes = run_all(children, free, plugins=folder, logs=out / "logs", tell=lambda text: print(text, flush=True))
    print("\n".join(["", *outcome_lines(outcomes), ""]))
    finished = [one.run_folder for one, o in zip(recipes, outcomes, strict=True) if o.state == "finished"]
    if len(finished) > 1:
        models, said = gather(finished, stage.id, STAGE)
        publish(front(models), said, out)
    return exit_code(outcomes)


def _recipe(recipe: Recipe, stage: JudgingStage, name: str, report: SoupReport, out: Path) -> Recipe:
    data = recipe.model_dump(mode="json", by_alias=True)
    model = {key: value for key, value in data["model"].items() if key not in ("config", "tokenizer", "revision")}
    exam = next(one for one in data["stages"] if one["id"] == stage.id)
    if stage.id == STAGE:
        raise RecipeError(f"the evaluate stage is called {STAGE!r}", where="stages", remedy="give it another id")
    return Recipe.model_validate(
        {
            **data,
            "name": name,
            "output": str(out / "runs"),
            "model": {**model, "path": report.base, "adapter": str(report.out)},
            "stages": [{"id": STAGE, "kind": "merge"}, {**exam, "of": [STAGE]}],
        }
    )
