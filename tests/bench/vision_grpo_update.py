"""One GRPO update on groups about a picture: ours against padded batches of our own engine and TRL's GRPOTrainer.

    python -m tests.bench.vision_grpo_update [--tower frozen|trained] [--dtype float32|bfloat16] [--groups 2]

Groups of 8 completions of 64 tokens, each on a picture of its own of 448 x 448 pixels (256 tokens) among 32 tokens of
text, random ids and pixels; LoRA on the language model and, with `--tower trained`, on the tower. As in
`grpo_update_against_trl` the update begins with completions and advantages that are given and includes the reference
log-probabilities (KL at 0.04). Sides:

    ours               a picture runs through the tower once for its group (frozen: once for both passes); the cache of
                       features is emptied before every update
    ours, known        with the pictures in the cache, as from the second epoch on (frozen tower)
    ours, no cache     the tower runs in both passes
    padded             our engine, a row for every completion with its prompt and its picture, at its fastest batch size
    TRL                the same rows, at its fastest batch size

What was expected before anything was measured is in EXPECTED, and is recorded with the result.
"""

from __future__ import annotations

import argparse
import functools
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from align.protocols.trees import Segment, Tree
from tests.bench import common, peer, peer_grpo, vision, vision_report, work
from tests.bench.grpo_update_against_trl import KL, with_sampler_logps

CACHE_MB = 1024
LOSS = {"name": "grpo", "kl": KL}
EXPECTED = (
    "padded 3.9x (language model 3.5 times the tokens, tower 16 runs a picture against 1), TRL 5x (and its head over "
    "every position)"
)


def groups(arguments: argparse.Namespace, pictures: vision.Pictures, shape: work.Shape) -> list[Tree]:
    """Random groups; the picture stands in the middle of the prompt, between its marks."""
    from PIL import Image

    side, text, completion = (56, 8, 6) if arguments.toy else (448, 32, 64)
    rng = np.random.default_rng(1)
    mark, end, _, _ = pictures.processor.tokenizer.convert_tokens_to_ids(list(vision.MARKS))
    limit = min(shape.vocabulary, mark)  # no mark of a picture in the text
    trees = work.random_trees(
        arguments.groups, text, completion, vocabulary=limit, branches=arguments.group_size, rollout=True
    )
    found = []
    for tree in trees:
        pixels = rng.integers(0, 256, (side, side, 3), dtype=np.uint8)
        medium = pictures.add(f"random-{tree.id}", Image.fromarray(pixels))
        ids = tree.trunk.token_ids
        before = np.append(ids[: text // 2], mark)
        own = np.full(medium.length, pictures.pad)
        joined = np.concatenate([before, own, [end], ids[text // 2 :]])
        trunk = Segment(joined, np.zeros(len(joined), dtype=bool), media=(replace(medium, start=len(before)),))
        found.append(replace(tree, trunk=trunk))
    return found


def choose(
    arguments: argparse.Namespace, trainer: Any, folder: Path, trees: list[Tree]
) -> tuple[int, common.Apart, int, common.Apart, str, int, dict[str, float]]:
    """(our token budget, our engine on padded batches and its batch size, TRL's trainer, its setting and batch size,
    what was tried)."""
    some = trees[:1]
    found = trainer.step(some, step=0, progress=0.0)
    mine = (found["loss/total"], found["optim/grad_norm"])
    targets = vision.TARGETS[arguments.tower]

    def ours(budget: int) -> None:
        work.repack(trainer, budget)
        vision.forget_features(trainer, CACHE_MB)
        trainer.step(some, step=0, progress=0.0)

    budget, tried = common.fastest(arguments.max_tokens, ours, "ours, max_tokens")
    padded = common.place_for(arguments.toy)(vision.Padded, folder, LOSS, arguments.dtype, targets, reference=True)
    padded.call("draw_adapter")
    checked = padded.call("update", some, (2, False))
    common.check_same_work(mine, checked, arguments.dtype, "padded batches of our engine", other="padded")
    settings = [(batch, False) for batch in arguments.batches]
    best, more = common.fastest(settings, functools.partial(padded.call, "update", some), "padded")
    options = {"group_size": arguments.group_size, "max_completion": len(trees[0].branches[0]), "kl": KL}
    make = functools.partial(common.place_for(arguments.toy), peer_grpo.Grpo, folder, **options, targets=targets)
    theirs, setting, batch, others = peer.choose(arguments, make, mine, some, some)
    tried |= {f"padded {key}": value for key, value in more.items()} | others
    return budget, padded, best[0], theirs, setting, batch, tried


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run and print; returns what is recorded."""
    arguments = parse(argv)
    started = time.perf_counter()
    threads = common.use_threads(arguments.threads)
    frozen = arguments.tower == "frozen"
    shape, tower = (work.TOY, vision.TOY_TOWER) if arguments.toy else (work.BENCH, vision.TOWER)
    arguments.batches = peer.usable(arguments.batches, arguments.group_size)
    with tempfile.TemporaryDirectory() as name:
        folder = vision.write_model(shape, tower, Path(name), real=False)
        trees = groups(arguments, vision.Pictures(folder), shape)
        print(
            f"{arguments.groups} groups of {arguments.group_size}, prompt {len(trees[0].trunk)} of which "
            f"{trees[0].trunk.media[0].length} are an image's, completion {len(trees[0].branches[0])}, KL {KL}; tower "
            f"{arguments.tower}, {arguments.dtype}, {threads} threads; generation left out\n{peer.HEAD_NOTE}"
        )
        targets = vision.TARGETS[arguments.tower]
        trainer = work.make_trainer(folder, LOSS, dtype=arguments.dtype, device="cpu", targets=targets)
        work.draw_adapter(trainer.module)
        trees = with_sampler_logps(trainer, trees)
        budget, padded, rows, theirs, setting, batch, tried = choose(arguments, trainer, folder, trees)
        work.repack(trainer, budget)
        more: dict[str, Callable[[], object]] = {
            **vision.our_sides(trainer, trees, CACHE_MB, frozen=frozen, later="ours, known"),
            "padded": lambda: padded.call("update", trees, (rows, False)),
        }
        rounds = peer.in_turn(trainer, theirs, trees, batch, arguments, more)
        padded.close()
    windows = {
        side: vision.padded_windows(trees, size, by_length=False) for side, size in (("padded", rows), ("TRL", batch))
    }
    return vision_report.report(
        "vision-grpo-update",
        arguments,
        rounds,
        settings={"TRL": setting, "padded": f"batch {rows}"},
        budget=budget,
        work_of=lambda side: work_of(side, shape, tower, trees, budget, windows, frozen),
        amounts={"completions": arguments.groups * arguments.group_size},
        about={"groups": arguments.groups, "group_size": arguments.group_size, "expected": EXPECTED},
        tried=tried,
        started=started,
    )


def work_of(
    side: str,
    shape: work.Shape,
    tower: vision.Tower,
    trees: Sequence[Tree],
    budget: int,
    windows: dict[str, list[list[Tree]]],
    frozen: bool,
) -> float:
    """Operations of a side's update. The tower runs for the policy and for the reference, and backward where it learns;
    ours keeps what a frozen one gave."""
    passes = 2 if frozen else 3
    if side in windows:
        layout = work.padded_layout(windows[side], compact_head=side != "TRL")
        images = vision.images_of(trees, once=False) * passes
    else:
        layout = work.packed_layout(trees, budget, keep_together=False)
        known = {"ours": 1 if frozen else passes, "ours, known": 0, "ours, no cache": passes}
        images = vision.images_of(trees, once=True) * known[side]
    return vision.flop(shape, tower, layout, images, reference=True)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = vision_report.parser(__doc__)
    parser.add_argument("--groups", type=int, default=2)
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--batches", type=common.integers, default=[1, 2, 8], help="completions of TRL's batches, ours")
    parser.add_argument("--max-tokens", type=common.integers, default=[1024, 2048])
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
