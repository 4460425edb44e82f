"""`align rescore`: a run's advantages under other weights. No torch; seconds."""

from __future__ import annotations

import argparse
from pathlib import Path

import yaml

from align.cli.arguments import add_stage
from align.experiments.grid import parse_weights
from align.experiments.rescore import Rescored, correlation, rescore, write
from align.experiments.runs import chosen, online_stages, read_recipe
from align.recipe.load import load_recipe
from align.recipe.objectives import Objectives
from align.report.table import text_table

DRIFT = 1e-5  # advantages are float32


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="run folder")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of `objectives`: min_std=0, whiten=true")
    add_stage(parser, "online")
    parser.add_argument("--weights", metavar="a=1,b=0.5", help="objectives that are not named keep the run's")
    parser.add_argument("--combine", metavar="NAME", help="another way to combine objectives")
    parser.add_argument("--out", metavar="FILE", help="Parquet (default: <run>/<stage>/rescored.parquet)")


def run(arguments: argparse.Namespace) -> int:
    """Combine a run's rollouts anew and print a table. Raises UserError with a remedy.

    arguments: run (folder), stage (id or None), weights (text or None), combine (or None), overrides (key=value of
    `objectives`), out (file or None).
    """
    folder = Path(arguments.run)
    recipe = read_recipe(folder)
    stage = chosen(online_stages(recipe), arguments.stage, "online stage", folder)
    key = f"stages.{stage.id}.objectives"
    changes = [f"{key}.{text}" for text in arguments.overrides]
    if arguments.weights:
        weights = {**stage.objectives.weights, **parse_weights(arguments.weights)}
        changes.append(f"{key}.weights={yaml.safe_dump(weights, default_flow_style=True, width=10**6).strip()}")
    if arguments.combine:
        changes.append(f"{key}.combine={arguments.combine}")
    changed = online_stages(load_recipe(folder / "recipe.yaml", changes))
    objectives = chosen(changed, stage.id, "online stage", folder).objectives
    rescored = rescore(folder / stage.id / "rollouts", stage, objectives)
    out = Path(arguments.out) if arguments.out else folder / stage.id / "rescored.parquet"
    write(rescored, out)
    print("\n".join([*_lines(rescored, stage.id, stage.objectives, objectives), "", f"written: {out}"]))
    return 0


def _lines(found: Rescored, stage: str, before: Objectives, after: Objectives) -> list[str]:
    rollouts, steps = found.rollouts, found.rollouts.columns["step"]
    groups = list(found.groups())
    out = [f"{len(rollouts)} completions in {len(groups)} groups, steps {min(steps)} to {max(steps)} of {stage!r}"]
    if found.replaced:
        out.append(f"{found.replaced} groups without signal, which the run replaced, are left out")
    if found.replayed > DRIFT:
        out.append(f"note: the run's own settings give advantages that differ by up to {found.replayed:.1e} today")
    rows = [["", "weight", "", "correlation with advantage", "", "missing"], ["", "run", "new", "run", "new", ""]]
    for k, (name, kind) in enumerate(zip(rollouts.names, rollouts.kinds, strict=True)):
        scores = rollouts.scores[:, k]
        weights = [f"{of[name]:g}" for of in found.weights]
        related = [_signed(correlation(scores, advantages)) for advantages in (found.before, found.after)]
        missing = float((scores != scores).mean())
        rows.append([name + (" (cost)" if kind == "cost" else ""), *weights, *related, f"{100 * missing:.1f} %"])
    old, new = found.dead(found.before), found.dead(found.after)
    return [
        *out,
        "",
        *text_table(rows),
        "",
        f"combine: {before.combine} in the run, {after.combine} now",
        f"advantages: correlation {_signed(found.correlation)} with the run's; "
        f"{100 * found.turned:.1f} % of the completions it trained on change sign",
        f"groups without signal: {old} in the run, {new} now, of {len(groups)}",
    ]


def _signed(value: float | None) -> str:
    return "-" if value is None else f"{value:+.3f}"
