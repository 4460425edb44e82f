"""The simulator predicts the steps per minute of real runs in settings other than the one it was given.

    python -m tests.prove simulator

A tiny model is trained online by four real runs, trainer and engine with a core each. The first is synchronous, with a
reward that takes 0.3 s; from what it measured, `align simulate --from` predicts the others: a slower reward, staleness
1, and staleness 2 with the slower reward. ALIGN_PROVE_STEPS sets the steps of each (default 20), ALIGN_PROVE_ROLLOUT
the engine (default transformers).
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean
from typing import Any

from align.cli.main import main as align
from align.simulate.measured import WARM_UP
from tests.prove.entry import record
from tests.runs import grpo, metrics, run, write_data, write_recipe

QUICK_S, SLOW_S = 0.3, 1.5
SETTINGS = {"measured": (0, QUICK_S), "slow-reward": (0, SLOW_S), "ahead": (1, QUICK_S), "further": (2, SLOW_S)}
"""Staleness and seconds of the reward; the first is what the others are predicted from."""
WITHIN = 0.15

REWARD = '''"""A judge that takes its time."""

import asyncio

from rewards import reward


@reward(batch=64, concurrency=4096)  # a service that answers whoever asks, as the simulator takes it
async def judge(samples, *, seconds):
    await asyncio.sleep(seconds)
    return [len(s.completion) % 7 for s in samples]
'''


def recipe(folder: Path, name: str, steps: int) -> Path:
    """A policy from scratch ends its turn at random, so that lengths vary; it hardly changes, so that they stay."""
    staleness, seconds = SETTINGS[name]
    stage = grpo(
        **{"from": None},
        adapter={"kind": "lora", "rank": 4, "alpha": 8},
        batch={"groups": 16, "group_size": 4},
        rollout={"name": os.environ.get("ALIGN_PROVE_ROLLOUT", "transformers"), "max_tokens": 256, "truncated": "keep"},
        rewards=[{"use": "judge.py:judge", "args": {"seconds": seconds}}],
        loss={"name": "grpo"},
        optim={"lr": 1e-9},
        staleness=staleness,
        steps=steps,
        save={"every": steps},
        eval=None,
    )
    return write_recipe(folder, name, [stage], placement={"trainer": {"threads": 1}, "rollout": {"threads": 1}})


def measured_rate(folder: Path) -> float:
    """Steps per minute of a run after its first steps."""
    seconds = [line["time/step"] for line in metrics(folder, "grpo") if line["step"] > WARM_UP]
    return 60 / mean(seconds)


def predicted_rate(recipe: Path, before: Path, reward_s: float) -> tuple[float, dict[str, Any]]:
    """Steps per minute and inputs, as `align simulate` prints them for a recipe."""
    words = ["simulate", str(recipe), "--from", str(before), "--reward-s", f"{reward_s}", "--steps", "200", "--json"]
    staleness = SETTINGS[recipe.stem][0]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert align([*words, "--staleness", str(staleness)]) == 0
    found = json.loads(printed.getvalue())
    return found["outcomes"][0]["steps_per_minute"], found["inputs"]


def main() -> int:
    begun = time.monotonic()
    steps = int(os.environ.get("ALIGN_PROVE_STEPS", "20"))
    figures: dict[str, Any] = {"steps": steps, "settings": {}}
    with tempfile.TemporaryDirectory(prefix="simulator-proof-") as name:
        folder = Path(name)
        write_data(folder)
        (folder / "judge.py").write_text(REWARD)
        before = folder / "runs" / "measured"
        for setting, (staleness, seconds) in SETTINGS.items():
            path = recipe(folder, setting, steps)
            run(path)
            lines = [line for line in metrics(before, "grpo") if line["step"] > WARM_UP]
            judged = mean(line["time/group_score"] for line in lines) + seconds - QUICK_S
            real = measured_rate(folder / "runs" / setting)
            predicted, inputs = predicted_rate(path, before, judged)
            figures["settings"][setting] = {
                "staleness": staleness,
                "reward_s": seconds,
                "steps_per_minute": round(real, 2),
                "predicted": round(predicted, 2),
                "error": round(predicted / real - 1, 4),
            }
            print(json.dumps({setting: figures["settings"][setting]}), flush=True)
        figures["inputs"] = {name: one["value"] for name, one in inputs.items()}
    proved = all(abs(found["error"]) <= WITHIN for found in figures["settings"].values())
    record(
        "simulator",
        claim=f"from one synchronous run, the simulator predicts steps per minute within {100 * WITHIN:.0f} % with a "
        "slower reward, at staleness 1, and at staleness 2 with the slower reward",
        command="python -m tests.prove simulator",
        figures=figures,
        proved=proved,
        seconds=time.monotonic() - begun,
    )
    return 0 if proved else 1


if __name__ == "__main__":
    sys.exit(main())
