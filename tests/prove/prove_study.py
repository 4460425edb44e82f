"""A study of weights on examples/study.yaml: fronts at equal budget, and whether limits and soups are what they say.

    python -m tests.prove study

From one SFT per seed, three ways to combine objectives have four GRPO runs each, of equal steps, groups and settings:
the weighted sum and decoupled advantages at the same four weight vectors, the Lagrangian at four limits on the mean
length. The first of these is never reached, so that run is the unconstrained one. Soups of the two ends of `decoupled`
are four models too; they take those two runs alone, and no training. All models are examined on held-out sums by
rewards that no run was trained on.

Two things are proved, or not: that the Lagrangian keeps its limits (the mean length over the last fifth of its steps is
within 5 % of each, held-out accuracy at most 2 points below the unconstrained run's), and that a soup is the exact
interpolation, examined without training. Which front is larger is printed and recorded, whatever it is.

ALIGN_PROVE_SEEDS sets the number of seeds (default 1). ALIGN_PROVE_STEPS tries the machinery with fewer steps, prints
what it found and proves nothing. Runs stay in runs/study-proof-<steps>/ until the proof has been written: called again,
it goes on where it was stopped.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from align.experiments.front import Front, front
from align.experiments.runs import Judged, judged, read_recipe, run_folders
from align.report.logs import read_metrics
from tests.prove.entry import CHECKOUT, record

FIRST_SEED = 30
SEEDS = 1
STEPS = 45
WEIGHTS = [  # of both combiners that have weights
    {"correct": 1.0, "short": 1.0, "polite": 0.0},
    {"correct": 1.0, "short": 0.67, "polite": 0.33},
    {"correct": 1.0, "short": 0.33, "polite": 0.67},
    {"correct": 1.0, "short": 0.0, "polite": 1.0},
]
LIMITS = [24.0, 8.0, 7.0, 6.0]  # tokens in the mean; no reply is longer than the first
# Tuned on seed 1: rate 0.2 alone ended at 7.66 under a limit of 7 with lambda still rising, rate 1 alone at 8.41 under
# 8 after a swing to 6.3; with the proportional term 8 ends at 8.20 and 6 at 5.93. (Under 10 the first swing, to 6.8, is
# made up for only as fast as courtesy is learnt, and takes the whole run: 10 is no limit of this study.) The unit of
# both is a deviation of the lengths, five tokens here, so 30 is one unit of lambda for each sixth of a token.
MULTIPLIER = {"lr": 1.0, "proportional": 30.0, "lambda_max": 10.0}
WITHIN, LAST, BELOW = 0.05, 0.2, 0.02
EXACT = 1e-6
SOUP_OF = "decoupled"
REFERENCE = {"right": -0.1, "tokens": 26.4, "courteous": -0.1}  # a tenth worse than any reply can be
COLOURS = {"weighted_sum": "#c44e52", "decoupled": "#1f4e8c", "lagrangian": "#3a8a4d", "soups": "#8b6bb1"}
TRAINED = ("weighted_sum", "decoupled", "lagrangian")

Stage = dict[str, Any]


def write_recipe(folder: Path, seed: int, steps: int) -> Path:
    """examples/study.yaml with twelve GRPO stages in place of one, all from its SFT, and an exam of all of them."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("examples/study_rewards.py", "recipes/arithmetic.py"):
        shutil.copyfile(CHECKOUT / name, folder / Path(name).name)
    text = (CHECKOUT / "examples" / "study.yaml").read_text(encoding="utf-8").replace("../recipes/", "")
    recipe = yaml.safe_load(text)
    sft, grpo, exam = recipe["stages"]
    runs = trained({**grpo, "steps": steps})
    recipe |= {"name": f"seed-{seed}", "seed": seed, "output": str(folder)}
    recipe["stages"] = [sft, *runs, {**exam, "of": [stage["id"] for stage in runs]}]
    path = folder / f"seed-{seed}.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    return path


def trained(grpo: Stage) -> list[Stage]:
    """The runs of TRAINED, in that order; <front>-<number> is the id of each."""
    runs = []
    for combine in ("weighted_sum", "decoupled"):
        for number, weights in enumerate(WEIGHTS):
            objectives = {"combine": combine, "weights": weights}
            runs.append({**grpo, "id": f"{combine}-{number}", "objectives": objectives})
    correct, _, polite = grpo["rewards"]
    rewards = [correct, polite, {"use": "study_rewards.py:tokens"}]
    for number, limit in enumerate(LIMITS):
        objectives = {
            "combine": "lagrangian",
            "weights": {"correct": 1.0, "polite": 1.0, "tokens": 0.0},
            "constraints": {"tokens": {"max": limit, **MULTIPLIER}},
        }
        runs.append({**grpo, "id": f"lagrangian-{number}", "rewards": rewards, "objectives": objectives})
    return runs


def align(*words: object) -> None:
    subprocess.run([sys.executable, "-m", "align.cli.main", *map(str, words)], cwd=CHECKOUT, check=True)


def run_seed(folder: Path, seed: int, steps: int) -> tuple[Path, Path]:
    """Run a seed to its end, from wherever it was stopped; its run folder, and that of its soups."""
    recipe = write_recipe(folder, seed, steps)
    align("run", recipe, "--resume")
    run, soups = folder / f"seed-{seed}", folder / f"soups-{seed}"
    align("soup", *ends(run), "--grid", len(WEIGHTS), "--recipe", recipe, "--out", soups, "--resume")
    return run, soups


def ends(run: Path) -> list[Path]:
    return [run / f"{SOUP_OF}-{number}" / "adapter" for number in (0, len(WEIGHTS) - 1)]


# ------------------------------------------------------------------------------------------------- what is found


def fronts(run: Path, soups: Path) -> dict[str, Front]:
    """Beyond one reference point, over the same resamples of the same prompts."""
    exam = read_recipe(run).stage("exam")
    models: dict[str, list[Judged]] = {
        name: [judged(run, exam, of, of) for of in exam.of if of.startswith(f"{name}-")] for name in TRAINED
    }
    models["soups"] = [
        judged(one, read_recipe(one).stage("exam"), "soup", one.name) for one in run_folders([soups / "runs"])
    ]
    return {name: front(found, reference=REFERENCE) for name, found in models.items()}


def limits_kept(run: Path, found: Front) -> list[dict[str, Any]]:
    """Of each run with a limit that binds: mean length over its last steps, and accuracy against the run without."""
    accuracy = found.mean[:, found.names.index("right")]
    kept = []
    for number, limit in enumerate(LIMITS[1:], start=1):
        lines = read_metrics(run / f"lagrangian-{number}")
        last = lines[-max(1, round(LAST * len(lines))) :]
        length = fmean(line["constraint/tokens/value"] for line in last)
        lost = float(accuracy[0] - accuracy[number])
        kept.append(
            {
                "limit": limit,
                "mean_length": round(length, 3),
                "multiplier": round(last[-1]["constraint/tokens/lambda"], 3),
                "accuracy_lost": round(lost, 4),
                "kept": abs(length - limit) <= WITHIN * limit and lost <= BELOW,
                "curve": [round(line["constraint/tokens/value"], 2) for line in lines],
            }
        )
    return kept


def soups_exact(run: Path, soups: Path) -> dict[str, Any]:
    """error: largest over soups and modules of |dW - sum_i w_i dW_i| / sum_i |w_i dW_i|, dW = s B A in float64."""
    wholes, worst, kinds = [deltas(folder) for folder in ends(run)], 0.0, set[str]()
    for one in run_folders([soups / "runs"]):
        folder = soups / one.name
        weights = json.loads((folder / "soup_report.json").read_text(encoding="utf-8"))["weights"]
        for path, delta in deltas(folder).items():
            parts = [weight * whole[path] for weight, whole in zip(weights, wholes, strict=True)]
            worst = max(worst, float((delta - sum(parts)).norm() / sum(part.norm() for part in parts)))
        kinds |= {stage.kind for stage in read_recipe(one).stages}
    untrained = kinds == {"merge", "evaluate"} and (soups / "front.png").is_file()
    return {"error": worst, "stages": sorted(kinds), "exact": worst <= EXACT and untrained}


def deltas(folder: Path) -> dict[str, Any]:
    from align.export.soup import read_part

    return {path: scale * (b.double() @ a.double()) for path, (a, b, scale) in read_part(folder).modules.items()}


def figures(run: Path, soups: Path) -> dict[str, Any]:
    """Everything about one seed, as JSON; "fronts" has every point with its intervals."""
    found = fronts(run, soups)
    draw(found, run / "fronts.png")
    stages = json.loads((run / "summary.json").read_text(encoding="utf-8"))["stages"]
    seconds = {name: round(sum(stages[m.of]["seconds"] for m in found[name].models)) for name in TRAINED}
    volumes = {name: [round(value, 3) for value in one.hypervolume] for name, one in found.items()}
    return {
        "hypervolume": volumes,
        "largest_first": sorted(volumes, key=lambda name: -volumes[name][0]),
        "seconds_of_training": {**seconds, "soups": 0},
        "limits": limits_kept(run, found["lagrangian"]),
        "soups": soups_exact(run, soups),
        "fronts": {name: placeless(one) for name, one in found.items()},
    }


def placeless(found: Front) -> dict[str, Any]:
    """As JSON, without the folders of this machine."""
    whole = found.to_json()
    points = [{key: value for key, value in point.items() if key != "run"} for point in whole["points"]]
    return {**whole, "points": points}


def draw(found: Mapping[str, Front], path: Path) -> None:
    """Courtesy and accuracy by length, every front with the intervals of its points; better is up and left."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.0, 4.0), layout="constrained")
    FigureCanvasAgg(figure)
    for axis, name in zip(figure.subplots(1, 2), ("courteous", "right"), strict=True):
        for label, one in found.items():
            x, y = (one.names.index(objective) for objective in ("tokens", name))
            order = one.mean[:, x].argsort()
            spans = [[(one.mean - one.low)[order, k].clip(0), (one.high - one.mean)[order, k].clip(0)] for k in (x, y)]
            style = {"fmt": "o-", "markersize": 4.5, "linewidth": 0.8, "elinewidth": 0.8, "color": COLOURS[label]}
            words = "{}: hypervolume {:.2f} [{:.2f}, {:.2f}]".format(label, *one.hypervolume)
            axis.errorbar(one.mean[order, x], one.mean[order, y], xerr=spans[0], yerr=spans[1], label=words, **style)
        axis.set(xlabel="tokens (mean, held-out sums)", ylabel=name, ylim=(-0.05, 1.05))
        axis.spines[["top", "right"]].set_visible(False)
    figure.axes[0].legend(frameon=False, fontsize=7, loc="lower right")
    figure.savefig(path, dpi=130)


def main() -> int:
    begun = time.monotonic()
    seeds = range(FIRST_SEED, FIRST_SEED + int(os.environ.get("ALIGN_PROVE_SEEDS", SEEDS)))
    steps = int(os.environ.get("ALIGN_PROVE_STEPS", STEPS))
    folder = CHECKOUT / "runs" / f"study-proof-{steps}"
    found: dict[str, dict[str, Any]] = {}
    for seed in seeds:
        one = found[f"seed {seed}"] = figures(*run_seed(folder, seed, steps))
        print(seed, json.dumps({key: value for key, value in one.items() if key != "fronts"}, indent=1), flush=True)
    if steps != STEPS:
        print(f"fronts in {folder}/seed-*/fronts.png; {steps} of {STEPS} steps prove nothing")
        return 1
    proved = all(all(run["kept"] for run in one["limits"]) and one["soups"]["exact"] for one in found.values())
    path = record(
        "study",
        claim=f"the Lagrangian's mean length is within {100 * WITHIN:.0f} % of each of its limits over the last "
        f"{100 * LAST:.0f} % of its steps, at most {100 * BELOW:.0f} points of accuracy below the unconstrained run; "
        f"a soup is the exact interpolation of both ends to {EXACT:g}, and its front takes no training",
        command="python -m tests.prove study",
        figures={"steps_of_each_run": STEPS, "runs_of_each_front": len(WEIGHTS), "reference": REFERENCE, **found},
        proved=proved,
        seconds=time.monotonic() - begun,
    )
    for number, seed in enumerate(seeds):
        picture = path.with_name(f"{path.stem}{f'-seed-{seed}' if number else ''}.png")
        shutil.copyfile(folder / f"seed-{seed}" / "fronts.png", picture)
    shutil.rmtree(folder)
    print(path)
    return 0 if proved else 1


if __name__ == "__main__":
    sys.exit(main())
