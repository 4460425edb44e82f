"""`align submit`: run a recipe as a job of a Ray cluster. The recipe and its plugins are sent along."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from pathlib import Path

import yaml

from align.check.scratch import scratch
from align.cli.arguments import add_recipe
from align.errors import RecipeError
from align.recipe.load import load_document
from align.recipe.shipping import RECIPE, pack
from align.stages.runfolder import require_known


def add(parser: argparse.ArgumentParser) -> None:
    add_recipe(parser)
    parser.add_argument("--address", required=True, metavar="URL", help="of the cluster's job server, http://HEAD:8265")
    parser.add_argument("--resume", action="store_true", help="continue an interrupted run; finished stages are kept")
    parser.add_argument("--from-stage", metavar="ID", help="run this stage and those after it again")
    parser.add_argument("--detach", action="store_true", help="print the job's id and leave; do not follow its log")


def run(arguments: argparse.Namespace) -> int:
    """Submit the recipe; returns the exit code of the run, or 0 at once with --detach. Raises AlignError.

    arguments: recipe, overrides, address (of the job server), resume, from_stage, detach, debug.
    """
    recipe, _ = load_document(arguments.recipe, arguments.overrides)
    folder = Path(os.path.abspath(arguments.recipe)).parent
    if arguments.from_stage is not None:
        require_known(recipe, arguments.from_stage)
    _require_output(Path(arguments.recipe), arguments.overrides)
    from align.actors.jobs import Jobs

    jobs = Jobs(arguments.address)
    with scratch() as aside:
        package = aside.resolve() / "package"  # Ray puts its archive of it beside it, and must not find it inside
        package.mkdir()
        copied = pack(recipe, folder, package)
        job = jobs.submit(entrypoint(arguments), package, {"align_run": recipe.name})
    print(f"job {job}: {recipe.name} -> {recipe.run_folder}; sent {', '.join([RECIPE, *copied])}", flush=True)
    hint = f"`ray job logs --address {arguments.address} {job}`, and `ray job stop` in place of `logs` ends it"
    if arguments.detach:
        print(f"follow it by {hint}")
        return 0
    try:
        return jobs.follow(job, lambda text: print(text, end="", flush=True))
    except KeyboardInterrupt:
        print(f"\nthe job goes on: {hint}", file=sys.stderr)
        raise


def entrypoint(arguments: argparse.Namespace) -> str:
    """What the job runs, in the folder that was sent."""
    words = ["python", "-m", "align.cli.main", "run", RECIPE, "--address", "auto"]
    if arguments.resume:
        words.append("--resume")
    if arguments.from_stage is not None:
        words += ["--from-stage", arguments.from_stage]
    return shlex.join(words)


def _require_output(recipe: Path, overrides: list[str]) -> None:
    """The job's own folder is gone when the job is: runs belong where all nodes see them."""
    given = yaml.safe_load(recipe.read_text(encoding="utf-8-sig")).get("output")
    for override in overrides:
        key, _, value = override.partition("=")
        given = value if key == "output" else given
    if not given or not str(given).startswith("/"):
        raise RecipeError(
            f"`output: {given or 'runs'}` is a folder beside the recipe, which a job has not",
            where="output",
            remedy="give output=/a/shared/path that every node of the cluster mounts",
        )
