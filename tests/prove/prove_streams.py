"""A stage that streams twenty gigabytes: little memory, begun at once, killed and resumed to the bit.

    python -m tests.prove streams

Two sources of JSON lines are generated on the spot, ALIGN_PROVE_GB together (default 20), and mixed three to one. The
memory that counts is the driver's, which reads; its peak is that of the whole process. The first step's time counts
from the start of the stage (loading the model included), as does the same stage's on a file of a thousand rows."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.prove.entry import CHECKOUT, conclude

GIGABYTES = float(os.environ.get("ALIGN_PROVE_GB", "20"))
MEMORY_MB, FIRST_STEP_S = 1000.0, 20.0
STEPS = 40
RECIPE = """\
name: run
output: {output}
model:
  config: {{model_type: qwen3, hidden_size: 64, intermediate_size: 128, num_hidden_layers: 2, num_attention_heads: 4,
    num_key_value_heads: 2, head_dim: 16, max_position_embeddings: 512, tie_word_embeddings: true}}
  tokenizer: {{train_on: {words}, vocab_size: 400}}
  dtype: float32
stages:
  - id: sft
    kind: sft
    adapter: {{kind: lora, rank: 4}}
    data:
      - {{path: {large}, stream: true, weight: 3}}
      - {{path: {small}, stream: true, weight: 1}}
    batch: {{sequences: 64}}
    steps: {steps}
    save: {{every: 10}}
"""


def lines(seed: int) -> Iterator[str]:
    """Rows of about four hundred bytes, each with a number of its own."""
    rng = random.Random(seed)
    words = [bytes(rng.choices(b"abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 9))).decode() for _ in range(500)]
    blocks = [" ".join(rng.choices(words, k=50)) for _ in range(4096)]
    number = 0
    while True:
        row = {
            "prompt": f"{number}: {blocks[number % 4096][:120]}?",
            "completion": f" {blocks[(number * 7) % 4096][:200]}",
        }
        yield json.dumps(row) + "\n"
        number += 1


def write(path: Path, size: float, seed: int) -> int:
    """About `size` bytes of rows; how many."""
    rows, written, made = 0, 0, lines(seed)
    with path.open("w", encoding="utf-8") as f:
        while written < size:
            block = [next(made) for _ in range(10_000)]
            written += f.write("".join(block))
            rows += len(block)
    return rows


def run(recipe: Path, name: str, *, resume: bool = False, kill_at: int | None = None) -> dict[str, Any]:
    """One start in a process of its own. kill_at: SIGKILL once so many steps are told. Seconds to the first step, from
    the stage's beginning, and the driver's peak of memory in MB."""
    command = [sys.executable, "-m", "align.cli.main", "run", str(recipe), f"name={name}"]
    command += ["--resume"] if resume else []
    folder = recipe.parent / "runs" / name
    begun, seen, first, peak = time.monotonic(), 0, None, 0.0
    driver = subprocess.Popen(command, cwd=CHECKOUT, stdout=subprocess.DEVNULL, start_new_session=True)
    while driver.poll() is None:
        peak = max(peak, _peak_mb(driver.pid))
        metrics = folder / "sft" / "metrics.jsonl"
        seen = len(metrics.read_text().splitlines()) if metrics.is_file() else 0
        if seen and first is None:
            state = json.loads((folder / "run.json").read_text())
            first = time.time() - state["stages"]["sft"]["begun"]
        if kill_at is not None and seen >= kill_at:
            os.killpg(driver.pid, signal.SIGKILL)
        time.sleep(0.05)
    return {"status": driver.returncode, "first_step_s": first, "driver_mb": peak, "seconds": time.monotonic() - begun}


def _peak_mb(pid: int) -> float:
    try:
        found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    except OSError:
        return 0.0
    return int(found[1]) / 1024 if found else 0.0


def adapter(folder: Path, name: str) -> str:
    return hashlib.sha256(
        (folder / "runs" / name / "sft" / "adapter" / "adapter_model.safetensors").read_bytes()
    ).hexdigest()


def main() -> int:
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as aside:
        folder = Path(aside)
        sizes = {"large": 0.75 * GIGABYTES * 1e9, "small": 0.25 * GIGABYTES * 1e9, "words": 4e5}
        rows = {name: write(folder / f"{name}.jsonl", size, n) for n, (name, size) in enumerate(sizes.items())}
        paths = {name: folder / f"{name}.jsonl" for name in sizes}
        recipe = folder / "recipe.yaml"
        recipe.write_text(RECIPE.format(output=folder / "runs", steps=STEPS, **paths))
        whole = run(recipe, "whole")
        killed = run(recipe, "killed", kill_at=17)
        resumed = run(recipe, "killed", resume=True)
        figures = {
            "streams": {
                "gigabytes": round(sum(path.stat().st_size for path in paths.values()) / 1e9, 2),
                "rows": rows,
                "whole": whole,
                "killed": killed,
                "resumed": resumed,
                "checks": {
                    f"the driver stays under {MEMORY_MB:.0f} MB": max(whole["driver_mb"], resumed["driver_mb"])
                    < MEMORY_MB,
                    f"the first step is done within {FIRST_STEP_S:.0f} s of the stage's begin": (
                        whole["first_step_s"] is not None and whole["first_step_s"] < FIRST_STEP_S
                    ),
                    "both ended well, and the killed one did not": (whole["status"], resumed["status"]) == (0, 0)
                    and killed["status"] != 0,
                    "killed and resumed to the bit": adapter(folder, "whole") == adapter(folder, "killed"),
                },
            }
        }
        print(json.dumps(figures, indent=1))
    return conclude(
        "streams",
        claim="two streams of JSON lines, together larger than memory is used for, train mixed by weight: under a "
        "gigabyte in the driver, the first step within twenty seconds, killed and resumed bit-equal",
        command="python -m tests.prove streams",
        figures=figures,
        begun=begun,
    )


if __name__ == "__main__":
    sys.exit(main())
