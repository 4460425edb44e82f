"""The two demos of environments over three seeds: a calculator is asked, and asked once; a number is found by halving.

python -m tests.prove episode_demos
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.prove.entry import CHECKOUT, conclude

SEEDS = (10, 11, 12)  # the recipes were tuned on 0
LIMIT_S = 600.0


def run(recipe: str, seed: int, output: Path) -> tuple[dict[str, dict[str, float]], float]:
    """The exam's metrics by stage, and the wall-clock seconds of one `align run`."""
    path = f"recipes/{recipe}.yaml"
    command = [sys.executable, "-m", "align.cli.main", "run", path, f"seed={seed}", f"output={output}", "name=demo"]
    begun = time.monotonic()
    subprocess.run(command, cwd=CHECKOUT, check=True)
    seconds = time.monotonic() - begun
    stages = json.loads((output / "demo" / "summary.json").read_text(encoding="utf-8"))["stages"]
    return {name: stage["metrics"] for name, stage in stages.items() if "metrics" in stage}, seconds


def of_tools(found: dict[str, dict[str, float]], seconds: float) -> dict[str, bool]:
    before, after = found["sft"], found["grpo"]
    return {
        "the demonstrations' imitator answers less than half": before["right"] < 0.5,
        "after episodes at least 0.95 are right": after["right"] >= 0.95,
        "with one call each": 0.95 <= after["calls"] <= 1.05,
        "the export answers as well": abs(found["release"]["right"] - after["right"]) <= 0.01,
        f"at most {LIMIT_S:.0f} seconds": seconds <= LIMIT_S,
    }


def of_guess(found: dict[str, dict[str, float]], seconds: float) -> dict[str, bool]:
    after = found["grpo"]
    return {
        "at least 0.9 are found, more than before": after["solved"] >= 0.9 > found["sft"]["solved"],
        "in seven turns or fewer on average": after["turns"] <= 7.0,
        f"at most {LIMIT_S:.0f} seconds": seconds <= LIMIT_S,
    }


def main() -> int:
    begun = time.monotonic()
    figures: dict[str, Any] = {}
    for recipe, judge in (("tools-demo", of_tools), ("guess-demo", of_guess)):
        for seed in SEEDS:
            with tempfile.TemporaryDirectory() as folder:
                found, seconds = run(recipe, seed, Path(folder))
            named = {stage: {k: v for k, v in metrics.items() if "/" not in k} for stage, metrics in found.items()}
            part = {"metrics": named, "seconds": round(seconds, 1), "checks": judge(found, seconds)}
            figures[f"{recipe}, seed {seed}"] = part
            print(json.dumps(part, indent=1), flush=True)
    claim = "models that cannot add learn to ask a calculator, once; and to find a number in seven guesses"
    command = "python -m tests.prove episode_demos"
    return conclude("episode-demos", claim=claim, command=command, figures=figures, begun=begun)


if __name__ == "__main__":
    sys.exit(main())
