"""kill -9 at random moments of every stage kind, then --resume until the end: bit-equal to the undisturbed run.

    python -m tests.prove resume

A moment is drawn uniformly over the undisturbed run's duration, so kills fall into start-up, steps, checkpoints, merges
and evaluations alike. ALIGN_PROVE_KILLS sets the kills per kind (default 4), ALIGN_PROVE_KINDS a subset of kinds.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from align.stages import processes
from tests import image_runs
from tests.prove.entry import record
from tests.runs import (
    GONE_S,
    dpo,
    family,
    folders_of,
    grpo,
    rollouts,
    run,
    sft,
    started,
    timeless,
    weights,
    write_data,
    write_recipe,
)

LORA = {"kind": "lora", "rank": 4, "alpha": 8}
ALONE: dict[str, Any] = {"from": None}
FULL = {"kind": "full"}

KINDS: dict[str, list[dict[str, Any]]] = {
    "sft-full": [sft()],
    "sft-lora-dropout": [sft(adapter={**LORA, "dropout": 0.1})],
    "preference": [dpo(**ALONE)],
    "preference-reference-path": [sft(steps=8), dpo(reference={"path": "runs/base-of-proof/base"})],
    "online-lora": [grpo(**ALONE, adapter=LORA)],
    "online-full": [grpo(**ALONE, adapter=FULL)],
    "online-transformers": [grpo(**ALONE, adapter=LORA, rollout={"name": "transformers", "max_tokens": 8})],
    "online-updates": [  # four of a turn
        grpo(
            **ALONE, adapter=LORA, rollout={"name": "transformers", "max_tokens": 8, "truncated": "keep"},
            batch={"groups": 4, "group_size": 4}, updates_per_batch=2, minibatches=2, packing={"max_tokens": 64},
        ),
    ],
    "online-images": [image_runs.SEEING],
    "pipeline": [
        sft(),
        dpo(),
        {"id": "merged", "kind": "merge", "from": "dpo"},
        {"id": "release", "kind": "export", "from": "merged"},
        {
            "id": "exam", "kind": "evaluate", "of": ["sft", "release"], "data": "sums.jsonl",
            "rewards": [{"use": "rewards.py:correct"}], "rollout": {"max_tokens": 8, "temperature": 0.0},
        },
    ],
}  # fmt: skip


def prove(folder: Path, kind: str, kills: int, seed: int) -> dict[str, Any]:
    """Figures of one kind; "equal" and "left" decide."""
    write = write_recipe
    if kind == "online-images":
        write, folder = image_runs.write_recipe, folder / "images"
        folder.mkdir()
        image_runs.write_data(folder)
    whole = write(folder, f"{kind}-whole", KINDS[kind])
    begun = time.monotonic()
    run(whole)
    duration = time.monotonic() - begun
    broken = write(folder, f"{kind}-broken", KINDS[kind])
    chance, moments, left = random.Random(f"{kind}/{seed}"), [], 0
    for _ in range(kills):
        moment = chance.uniform(0.0, duration)
        left += kill_after(broken, moment)
        moments.append(round(moment, 2))
    run(broken, "--resume")
    one, two = folder / "runs" / whole.stem, folder / "runs" / broken.stem
    return {
        "seconds_undisturbed": round(duration, 1),
        "killed_after_seconds": moments,
        "left_behind": left + len(list((folder / "runs" / ".cache" / "media" / "leases").glob("*"))),
        "equal": differences(one, two, [stage["id"] for stage in KINDS[kind]]),
    }


def kill_after(recipe: Path, seconds: float) -> int:
    """One start under --resume, killed after `seconds`; returns how many processes and folders outlived it."""
    with started(recipe, "--resume") as process:
        deadline = time.monotonic() + seconds
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        below = family(process) if process.poll() is None else []
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
        process.wait()
    deadline = time.monotonic() + GONE_S
    while time.monotonic() < deadline:
        alive = [p for p in below if processes.is_alive(p)]
        if not alive and not folders_of(process.pid):
            return 0
        time.sleep(0.1)
    return len(alive) + len(folders_of(process.pid))


def differences(one: Path, two: Path, stages: list[str]) -> dict[str, bool]:
    """What is equal, by stage and by what was compared."""
    equal = {}
    for stage in stages:
        equal[f"{stage}/metrics"] = timeless(one, stage) == timeless(two, stage)
        if any((one / stage / name).exists() for name in ("adapter", "model")):
            equal[f"{stage}/weights"] = weights(one, stage) == weights(two, stage)
        if (one / stage / "rollouts").is_dir():
            equal[f"{stage}/rollouts"] = rollouts(one, stage) == rollouts(two, stage)
    return equal


def main() -> int:
    kills = int(os.environ.get("ALIGN_PROVE_KILLS", "4"))
    kinds = os.environ.get("ALIGN_PROVE_KINDS", ",".join(KINDS)).split(",")
    begun, figures = time.monotonic(), {}
    with tempfile.TemporaryDirectory(prefix="resume-proof-") as name:
        folder = Path(name)
        write_data(folder)
        run(write_recipe(folder, "base-of-proof", [sft(steps=1)]))
        for kind in kinds:
            figures[kind] = prove(folder, kind, kills, seed=0)
            print(kind, json.dumps(figures[kind]), flush=True)
    proved = all(f["left_behind"] == 0 and all(f["equal"].values()) for f in figures.values())
    record(
        "resume",
        claim="a run that is killed at random moments and resumed is bit-equal to the undisturbed one",
        command="python -m tests.prove resume",
        figures=figures,
        proved=proved,
        seconds=time.monotonic() - begun,
    )
    return 0 if proved else 1


if __name__ == "__main__":
    sys.exit(main())
