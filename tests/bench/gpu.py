"""DPO, GRPO and SFT updates at a 1.5B and a 7B shape with random weights on a GPU, bfloat16, LoRA, against TRL.

    python -m tests.bench.gpu [--models 1.5b,7b] [--losses dpo,grpo,sft] [--lengths 1024,4096,16384] [--out FOLDER]
    python -m tests.bench.gpu --liger       liger's kernels on TRL's side
    python -m tests.bench.gpu --toy         a tiny model, on the CPU where there is no GPU; nothing is recorded

An update has about --tokens tokens, counted as sequences of the given length (three quarters prompt, one quarter
completion; GRPO in groups of 8; of SFT's rows the last quarter is scored), at least one row, pair or group. Each side
runs in a process of its own and takes its fastest setting (`gpu_sides`). Loss and gradient norm of the first update are
compared on equal weights. MFU: counted work of the side's own layout (`work.update_flop`) per second over the device's
bf16 peak. One result file per model, loss and length, written as soon as it is known.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.bench import common, gpu_sides
from tests.bench.gpu_sides import Case

SPEED_GOAL, MFU_GOAL = 2.0, 0.5


def compare(
    case: Case, sides: dict[str, common.Apart], peak: tuple[float, str, str], *, out: Path | None, record: bool
) -> dict[str, Any]:
    started = time.perf_counter()
    ours, theirs = (side.call("measure", case) for side in sides.values())
    _, other = sides
    figures = gpu_sides.compared(case, ours, theirs, peak, other)
    if record:
        mfu = figures["sides"]["ours"]["share_of_peak"]
        liger = "-liger" if other != "TRL" else ""
        common.write_result(
            f"gpu-{case.model}-{case.loss}-{case.length}{liger}",
            goal=f"at least {SPEED_GOAL} times as fast as {other} 1.16 at its best setting, {MFU_GOAL:.0%} MFU",
            met=figures["ratio"]["median"] >= SPEED_GOAL and mfu >= MFU_GOAL,
            figures=figures,
            started=started,
            folder=out,
        )
    return figures


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Run and print all comparisons; returns what is recorded."""
    import torch

    arguments = parse(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not arguments.toy:
        raise SystemExit("error: torch sees no GPU here; `--toy` runs the same lines on a tiny model")
    models, lengths = (["toy"], [64]) if arguments.toy else (arguments.models.split(","), arguments.lengths)
    tokens = 512 if arguments.toy else arguments.tokens
    peak = common.apart(gpu_sides.peak_of, device, 0.02 if arguments.toy else 0.5)
    print(f"{peak[2]}: {peak[0] / 1e12:.3g} TFLOP/s in bfloat16 ({peak[1]})")
    results = []
    for model in models:
        with tempfile.TemporaryDirectory() as name:
            # in a process of its own: what it leaves on the device would count for both sides
            folder = common.apart(gpu_sides.write, model, Path(name), device)
            for loss in arguments.losses.split(","):
                other = "TRL with liger" if arguments.liger else "TRL"
                sides = {
                    "ours": common.Apart(gpu_sides.Ours, folder, device),
                    other: common.Apart(gpu_sides.Theirs, folder, device, arguments.liger),
                }
                for length in lengths:
                    budgets, batches = tuple(arguments.max_tokens), tuple(arguments.batches)
                    case = Case(model, loss, length, tokens, arguments.repeats, budgets, batches, device)
                    results.append(compare(case, sides, peak, out=arguments.out, record=not arguments.toy))
                for side in sides.values():
                    side.close()
    return results


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="1.5b,7b")
    parser.add_argument("--losses", default="dpo,grpo,sft")
    parser.add_argument("--lengths", type=common.integers, default=[1024, 4096, 16384])
    parser.add_argument("--tokens", type=int, default=32768, help="of an update, counted without sharing")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--batches", type=common.integers, default=[1, 2, 8], help="TRL's")
    parser.add_argument("--max-tokens", type=common.integers, default=[8192, 16384, 32768], help="ours")
    parser.add_argument("--out", type=Path, default=None, help="where results are written; default: results/ here")
    parser.add_argument("--liger", action="store_true", help="liger's kernels on TRL's side; needs its package")
    parser.add_argument("--toy", action="store_true")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
