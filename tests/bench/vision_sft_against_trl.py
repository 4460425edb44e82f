"""One SFT update on real questions about pictures: ours against padded batches of our own engine and TRL's SFTTrainer.

    python -m tests.bench.vision_sft_against_trl [--tower frozen|trained] [--dtype float32|bfloat16] [--share 0.1]

Rows of easy_vqa and nlvr (`vision.questions`), LoRA on the language model and, with `--tower trained`, on the tower;
one update over all of them. Sides:

    ours                 as a run's first epoch: the cache of features is emptied before every update
    ours, later epochs   with every picture in the cache (frozen tower)
    ours, no cache       the tower runs for every microbatch, once for a picture that several of its rows show
    padded               our engine, 8 rows at a time (transformers' default) in the order of the data
    padded, by length    our engine, rows of a length together, at its fastest batch size
    TRL                  rows of a length together, at its fastest batch size

Every side chooses its batch size or token budget on the first rows; loss and gradient norm are compared first. What
was expected before anything was measured is in EXPECTED, and is recorded with the result.
"""

from __future__ import annotations

import argparse
import functools
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from align.data.prefixes import share_prefixes
from align.protocols.trees import Tree
from tests.bench import common, peer, vision, vision_peer, vision_report, work

CHECKED_ROWS = 12
CACHE_MB = 1024
EXPECTED = (
    "padded in the order of the data 2.4x at 8 rows (a picture of nlvr in most batches makes 25-token rows 80 to 150 "
    "long), by length 1.4x, TRL 2.2x (its head scores every position, its layers make more passes over memory); "
    "since rows that begin alike share that, 23 % fewer tokens: 1.15 times those"
)


def start_ours(
    arguments: argparse.Namespace, folder: Path, targets: str, checked: Sequence[Tree]
) -> tuple[Any, tuple[float, float]]:
    """Our trainer, and its loss and gradient norm on `checked`."""
    trainer = work.make_trainer(
        folder, {"name": "sft"}, dtype=arguments.dtype, device="cpu", targets=targets, reference=False
    )
    work.draw_adapter(trainer.module)
    found = trainer.step(checked, step=0, progress=0.0)
    return trainer, (found["loss/total"], found["optim/grad_norm"])


def choose_ours(arguments: argparse.Namespace, trainer: Any, some: Sequence[Tree]) -> tuple[int, dict[str, float]]:
    def run(budget: int) -> None:
        work.repack(trainer, budget)
        vision.forget_features(trainer, CACHE_MB)
        trainer.step(some, step=0, progress=0.0)

    return common.fastest(arguments.max_tokens, run, "ours, max_tokens")


def choose_padded(
    arguments: argparse.Namespace, make: Callable[[], common.Apart], mine: tuple[float, float], trees: Sequence[Tree]
) -> tuple[common.Apart, int, dict[str, float]]:
    """Our engine on padded batches, and its fastest batch size with rows of a length together."""
    padded = make()
    padded.call("draw_adapter")
    checked = padded.call("update", trees[:CHECKED_ROWS], (4, False))
    common.check_same_work(mine, checked, arguments.dtype, "padded batches of our engine", other="padded")
    some = trees[: arguments.select_rows]
    settings = [(batch, True) for batch in arguments.batches]
    best, tried = common.fastest(settings, functools.partial(padded.call, "update", some), "padded, by length")
    return padded, best[0], {f"padded {key}": value for key, value in tried.items()}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run and print; returns what is recorded."""
    arguments = parse(argv)
    started = time.perf_counter()
    threads = common.use_threads(arguments.threads)
    frozen = arguments.tower == "frozen"
    shape, tower = (work.TOY, vision.TOY_TOWER) if arguments.toy else (work.BENCH, vision.TOWER)
    targets = vision.TARGETS[arguments.tower]
    with tempfile.TemporaryDirectory() as name:
        folder = vision.write_model(shape, tower, Path(name), real=True)
        rows = vision.questions(arguments.share)
        trees = vision.as_trees(rows, vision.Pictures(folder))
        print(describe(trees, arguments, threads))
        trainer, mine = start_ours(arguments, folder, targets, trees[:CHECKED_ROWS])
        some = trees[: arguments.select_rows]
        budget, tried = choose_ours(arguments, trainer, some)
        place = common.place_for(arguments.toy)
        make = functools.partial(
            place, vision.Padded, folder, {"name": "sft"}, arguments.dtype, targets, reference=False
        )
        padded, length_batch, more = choose_padded(arguments, make, mine, trees)
        make_peer = functools.partial(place, vision_peer.Sft, folder, rows, targets)
        theirs, setting, batch, others = peer.choose(arguments, make_peer, mine, trees[:CHECKED_ROWS], some)
        theirs.call("prepare", trees, batch)
        collating = theirs.call("collate_seconds", batch)
        print(f"  TRL's collator, batch {batch}, not timed below: {collating:.2f} s so far")
        work.repack(trainer, budget)
        rounds = peer.in_turn(
            trainer,
            theirs,
            trees,
            batch,
            arguments,
            {
                **vision.our_sides(trainer, trees, CACHE_MB, frozen=frozen, later="ours, later epochs"),
                "padded": lambda: padded.call("update", trees, (arguments.padded_batch, False)),
                "padded, by length": lambda: padded.call("update", trees, (length_batch, True)),
            },
        )
        padded.close()
    windows = windows_of(trees, arguments.padded_batch, length_batch, batch)
    settings = {
        "TRL": setting,
        "padded": f"batch {arguments.padded_batch}",
        "padded, by length": f"batch {length_batch}",
    }
    return vision_report.report(
        "vision-sft-against-trl",
        arguments,
        rounds,
        settings=settings,
        budget=budget,
        work_of=lambda side: work_of(side, shape, tower, trees, budget, windows, frozen),
        amounts={"rows": len(trees)},
        about={"rows": len(trees), "expected": EXPECTED},
        tried=tried | more | others,
        started=started,
    )


def windows_of(trees: Sequence[Tree], padded: int, by_length: int, peers: int) -> dict[str, list[list[Tree]]]:
    """The batches of each padded side, by its batch size."""
    return {
        "padded": vision.padded_windows(trees, padded, by_length=False),
        "padded, by length": vision.padded_windows(trees, by_length, by_length=True),
        "TRL": vision.padded_windows(trees, peers, by_length=True),
    }


def work_of(
    side: str,
    shape: work.Shape,
    tower: vision.Tower,
    trees: Sequence[Tree],
    budget: int,
    windows: dict[str, list[list[Tree]]],
    frozen: bool,
) -> float:
    """Operations of a side's update. A picture that a microbatch without cache shows twice is counted twice, unless
    the two rows begin with it."""
    if side in windows:
        layout = work.padded_layout(windows[side], compact_head=side != "TRL")
        images = vision.images_of(trees, once=False)
    else:
        joined = share_prefixes(trees)
        layout = work.packed_layout(joined, budget, keep_together=False)
        images = [medium.length for tree in joined for medium in tree.media]
        if frozen and side != "ours, no cache":
            images = [] if side == "ours, later epochs" else vision.images_of(trees, once=True)
    return vision.flop(shape, tower, layout, images if frozen else images * 2, reference=False)


def describe(trees: Sequence[Tree], arguments: argparse.Namespace, threads: int) -> str:
    rows, once = (vision.images_of(trees, once=once) for once in (False, True))
    tokens = sum(tree.tokens for tree in trees)
    return (
        f"{len(trees)} rows of {tokens} tokens ({min(t.tokens for t in trees)} to {max(t.tokens for t in trees)}), of "
        f"which {sum(rows)} are images' ({len(once)} different ones, {sum(once)} tokens); tower {arguments.tower}, "
        f"{arguments.dtype}, {threads} threads\n{peer.HEAD_NOTE}"
    )


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = vision_report.parser(__doc__)
    parser.add_argument("--share", type=float, default=0.1, help="of the images, each with all its questions")
    parser.add_argument("--select-rows", type=int, default=48, help="rows that settings are chosen on")
    parser.add_argument("--batches", type=common.integers, default=[1, 8, 16, 32], help="TRL's, and of padded batches")
    parser.add_argument("--padded-batch", type=int, default=8, help="rows of a padded batch in the order of the data")
    parser.add_argument("--max-tokens", type=common.integers, default=[1024, 2048, 4096])
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
