"""`align pareto`: the front of runs, by their evaluate stages. As a table, a picture and a page; no torch."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from align.cli.arguments import add_stage, whole
from align.errors import RunFolderError
from align.experiments.front import LEVEL, Front, front
from align.experiments.grid import parse_numbers
from align.experiments.runs import (
    Judged,
    chosen,
    exams,
    is_finished,
    judged,
    notes,
    read_recipe,
    run_folders,
)
from align.recipe.capabilities import JudgingStage
from align.report.front import write_front
from align.report.front_page import write_page
from align.report.table import text_table
from align.stages.files import write_json
from align.stages.runfolder import RECIPE


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders, or the folder of a sweep")
    add_stage(parser, "evaluate")
    parser.add_argument(
        "--of", metavar="ID", help="the judged stage (one run: all; several: the last that each judges)"
    )
    parser.add_argument("--objectives", metavar="a,b", help="default: all that the runs share")
    parser.add_argument(
        "--reference", metavar="a=0,b=0", help="of the hypervolume, own signs (default: below the worst)"
    )
    parser.add_argument(
        "--resamples", type=whole(2), default=1000, metavar="N", help="of the bootstrap (default: 1000)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the bootstrap")
    parser.add_argument("--out", metavar="FOLDER", help="for front.png, .html, .json (default: the first RUN)")
    parser.add_argument("--json", action="store_true", help="print JSON for programs")


def run(arguments: argparse.Namespace) -> int:
    """Print the front and write front.png, front.html and front.json. Raises UserError with a remedy.

    arguments: runs (folders), stage, of, objectives (text or None), reference (text or None), resamples, seed, out,
    json.
    """
    given = [Path(word) for word in arguments.runs]
    models, said = gather(run_folders(given), arguments.stage, arguments.of)
    out = Path(arguments.out) if arguments.out else given[0]
    found = front(
        models,
        arguments.objectives.split(",") if arguments.objectives else (),
        reference=parse_numbers(arguments.reference, "--reference") if arguments.reference else None,
        resamples=arguments.resamples,
        seed=arguments.seed,
    )
    publish(found, said, out, as_json=arguments.json)
    return 0


def publish(found: Front, said: Sequence[str], out: Path, *, as_json: bool = False) -> None:
    """Print a front, and write it as picture, page and JSON to the folder `out`."""
    out.mkdir(parents=True, exist_ok=True)
    write_front(found, out / "front.png")
    write_json(out / "front.json", {**found.to_json(), "notes": list(said)})
    recipes = {model.label: (model.run / RECIPE).read_text(encoding="utf-8") for model in found.models}
    how = [*describe(found), *said]
    write_page(found, out / "front.html", title=f"Front of {out.name}", how=how, rows=table(found), recipes=recipes)
    if as_json:
        print(json.dumps(found.to_json(), indent=1))
        return
    print(
        "\n".join(
            [*text_table(table(found)), "", *how, "", f"picture, page and numbers: {out}/front.png, .html, .json"]
        )
    )


def gather(runs: Sequence[Path], stage_id: str | None, of: str | None) -> tuple[list[Judged], list[str]]:
    """Models of all runs, and what is to be said about how they were judged.

    One run gives a model for each stage that its evaluate stage judges; several give one each, the last of `of:`. Runs
    that are not finished are named and left out; none left is an error.
    """
    models: list[Judged] = []
    said: list[str] = []
    for run in runs:
        recipe = read_recipe(run)
        stage = chosen(exams(recipe), stage_id, "evaluate stage", run)
        if len(runs) > 1 and not is_finished(run, stage.id):
            said.append(f"left out: {run.name}, whose {stage.id!r} is not finished")
            continue
        said += [line for line in notes(run, recipe, stage) if line not in said]
        models += [judged(run, stage, name, _label(run, name, runs)) for name in _judged(stage, of, len(runs))]
    if not models:
        raise RunFolderError("no run is finished", where=runs[0].parent, remedy="--resume finishes them")
    return models, said


def _judged(stage: JudgingStage, of: str | None, runs: int) -> Sequence[str]:
    return [of] if of else stage.of if runs == 1 else stage.of[-1:]


def _label(run: Path, of: str, runs: Sequence[Path]) -> str:
    if len(runs) == 1:
        return of
    twice = sum(other.name == run.name for other in runs) > 1
    return f"{run.parent.name}/{run.name}" if twice else run.name


def table(found: Front) -> list[list[str]]:
    """One row per model, best marked; costs with their own sign."""
    weighted = list(dict.fromkeys(name for model in found.models for name in model.weights))
    heads = [f"{name} (cost)" if kind == "cost" else name for name, kind in zip(found.names, found.kinds, strict=True)]
    rows = [["#", "model", *(f"w {name}" for name in weighted), *heads, "tokens", "missing", "front", "in resamples"]]
    for n, model in enumerate(found.models):
        cells = [
            f"{found.mean[n, k]:.4g} [{found.low[n, k]:.4g}, {found.high[n, k]:.4g}]" for k in range(len(found.names))
        ]
        weights = [f"{model.weights[name]:g}" if name in model.weights else "" for name in weighted]
        state = "yes" if found.best[n] else "dominated"
        missing, often = f"{100 * found.missing[n].max():.1f} %", f"{100 * found.often[n]:.0f} %"
        rows.append([str(n + 1), model.label, *weights, *cells, f"{model.lengths.mean():.1f}", missing, state, often])
    return rows


def describe(found: Front) -> list[str]:
    value, low, high = found.hypervolume
    where = ", ".join(f"{name} {worst:.4g}" for name, worst in zip(found.names, found.reference, strict=True))
    return [
        f"{len(found.models)} models judged on the same {found.prompts} prompts; in brackets {100 * LEVEL:.0f} % "
        f"intervals from {found.resamples} resamples of the prompts (seed {found.seed})",
        f"hypervolume {value:.4g} [{low:.4g}, {high:.4g}] beyond the reference point {where}",
    ]
