"""Time of an update of every supported family, with its parts fused and without: a family that lost them shows here.

    python -m tests.bench.fused_steps [FAMILY ...]          this tree, fused against the models' own modules
    python -m tests.bench.fused_steps --against TREE [...]  this tree against another checkout of the project, by turns

Models are shapes of 8 layers and 256 hidden, float32 and LoRA on all linear layers; the update is a packed row of 2,048
tokens, forward and backward. Runs alternate, and the median of their ratios is told: drift of a machine cancels.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

SLOWER = 1.02  # more than this against another tree is a loss
SIZES = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 8, "vocab_size": 4096}
TOKENS, ROUNDS, STEPS = 2048, 5, 3


def seconds(family: str, *, fused: bool) -> float:
    """Of one update, the fastest of a few."""
    import numpy as np
    import torch

    from align.data.packing import collate, text_positions
    from align.model import adapters
    from align.model.fused.exchange import fuse
    from align.model.policy_module import PolicyModule
    from align.model.probe.choose import probe
    from align.protocols.trees import Segment, Tree
    from align.recipe.adapter import Adapter
    from tests.unit.core.families import make_family, mrope_positions

    torch.set_num_threads(1)
    layers = {"layer_types": None} if family in ("gemma2", "gemma3_text", "gpt_oss") else {}
    sizes = SIZES if family not in ("qwen3_5_text", "qwen3_next") else {**SIZES, "num_hidden_layers": 2}
    model = make_family(family, **sizes, **layers)
    adapters.attach(model, Adapter(rank=8, alpha=16), None, seed=0)
    if fused:
        fuse(model)
    module = PolicyModule(model)
    probe(module)
    rng = np.random.default_rng(0)
    trees = [Tree(n, Segment(rng.integers(3, 4096, TOKENS // 4), np.arange(TOKENS // 4) > 8)) for n in range(4)]
    batch = collate(trees, mrope_positions if family == "qwen2_5_vl" else text_positions)
    module.train()
    taken = []
    for _ in range(STEPS + 1):
        started = time.perf_counter()
        module(batch).logps.sum().backward()
        taken.append(time.perf_counter() - started)
    return min(taken[1:])


def measured(family: str, tree: Path, fused: bool) -> float:
    """`seconds` in a process of its own, with the code of `tree`."""
    command = [sys.executable, "-W", "ignore", __file__, family, "--one", "fused" if fused else "plain"]
    environment = {**os.environ, "PYTHONPATH": str(tree)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, cwd=tree)
    return float(done.stdout.split()[-1])


def compare(family: str, against: Path | None) -> dict[str, Any]:
    here = Path(__file__).resolve().parents[2]
    pairs = [
        (measured(family, here, True), measured(family, against or here, against is not None)) for _ in range(ROUNDS)
    ]
    ratio = statistics.median(mine / other for mine, other in pairs)
    return {"family": family, "seconds": min(mine for mine, _ in pairs), "ratio": round(ratio, 4)}


def main() -> int:
    from tests.unit.core.families import FAMILIES

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("families", nargs="*", default=list(FAMILIES))
    parser.add_argument("--against", type=Path, help="another checkout; default: this one, not fused")
    parser.add_argument("--one", choices=("fused", "plain"), help="time this tree once, and print seconds")
    asked = parser.parse_args()
    if asked.one:
        print(seconds(asked.families[0], fused=asked.one == "fused"))
        return 0
    slower = []
    for family in asked.families:
        found = compare(family, asked.against)
        print(json.dumps(found), flush=True)
        if found["ratio"] > SLOWER:
            slower.append(family)
    if slower:
        print(f"slower by more than {SLOWER - 1:.0%}: {', '.join(slower)}")
    return bool(slower)


if __name__ == "__main__":
    raise SystemExit(main())
