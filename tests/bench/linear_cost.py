"""Does the cost of a token depend on how many are packed together? Seconds per token at 2k, 8k and 32k packed tokens.

    python -m tests.bench.linear_cost [--dtype float32|bfloat16] [--sizes 2048,8192,32768] [--repeats 5]

Short trees, pairs of 96 + 2 x 32 random tokens, in one microbatch: forward and backward of their log-probabilities with
LoRA, no reference. The sizes run in turn, several times. Reported is the median per size and by how much the size that
is farthest off differs from the mean of all.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

from tests.bench import common, work

PROMPT, COMPLETION = 96, 32
LIMIT = 0.15


def forward_and_backward(trainer: Any, batch: Any) -> None:
    """The summed log-probabilities of one microbatch, with gradients to the adapter."""
    trainer.module(batch).logps.sum().backward()
    for parameter in trainer.parameters:
        parameter.grad = None


def largest_deviation(seconds_per_token: Sequence[float]) -> float:
    """Of the value farthest from the mean, as a fraction of the mean."""
    middle = mean(seconds_per_token)
    return max(abs(value - middle) for value in seconds_per_token) / middle


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run and print; returns what is recorded."""
    from align.data.packing import collate

    arguments = parse(argv)
    started = time.perf_counter()
    threads = common.use_threads(arguments.threads)
    shape = work.TOY if arguments.toy else work.BENCH
    per_tree = PROMPT + 2 * COMPLETION
    with tempfile.TemporaryDirectory() as name:
        folder = work.write_model(shape, Path(name))
        trainer = work.make_trainer(folder, {"name": "dpo"}, dtype=arguments.dtype, device="cpu")
    trainer.module.train()
    batches = {}
    for size in arguments.sizes:
        trees = work.random_trees(max(1, size // per_tree), PROMPT, COMPLETION, vocabulary=shape.vocabulary)
        batches[size] = collate(trees)
    print(f"pairs of {PROMPT} + 2 x {COMPLETION}, {shape.parameters / 1e6:.1f}M, {arguments.dtype}, {threads} threads")
    for batch in batches.values():  # the first run of a size allocates what the others find
        forward_and_backward(trainer, batch)
    sides = {str(size): lambda batch=batch: forward_and_backward(trainer, batch) for size, batch in batches.items()}
    rounds = common.alternate(sides, arguments.repeats)
    tokens = {str(size): batch.token_ids.numel() for size, batch in batches.items()}
    micro = {size: [1e6 * s / tokens[size] for s in seconds] for size, seconds in rounds.seconds.items()}
    rows = [["tokens", "us/token", "min", "max"]]
    rows += [[f"{tokens[size]:,}", *(f"{f(v):.1f}" for f in (median, min, max))] for size, v in micro.items()]
    deviation = largest_deviation([median(v) for v in micro.values()])
    print(common.columns(rows))
    print(f"largest deviation from the mean: {deviation:.1%}; goal {LIMIT:.0%}")
    figures = {
        "dtype": arguments.dtype,
        "tokens": tokens,
        "microseconds_per_token": {size: {"median": median(v), "rounds": v} for size, v in micro.items()},
        "largest_deviation": deviation,
    }
    if not arguments.toy:
        goal = f"seconds per token at {', '.join(tokens)} packed tokens within {LIMIT:.0%}"
        name = f"linear-cost-{arguments.dtype}"
        common.write_result(name, goal=goal, met=deviation <= LIMIT, figures=figures, started=started)
    return figures


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--sizes", type=common.integers, default=[2048, 8192, 32768])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--toy", action="store_true", help="a tiny model; nothing is recorded")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
