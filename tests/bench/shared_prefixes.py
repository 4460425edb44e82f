"""What is saved where rows of an update begin alike: our SFT step with shared beginnings, and without.

    python -m tests.bench.shared_prefixes [--dtype float32|bfloat16] [--repeats 3] [--record]

Random rows, 24 in an update, of 30 to 100 tokens of their own (the second half scored) behind a beginning that all
have: 10 tokens (a chat template), 40 (a short system prompt), 200 (a long one, or examples). Two trainers of one model
step in turn; their losses are compared first.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from align.protocols.trees import Segment, Tree
from tests.bench import common, work

BEGINNINGS = (10, 40, 200)
ROWS, LEAST, MOST = 24, 30, 100


def rows(beginning: int, vocabulary: int, seed: int = 0) -> list[Tree]:
    rng = np.random.default_rng(seed)
    start = rng.integers(0, vocabulary, beginning)
    trees = []
    for number in range(ROWS):
        own = rng.integers(0, vocabulary, int(rng.integers(LEAST, MOST)))
        scored = np.arange(beginning + len(own)) >= beginning + len(own) // 2
        trees.append(Tree(number, Segment(np.concatenate([start, own]), scored)))
    return trees


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run and print; returns what is recorded."""
    arguments = parse(argv)
    started = time.perf_counter()
    threads = common.use_threads(arguments.threads)
    shape = work.TOY if arguments.toy else work.BENCH
    with tempfile.TemporaryDirectory() as name:
        folder = work.write_model(shape, Path(name))
        trainers = {
            side: work.make_trainer(folder, {"name": "sft"}, dtype=arguments.dtype, device="cpu")
            for side in ("shared", "apart")
        }
    trainers["apart"].packer.may_share = False
    for trainer in trainers.values():
        work.draw_adapter(trainer.module)
    print(f"{ROWS} rows, {shape.parameters / 1e6:.1f}M parameters, {arguments.dtype}, {threads} threads")
    table = [["beginning", "tokens apart", "shared", "s apart", "s shared", "ratio", "min", "max"]]
    found: dict[str, Any] = {}
    for beginning in BEGINNINGS:
        trees = rows(beginning, shape.vocabulary)
        first = {side: trainer.step(trees, step=0, progress=0.0) for side, trainer in trainers.items()}
        np.testing.assert_allclose(first["shared"]["loss/total"], first["apart"]["loss/total"], rtol=1e-3)
        sides = {
            side: lambda trainer=trainer, trees=trees: trainer.step(trees, step=0, progress=0.0)
            for side, trainer in trainers.items()
        }
        seconds = common.alternate(sides, arguments.repeats).seconds
        ratios = [apart / shared for apart, shared in zip(seconds["apart"], seconds["shared"], strict=True)]
        tokens = {side: int(metrics["tokens/trained"]) for side, metrics in first.items()}
        found[str(beginning)] = {"tokens": tokens, "seconds": seconds, "ratio": median(ratios)}
        row = [*(median(seconds[side]) for side in ("apart", "shared")), median(ratios), min(ratios), max(ratios)]
        table.append([str(beginning), str(tokens["apart"]), str(tokens["shared"]), *(f"{value:.2f}" for value in row)])
    print(common.columns(table))
    figures = {"rows": ROWS, "dtype": arguments.dtype, "beginnings": found}
    if arguments.record:
        goal = "with shared beginnings no step is over 3 % slower, and at 200 tokens it is at least 2.5 times as fast"
        met = min(own["ratio"] for own in found.values()) >= 0.97 and found["200"]["ratio"] >= 2.5
        common.write_result(f"shared-prefixes-{arguments.dtype}", goal=goal, met=met, figures=figures, started=started)
    return figures


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--record", action="store_true", help="write the figures to results/")
    parser.add_argument("--toy", action="store_true", help="a tiny model")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
