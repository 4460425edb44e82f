"""DPO and GRPO updates at a 1.5B and a 7B shape with random weights on a GPU, bfloat16, LoRA, against TRL.

    python -m tests.bench.gpu [--models 1.5b,7b] [--losses dpo,grpo] [--lengths 1024,4096,16384] [--out FOLDER]
    python -m tests.bench.gpu --toy         a tiny model, on the CPU where there is no GPU; nothing is recorded

An update has about --tokens tokens, counted as sequences of the given length (three quarters prompt, one quarter
completion; GRPO in groups of 8), at least one pair or group. Each side runs in a process of its own, so that its peak
memory is its own, and takes its fastest setting: ours over token budgets, TRL over batch sizes 1, 2, 8 and with or
without autocast; checkpointing of activations only where nothing fits without. Loss and gradient norm of the first
update are compared on equal weights. MFU: counted work of the side's own layout (`work.update_flop`) per second over
the device's bf16 peak. One result file per model, loss and length, written as soon as it is known.
"""

from __future__ import annotations

import argparse
import functools
import gc
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.protocols.trees import Tree
from tests.bench import common, peer, work
from tests.bench.grpo_update_against_trl import padded, with_sampler_logps

MODELS = {
    "1.5b": work.Shape(1536, 8960, 28, 12, 2, 128, 151_936, tied=True, family="qwen2"),  # Qwen2.5-1.5B
    "7b": work.Shape(3584, 18_944, 28, 28, 4, 128, 152_064, tied=False, family="qwen2"),  # Qwen2.5-7B
    "toy": work.Shape(64, 128, 2, 2, 1, 32, 512, tied=True, family="qwen2"),
}
GROUP_SIZE, KL = 8, 0.04
SPEED_GOAL, MFU_GOAL = 2.0, 0.5
LOSSES: dict[str, dict[str, Any]] = {"dpo": {"name": "dpo", "beta": 0.1}, "grpo": {"name": "grpo", "kl": KL}}


@dataclass(frozen=True)
class Case:
    """One comparison. tokens: of an update, about; budgets: ours; batches: TRL's."""

    model: str
    loss: str
    length: int
    tokens: int
    repeats: int
    budgets: tuple[int, ...]
    batches: tuple[int, ...]
    device: str

    @property
    def shape(self) -> work.Shape:
        return MODELS[self.model]

    def trees(self) -> list[Tree]:
        branches = 2 if self.loss == "dpo" else GROUP_SIZE
        completion = self.length // 4
        rows = max(1, self.tokens // (branches * self.length))
        return work.random_trees(
            rows,
            self.length - completion,
            completion,
            vocabulary=self.shape.vocabulary,
            branches=branches,
            rollout=self.loss == "grpo",
        )


Setting = tuple[str, Callable[[], tuple[float, float]], work.Layout]
"""Its name; an update, which returns loss and gradient norm; what it computes."""


def our_settings(case: Case, folder: Path, checkpointing: bool) -> Iterator[Setting]:
    trainer = work.make_trainer(
        folder, LOSSES[case.loss], dtype="bfloat16", device=case.device, checkpointing=checkpointing
    )
    trees = case.trees()
    if case.loss == "grpo":
        work.draw_adapter(trainer.module)
        trees = with_sampler_logps(trainer, trees)

    def update() -> tuple[float, float]:
        found = trainer.step(trees, step=0, progress=0.0)
        return found["loss/total"], found["optim/grad_norm"]

    for budget in case.budgets:
        work.repack(trainer, budget)
        work.draw_adapter(trainer.module)
        yield f"max_tokens {budget}", update, work.packed_layout(trees, budget, keep_together=case.loss == "dpo")


def trl_settings(case: Case, folder: Path, checkpointing: bool) -> Iterator[Setting]:
    trees = case.trees()
    options: dict[str, Any] = {"device": case.device, "checkpointing": checkpointing}
    compact = case.device == "cuda"
    for mode in ("bfloat16", "bfloat16, no autocast"):
        side: peer.Dpo | peer.Grpo
        if case.loss == "dpo":
            side = peer.Dpo(folder, trees, mode, **options)
        else:
            completion = len(trees[0].branches[0])
            side = peer.Grpo(folder, mode, group_size=GROUP_SIZE, max_completion=completion, kl=KL, **options)
        items = len(trees) * (1 if case.loss == "dpo" else GROUP_SIZE)
        for batch in peer.usable(case.batches, items) or [1]:
            if case.loss == "dpo":
                layout = work.padded_layout(peer.windows_of(trees, batch), compact_head=compact)
            else:
                layout = padded(trees, batch, compact=compact)
            side.draw_adapter()
            yield f"{mode}, batch {batch}", functools.partial(side.update, trees, batch), layout
        del side
        empty()


def measure(name: str, case: Case, folder: Path) -> dict[str, Any]:
    """The fastest setting of a side that fits: setting, loss, norm, seconds, bytes, FLOP; and what was tried."""
    tried: dict[str, Any] = {}
    best: dict[str, Any] | None = None
    for checkpointing in (False, True):
        settings = (our_settings if name == "ours" else trl_settings)(case, folder, checkpointing)
        first: tuple[float, float] | None = None
        for setting, update, layout in settings:
            label = setting + (", checkpointing" if checkpointing else "")
            found = attempt(update, case.repeats)
            tried[label] = "out of memory" if found is None else round(min(found["seconds"]), 4)
            print(f"  {name}, {label}: {tried[label]}{'' if found is None else ' s'}", flush=True)
            if found is None:
                continue
            first = first or found["first"]  # with the adapter as drawn
            if best is None or min(found["seconds"]) < min(best["seconds"]):
                best = {**found, "setting": label, "work": work.update_flop(case.shape, layout)}
        if best is not None:
            return {**best, "first": first, "tried": tried}
        empty()
    raise SystemExit(f"error: {name}: nothing fits this device, checkpointing included: {', '.join(tried)}")


def attempt(update: Callable[[], tuple[float, float]], repeats: int) -> dict[str, Any] | None:
    """A warm-up and `repeats` updates; None where memory runs out."""
    import torch

    try:
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        first = update()
        seconds = [common.seconds_of(update) for _ in range(repeats)]
        peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
        return {"first": first, "seconds": seconds, "bytes": peak}
    except torch.OutOfMemoryError:
        empty()
        return None


def empty() -> None:
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def peak_of(device: str, seconds: float) -> tuple[float, str, str]:
    """(FLOP/s, where the number is from, the device's name); in a process of its own."""
    import torch

    known, source = common.device_peak("bfloat16", device)
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    return known or common.matmul_peak("bfloat16", device, seconds), source, name


def compare(
    case: Case, folder: Path, peak: tuple[float, str, str], *, out: Path | None, record: bool
) -> dict[str, Any]:
    started = time.perf_counter()
    found = {name: common.apart(measure, name, case, folder) for name in ("ours", "TRL")}
    where = f"{case.model} {case.loss} at {case.length}"
    common.check_same_work(found["ours"]["first"], found["TRL"]["first"], "bfloat16", where)
    tokens = sum(len(tree.trunk) + len(branch) for tree in case.trees() for branch in tree.branches)
    sides = [common.Side(n, f["setting"], f["seconds"], f["work"], {"tokens": tokens}) for n, f in found.items()]
    rounds = common.Rounds({name: f["seconds"] for name, f in found.items()}, [peak[0]])
    ratio = rounds.ratio("ours", "TRL")
    figures = {
        **vars(case),
        "device": peak[2],
        "peak_tflop_per_s": peak[0] / 1e12,
        "peak_from": peak[1],
        "ratio": ratio,
        "sides": {
            side.name: side.figures(peak[0])
            | {"peak_memory_gib": found[side.name]["bytes"] / 2**30, "tried": found[side.name]["tried"]}
            for side in sides
        },
    }
    print(common.table(sides, peak[0]))
    memory = ", ".join(f"{name} {f['bytes'] / 2**30:.1f} GiB" for name, f in found.items())
    print(f"{where}: ours is {common.describe_ratio(ratio)}; peak memory: {memory}", flush=True)
    if record:
        mfu = figures["sides"]["ours"]["share_of_peak"]
        common.write_result(
            f"gpu-{case.model}-{case.loss}-{case.length}",
            goal=f"at least {SPEED_GOAL} times as fast as TRL 1.16 at its best setting, {MFU_GOAL:.0%} MFU",
            met=ratio["median"] >= SPEED_GOAL and mfu >= MFU_GOAL,
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
    peak = common.apart(peak_of, device, 0.02 if arguments.toy else 0.5)
    print(f"{peak[2]}: {peak[0] / 1e12:.3g} TFLOP/s in bfloat16 ({peak[1]})")
    results = []
    for model in models:
        with tempfile.TemporaryDirectory() as name:
            # in a process of its own: what it leaves on the device would count for both sides
            folder = common.apart(write, model, Path(name), device)
            for loss in arguments.losses.split(","):
                for length in lengths:
                    budgets, batches = tuple(arguments.max_tokens), tuple(arguments.batches)
                    case = Case(model, loss, length, tokens, arguments.repeats, budgets, batches, device)
                    results.append(compare(case, folder, peak, out=arguments.out, record=not arguments.toy))
    return results


def write(model: str, folder: Path, device: str) -> Path:
    return work.write_model(MODELS[model], folder, dtype="bfloat16", device=device)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="1.5b,7b")
    parser.add_argument("--losses", default="dpo,grpo")
    parser.add_argument("--lengths", type=common.integers, default=[1024, 4096, 16384])
    parser.add_argument("--tokens", type=int, default=32768, help="of an update, counted without sharing")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--batches", type=common.integers, default=[1, 2, 8], help="TRL's")
    parser.add_argument("--max-tokens", type=common.integers, default=[8192, 16384, 32768], help="ours")
    parser.add_argument("--out", type=Path, default=None, help="where results are written; default: results/ here")
    parser.add_argument("--toy", action="store_true")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
