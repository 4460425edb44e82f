"""QLoRA and DoRA against LoRA on the demo's task: the same model, pairs, seeds and steps, three kinds of adapter.

The demo's SFT makes one model; its DPO runs on it once for each kind, at equal steps; an exam on held-out sums merges
each and asks vLLM. A few steps of GRPO on QLoRA then show that engines sample from what the trainer computes with: the
sampler's log-probabilities are the trainer's.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

from tests.prove.entry import CHECKOUT, conclude

KINDS = ("lora", "qlora", "dora")
SEEDS = (10,)
WITHIN = 0.03
QUESTIONS = 1000
ONLINE_STEPS = 3
MOST_MISMATCH = 1e-5


def recipe(folder: Path, seed: int) -> dict[str, Any]:
    """The demo's recipe with a DPO stage of each kind."""
    text = (CHECKOUT / "recipes" / "demo.yaml").read_text(encoding="utf-8")
    demo: dict[str, Any] = yaml.safe_load(text.replace('"arithmetic.py:', f'"{CHECKOUT / "recipes"}/arithmetic.py:'))
    by_id = {stage["id"]: stage for stage in demo["stages"]}
    stages = [by_id["sft"]]
    for kind in KINDS:
        adapter = {"kind": kind, "rank": 16, "alpha": 32}
        stages.append({**by_id["dpo"], "id": kind, "adapter": adapter})
    stages.append({**by_id["grpo"], "id": "online", "from": "qlora", "steps": ONLINE_STEPS})
    exam = {**by_id["exam"], "of": ["sft", *KINDS]}
    exam["data"]["options"]["rows"] = QUESTIONS
    return {**demo, "name": "savers", "seed": seed, "output": str(folder), "stages": [*stages, exam]}


def run(seed: int, folder: Path) -> dict[str, Any]:
    """Figures of one `align run`."""
    file = folder / "savers.yaml"
    file.write_text(yaml.safe_dump(recipe(folder, seed), sort_keys=False), encoding="utf-8")
    begun = time.monotonic()
    subprocess.run([sys.executable, "-m", "align.cli.main", "run", str(file)], cwd=CHECKOUT, check=True)
    seconds = time.monotonic() - begun
    stages = json.loads((folder / "savers" / "summary.json").read_text(encoding="utf-8"))["stages"]
    accuracy = {name: stages[name]["metrics"]["accuracy"] for name in ("sft", *KINDS)}
    lines = (folder / "savers" / "online" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    mismatch = max(abs(json.loads(line)["mismatch/kl"]) for line in lines)
    return {
        "accuracy": {name: round(value, 4) for name, value in accuracy.items()},
        "stage_seconds": {kind: round(stages[kind]["seconds"], 1) for kind in KINDS},
        "mismatch_kl_of_qlora_online": mismatch,
        "seconds": round(seconds, 1),
        "load_average": round(os.getloadavg()[0], 1),
        "checks": {
            "LoRA learns": accuracy["lora"] > accuracy["sft"] + WITHIN,
            "QLoRA is within 3 points of LoRA": accuracy["qlora"] >= accuracy["lora"] - WITHIN,
            "DoRA is within 3 points of LoRA": accuracy["dora"] >= accuracy["lora"] - WITHIN,
            "engines sample from what the QLoRA trainer computes with": mismatch <= MOST_MISMATCH,
        },
    }


def main() -> int:
    begun = time.monotonic()
    figures: dict[str, Any] = {}
    for seed in SEEDS:
        with tempfile.TemporaryDirectory() as folder:
            figures[f"seed {seed}"] = run(seed, Path(folder))
        print(json.dumps(figures[f"seed {seed}"], indent=1), flush=True)
    return conclude(
        "memory-savers",
        claim="at equal steps of the demo's DPO, QLoRA and DoRA are right on as many held-out sums as LoRA, but for 3 "
        "points; a QLoRA policy's log-probabilities are the engine's",
        command="python -m tests.prove memory_savers",
        figures=figures,
        begun=begun,
    )


if __name__ == "__main__":
    sys.exit(main())
