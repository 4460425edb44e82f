"""An asynchronous stage (staleness 1) against a synchronous one: seconds per step, and the share of the best possible.

    python -m tests.bench.async_against_sync [--settings reward balanced generation] [--steps 10]
        [--threads N]   of trainer and engine in both stages, in place of what the placement gives them
        [--toy]         write no result

All stages are those of one `align run`: one model and one set of prompts, vLLM, and a reward that answers after a given
time, as a judge behind a network does. They learn so little that lengths stay what they are. G, L and T are measured in
the synchronous stage, in seconds per step: until the last group was sampled, from then until it was scored, and all
that is left (preparing, training, publishing, logging). Overlap cannot do better than

    max(G + T, (G + L + T) / 2)     generation and training share the cores; two steps' groups are on their way

while both phases are as fast side by side, each on its part of the cores, as one after the other on all of them. A
model as small as this one is sampled faster by one core than by two, which the synchronous stage has by default: there
the share exceeds 100 %, and `--threads 1` is the stricter comparison.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from statistics import fmean
from typing import Any

from tests import runs
from tests.bench.common import columns, write_result

GOAL = 0.9
WARM = 3  # steps not counted: first shapes, first publishes; even numbers of steps follow, which may come in pairs
PARTS = ("generate", "score", "prepare", "train", "publish", "log")
MODEL = {**runs.CONFIG, "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4}
JUDGE = """
import asyncio


async def judged(samples, *, seconds):
    await asyncio.sleep(seconds)
    return [sum(token % 2 for token in s.token_ids) / len(s.token_ids) for s in samples]
"""

SETTINGS: dict[str, dict[str, Any]] = {
    "reward": {"seconds": 3.0, "max_tokens": 24, "updates": 1},
    "balanced": {"seconds": 1.0, "max_tokens": 32, "updates": 2},
    "generation": {"seconds": 0.2, "max_tokens": 64, "updates": 1},
}
"""By what takes longest: seconds until the reward answers, tokens per completion, updates per batch."""


def stage(name: str, staleness: int, steps: int) -> dict[str, Any]:
    setting = SETTINGS[name]
    return runs.grpo(
        **{"from": None},
        id=stage_id(name, staleness),
        adapter={"kind": "lora", "rank": 8, "alpha": 16},
        batch={"groups": 16, "group_size": 4},
        rollout={"max_tokens": setting["max_tokens"], "truncated": "keep"},
        rewards=[{"use": "judge.py:judged", "args": {"seconds": setting["seconds"]}}],
        loss="grpo",
        optim={"lr": 1e-8},
        updates_per_batch=setting["updates"],
        staleness=staleness,
        steps=steps,
        save={"every": steps},
        eval=None,
    )


def stage_id(name: str, staleness: int) -> str:
    return f"{name}-{'asynchronous' if staleness else 'synchronous'}"


def measured(run_folder: Path, stage: str) -> dict[str, float]:
    """Seconds per step over an even number of steps, and of each of its parts, without the first ones and the last,
    beside which nothing is sampled any more."""
    lines = runs.metrics(run_folder, stage)[WARM - 1 : -1]
    lines = lines[len(lines) % 2 == 0 :]
    seconds = (lines[-1]["time"] - lines[0]["time"]) / (len(lines) - 1)
    parts = {part: fmean(line[f"time/{part}"] for line in lines[1:]) for part in PARTS}
    groups = {part: fmean(line[f"time/group_{part}"] for line in lines[1:]) for part in ("generate", "score", "wait")}
    return {
        "step": seconds,
        **parts,
        "other": seconds - sum(parts.values()),
        **{f"group_{part}": value for part, value in groups.items()},
        "oldest": max(line["staleness/max"] for line in lines),
    }


def compared(run_folder: Path, name: str) -> dict[str, Any]:
    """What one setting came to."""
    sync, ahead = (measured(run_folder, stage_id(name, staleness)) for staleness in (0, 1))
    generation, latency = sync["generate"], sync["score"]
    training = sync["step"] - generation - latency
    best = max(generation + training, sync["step"] / 2)
    return {
        "G": generation,
        "L": latency,
        "T": training,
        "synchronous_step": sync["step"],
        "asynchronous_step": ahead["step"],
        "ideal_step": best,
        "gain": sync["step"] / ahead["step"],
        "ideal_gain": sync["step"] / best,
        "share": best / ahead["step"],
        "synchronous": sync,
        "asynchronous": ahead,
    }


def show(figures: dict[str, dict[str, Any]]) -> str:
    names = ("G", "L", "T", "synchronous_step", "asynchronous_step", "ideal_step")
    rows = [["seconds", "G", "L", "T", "sync step", "async step", "ideal", "gain", "of", "share"]]
    for name, found in figures.items():
        numbers = [f"{found[key]:.2f}" for key in names]
        rows.append([name, *numbers, f"{found['gain']:.2f}", f"{found['ideal_gain']:.2f}", f"{found['share']:.0%}"])
    return columns(rows)


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--threads", type=int, help="of trainer and engine, in both stages")
    parser.add_argument("--toy", action="store_true", help="write no result")
    arguments = parser.parse_args(words)
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="async-bench-") as name:
        folder = Path(name)
        runs.write_data(folder)
        (folder / "judge.py").write_text(JUDGE)
        stages = [stage(name, staleness, arguments.steps) for name in arguments.settings for staleness in (0, 1)]
        tokenizer = {"train_on": "sums.jsonl", "vocab_size": 512}
        model = {"dtype": "float32", "config": MODEL, "tokenizer": tokenizer}
        share = {"threads": arguments.threads}
        placement = {"trainer": share, "rollout": share} if arguments.threads else {}
        runs.run(runs.write_recipe(folder, "bench", stages, model=model, placement=placement))
        figures = {name: compared(folder / "runs" / "bench", name) for name in arguments.settings}
    print(show(figures))
    for name, found in figures.items():
        for kind in ("synchronous", "asynchronous"):
            print(f"{name}, {kind}: " + ", ".join(f"{part} {value:.2f}" for part, value in found[kind].items()))
    reached = min(found["share"] for found in figures.values())
    print(f"goal: at least {GOAL:.0%} of the ideal: {'met' if reached >= GOAL else 'missed'}")
    if not arguments.toy:
        write_result(
            "async-against-sync",
            goal=f"at staleness 1 at least {GOAL:.0%} of the speed that overlap on shared cores allows",
            met=reached >= GOAL,
            figures={
                "settings": {name: SETTINGS[name] for name in arguments.settings},
                "threads_of_both_stages": arguments.threads or "as placed",
                **figures,
            },
            started=begun,
        )
    return 0 if reached >= GOAL else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
