"""Time of an update of every supported family, with its parts fused and without: a family that lost them shows here.

    python -m tests.bench.fused_steps [FAMILY ...]          this tree, fused against the models' own modules
    python -m tests.bench.fused_steps --against TREE [...]  this tree against another checkout, or a commit
    --record                                                an entry under results/

Models are shapes of 8 layers and 256 hidden, float32 and LoRA on all linear layers; the update is a packed row of 1,024
tokens, forward and backward. Two processes hold a model each and update it by turns, and the median of the ratios of
neighbouring updates is told: drift of a machine cancels. Where it is near the bound, more turns are taken.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SLOWER = 1.02  # more than this against another tree is a loss
SIZES = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 8, "vocab_size": 4096}
TOKENS, TURNS, MORE = 1024, 9, 40


def _of(*places: str) -> Any:
    """The first of "module:name" that a tree has: trees before the rooms of align.model had them elsewhere."""
    for place in places:
        module, _, name = place.partition(":")
        try:
            found = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError):
            continue
        if callable(found):
            return found
    raise ImportError(f"this tree has none of {', '.join(places)}")


def updates(family: str, *, fused: bool) -> Callable[[], float]:
    """A function that makes one update of a new model and says how many seconds it took."""
    import numpy as np
    import torch

    from align.data.packing import collate, text_positions
    from align.model import adapters
    from align.model.policy_module import PolicyModule
    from align.recipe.adapter import Adapter
    from tests.unit.core.families import make_family, mrope_positions

    fuse = _of("align.model.fused.exchange:fuse", "align.model.fused:fuse")
    probe = _of("align.model.probe.choose:probe", "align.model.probe:probe")
    segment = _of("align.protocols.trees:Segment", "align.protocols:Segment")
    tree = _of("align.protocols.trees:Tree", "align.protocols:Tree")
    torch.set_num_threads(1)
    layers: dict[str, Any] = {"layer_types": None} if family in ("gemma2", "gemma3_text", "gpt_oss") else {}
    if family == "qwen2_5_vl":
        layers = {"rope_scaling": {"type": "mrope", "mrope_section": [8, 12, 12]}}  # of heads of 64
    sizes = SIZES if family not in ("qwen3_5_text", "qwen3_next") else {**SIZES, "num_hidden_layers": 2}
    model = make_family(family, **sizes, **layers)
    adapters.attach(model, Adapter(rank=8, alpha=16), None, seed=0)
    if fused:
        fuse(model)
    module = PolicyModule(model)
    probe(module)
    rng = np.random.default_rng(0)
    trees = [tree(n, segment(rng.integers(3, 4096, TOKENS // 4), np.arange(TOKENS // 4) > 8)) for n in range(4)]
    batch = collate(trees, mrope_positions if family == "qwen2_5_vl" else text_positions)
    module.train()

    def update() -> float:
        started = time.perf_counter()
        module(batch).logps.sum().backward()
        return time.perf_counter() - started

    return update


def serve(family: str, *, fused: bool) -> None:
    """A line "ready", then for each line read an update and its seconds."""
    update = updates(family, fused=fused)
    update()
    print("ready", flush=True)
    for _ in sys.stdin:
        print(update(), flush=True)


class Served:
    """`serve` in a process of its own, with the code of `tree`."""

    def __init__(self, family: str, tree: Path, fused: bool):
        command = [sys.executable, "-W", "ignore", __file__, family, "--serve", "fused" if fused else "plain"]
        environment = {**os.environ, "PYTHONPATH": str(tree)}
        self._process = subprocess.Popen(
            command, env=environment, cwd=tree, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip

    def ready(self) -> bool:
        return any(line == "ready\n" for line in self._process.stdout or ())

    def seconds(self) -> float:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return float(self._process.stdout.readline())

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


def compare(family: str, against: Path | None) -> dict[str, Any]:
    here = Path(__file__).resolve().parents[2]
    mine, other = Served(family, here, True), Served(family, against or here, against is not None)
    try:
        unable = [name for name, one in (("this tree", mine), ("the other", other)) if not one.ready()]
        if unable:
            return {"family": family, "unable": unable}
        pairs = []
        while len(pairs) < TURNS or (len(pairs) < MORE and ratio(pairs) > 1 + (SLOWER - 1) / 2 and against):
            pairs.append(
                (mine.seconds(), other.seconds()) if len(pairs) % 2 else (other.seconds(), mine.seconds())[::-1]
            )
    finally:
        mine.close()
        other.close()
    fastest = min(seconds for seconds, _ in pairs)
    return {"family": family, "seconds": round(fastest, 3), "turns": len(pairs), "ratio": round(ratio(pairs), 4)}


def ratio(pairs: list[tuple[float, float]]) -> float:
    return statistics.median(mine / other for mine, other in pairs)


def main() -> int:
    from tests.unit.core.families import FAMILIES

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("families", nargs="*", default=list(FAMILIES))
    parser.add_argument("--against", help="another checkout, or a commit; default: this one, not fused")
    parser.add_argument("--serve", choices=("fused", "plain"), help="what each of the two processes does")
    parser.add_argument("--record", action="store_true", help="an entry under results/")
    asked = parser.parse_args()
    if asked.serve:
        serve(asked.families[0], fused=asked.serve == "fused")
        return 0
    from tests.bench.common import write_result
    from tests.prove.entry import unpacked

    table, started = [], time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        against = unpacked(asked.against, Path(folder)) if asked.against else None
        for family in asked.families:
            table.append(compare(family, against))
            print(json.dumps(table[-1]), flush=True)
    slower = [found["family"] for found in table if found.get("ratio", 2.0) > SLOWER]  # or not to be compared
    if asked.record:
        goal = (
            f"an update of every supported family is at most {SLOWER - 1:.0%} slower than {asked.against or 'without'}"
        )
        figures = {"families": table, "slower": slower}
        write_result("fused-steps", goal=goal, met=not slower, figures=figures, started=started)
    if slower:
        print(f"slower by more than {SLOWER - 1:.0%}, or not to be compared: {', '.join(slower)}")
    return bool(slower)


if __name__ == "__main__":
    raise SystemExit(main())
