"""`align check`: check a recipe, its files and plugins; show the plan.

Or, with `--suite`, what this engine can do with a model folder, tried on it: the only check that loads torch.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from align.check.plan import lines
from align.check.scratch import scratch
from align.check.validate import validate
from align.cli.arguments import add_recipe
from align.errors import UserError
from align.hub import resolve_model_folder
from align.recipe.load import load_document
from align.stages.files import require_place

MARKS = {"passed": "ok", "failed": "FAILED", "not checked": "-"}


def add(parser: argparse.ArgumentParser) -> None:
    add_recipe(parser, optional=True)
    parser.add_argument(
        "--model", metavar="FOLDER", help="with --suite: a model folder or hub id, in place of a recipe"
    )
    parser.add_argument(
        "--suite", action="store_true", help="try on it what runs do: packing, adapters, merge, engines"
    )
    parser.add_argument("--trust-remote-code", action="store_true", help="with --suite: run the model's own code")
    parser.add_argument(
        "--show", type=int, default=0, metavar="N", help="print N rows of each source as the model sees them"
    )
    parser.add_argument("--data", action="store_true", help="read every row, not only the first 1,000 of each source")


def run(arguments: argparse.Namespace) -> int:
    """Check what is named; 0 where it can run. Raises UserError naming every problem."""
    if not (arguments.suite or arguments.model is not None or arguments.recipe is None):
        with scratch():  # what plugins put aside while they are described
            return _recipe(arguments)
    if not arguments.suite or arguments.model is None or arguments.recipe is not None:
        raise UserError(
            "a check is of a recipe, or of a model",
            remedy="write `align check recipe.yaml`, or `align check --model FOLDER --suite`",
        )
    return _suite(arguments)


def _recipe(arguments: argparse.Namespace) -> int:
    """Check a recipe and print the plan; 0 where it can run. Raises UserError naming every problem."""
    recipe, document = load_document(arguments.recipe, arguments.overrides)
    folder = Path(arguments.recipe).absolute().parent
    custom = recipe.placement.custom
    plan = validate(
        recipe, folder, document=document, every_row=arguments.data, cluster=bool(custom), show=arguments.show
    )
    if custom:
        plan.notes.append(f"placement asks for {', '.join(custom)}: for a cluster (`align run --address`), not checked")
    if not custom:
        require_place(recipe.run_folder)
    if recipe.run_folder.exists() and any(recipe.run_folder.iterdir()):
        plan.notes.append(f"{recipe.run_folder} exists: `align run` needs --resume, or another name=")
    print("\n".join(lines(plan, document.name)))
    print("\nall right")
    return 0


def _suite(arguments: argparse.Namespace) -> int:
    """Print a line for each check; 0 where none failed, 1 else. Raises ModelError where the folder is none."""
    folder = resolve_model_folder(arguments.model)
    from align.export.suite import run_suite  # torch: only once the folder is there

    failed = 0
    print(f"{folder}\n")
    with scratch() as work:
        checks = run_suite(folder, work, trust_remote_code=arguments.trust_remote_code)
        for check in checks:
            first, *more = check.detail.splitlines() or [""]
            print(f"{MARKS[check.status]:<7} {check.name:<44} {check.seconds:>6.1f} s  {first}", flush=True)
            for line in more:
                print(f"{'':<63}{line}", flush=True)
            failed += check.status == "failed"
    print(f"\n{failed} of the checks failed" if failed else "\nall right")
    return 1 if failed else 0
