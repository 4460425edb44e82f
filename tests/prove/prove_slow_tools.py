"""Sampling ahead hides slow tools: staleness 1 against 0 where an environment takes as long as training.

    python -m tests.prove slow_tools

The tools-demo's environment, which answers a reply only after as many seconds as an update takes (measured first, both
in the entry), trainer and engine with a core each. From the synchronous run `align simulate` predicts how much faster
the asynchronous one is; the proof is that at least nine tenths of that are had, that no group is older than the bound,
and that the held-out questions are answered as well.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean
from typing import Any

import yaml

from align.cli.main import main as align
from align.simulate.measured import WARM_UP
from tests.prove.entry import CHECKOUT, conclude
from tests.runs import metrics, run, write_recipe

LEAST, QUESTIONS = 0.9, 400
PROBE, STEPS = 8, int(os.environ.get("ALIGN_PROVE_STEPS", "60"))
WORLD = '''"""The demo's calculator, whose user takes time to say that there is nothing more."""

import asyncio
import sys

sys.path.insert(0, {recipes!r})

from calculator import Calculator
from rewards import Objective, environment


@environment(objectives={{"right": Objective(range=(0, 1)), "calls": Objective(kind="cost")}})
class Slow(Calculator):
    def __init__(self, *, seconds: float):
        self.seconds = seconds

    async def respond(self, reply: str) -> None:
        await asyncio.sleep(self.seconds)
        self.said = reply
'''


def write(folder: Path, name: str, base: str, stages: list[dict[str, Any]]) -> Path:
    demo = yaml.safe_load((CHECKOUT / "recipes" / "tools-demo.yaml").read_text(encoding="utf-8"))
    model = {**demo["model"], "tokenizer": {**demo["model"]["tokenizer"], "train_on": f"{_calculator()}:words"}}
    placement = {"trainer": {"threads": 1}, "rollout": {"threads": 1}}
    return write_recipe(folder, name, stages, model={"path": base, "dtype": "float32"} if base else model,
                        placement=placement)  # fmt: skip


def _calculator() -> Path:
    return CHECKOUT / "recipes" / "calculator.py"


def demo_stage(name: str) -> dict[str, Any]:
    demo = yaml.safe_load((CHECKOUT / "recipes" / "tools-demo.yaml").read_text(encoding="utf-8"))
    found: dict[str, Any] = next(stage for stage in demo["stages"] if stage["id"] == name)
    found["data"]["path"] = f"{_calculator()}:{found['data']['path'].rpartition(':')[2]}"
    return found


def online(seconds: float, steps: int, staleness: int) -> dict[str, Any]:
    stage = demo_stage("grpo")
    world = {**stage["environment"], "use": "slow.py:Slow", "args": {"seconds": seconds}, "timeout_s": 60.0}
    return stage | {
        "from": None, "environment": world, "batch": {"groups": 8, "group_size": 8}, "steps": steps,
        "staleness": staleness, "save": {"every": steps},
    }  # fmt: skip


def exam() -> dict[str, Any]:
    stage = demo_stage("exam")
    world = {**stage["environment"], "use": f"{_calculator()}:Calculator"}
    return stage | {"of": ["grpo"], "environment": world}


def rates(folder: Path) -> dict[str, float]:
    """Means of a run's turns after its first: seconds of a step and of its parts; steps a minute; the oldest group."""
    lines = [line for line in metrics(folder, "grpo") if line["step"] > WARM_UP]
    times = {name: mean(line[f"time/{name}"] for line in lines) for name in ("step", "generate", "train", "publish")}
    oldest = max(line["staleness/max"] for line in lines)
    return {
        **times,
        "steps_per_minute": 60 / times["step"],
        "oldest": oldest,
        "lost": sum(x["episode/lost"] for x in lines),
    }


def predicted(recipe: Path, measured: Path) -> dict[str, float]:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        words = ["simulate", str(recipe), "--from", str(measured), "--staleness", "0,1", "--steps", "200", "--json"]
        assert align(words) == 0
    found = json.loads(printed.getvalue())
    return {str(one["staleness"]): one["steps_per_minute"] for one in found["outcomes"]}


def accuracy(folder: Path) -> float:
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))["stages"]["grpo"]["metrics"]
    return float(summary["right"])


def interval(share: float, count: int) -> tuple[float, float]:
    """Wilson's, of 95 %."""
    z = 1.96
    middle, half = share + z * z / (2 * count), z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return (middle - half) / (1 + z * z / count), (middle + half) / (1 + z * z / count)


def main() -> int:
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="slow-tools-") as name:
        folder = Path(name)
        (folder / "slow.py").write_text(WORLD.format(recipes=str(CHECKOUT / "recipes")))
        run(write(folder, "start", "", [demo_stage("sft")]))
        base = str(folder / "runs" / "start" / "sft" / "model")
        run(write(folder, "probe", base, [online(0.0, PROBE, 0)]))
        train_s = rates(folder / "runs" / "probe")["train"]
        sides: dict[str, dict[str, float]] = {}
        for side, staleness in (("synchronous", 0), ("ahead", 1)):
            run(write(folder, side, base, [online(train_s, STEPS, staleness), exam()]))
            sides[side] = {**rates(folder / "runs" / side), "right": accuracy(folder / "runs" / side)}
            print(side, json.dumps(sides[side]), flush=True)
        simulated = predicted(folder / "synchronous.yaml", folder / "runs" / "synchronous")
    real = sides["ahead"]["steps_per_minute"] / sides["synchronous"]["steps_per_minute"]
    wanted = simulated["1"] / simulated["0"]
    low, high = interval(sides["synchronous"]["right"], QUESTIONS)
    figures = {
        "environment_s": round(train_s, 3),
        "train_s": round(sides["synchronous"]["train"], 3),
        "sides": {side: {key: round(value, 4) for key, value in found.items()} for side, found in sides.items()},
        "simulated_steps_per_minute": simulated,
        "ratio": round(real, 3),
        "simulated_ratio": round(wanted, 3),
        "interval_of_synchronous": [round(low, 4), round(high, 4)],
        "checks": {
            "at least nine tenths of the simulator's ratio": real >= LEAST * wanted,
            "no group is older than the bound": sides["ahead"]["oldest"] == 1 and sides["synchronous"]["oldest"] == 0,
            "accuracy is within the interval of the synchronous run, or above": sides["ahead"]["right"] >= low,
            "nothing is lost": all(found["lost"] == 0 for found in sides.values()),
        },
    }
    claim = "staleness 1 hides an environment that takes as long as training, and costs no accuracy"
    return conclude(
        "slow-tools",
        claim=claim,
        command="python -m tests.prove slow_tools",
        figures={"episodes": figures},
        begun=begun,
    )


if __name__ == "__main__":
    sys.exit(main())
