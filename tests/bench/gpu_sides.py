"""The two sides of the comparisons on a GPU: an update of a given loss, at its fastest setting, at one length of
sequences after another in one process.

Each side is meant for a process of its own, so that its peak memory is its own. It tries its settings (ours: token
budgets; TRL: batch sizes, with and without autocast, the slower of which is dropped after the first length), and takes
checkpointing of activations, from then on, only where nothing fits without.
"""

from __future__ import annotations

import functools
import gc
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from align.protocols.trees import Segment, Tree
from tests.bench import common, peer, peer_grpo, peer_text, work
from tests.bench.grpo_update_against_trl import padded, with_sampler_logps

MODELS = {
    "1.5b": work.Shape(1536, 8960, 28, 12, 2, 128, 151_936, tied=True, family="qwen2"),  # Qwen2.5-1.5B
    "7b": work.Shape(3584, 18_944, 28, 28, 4, 128, 152_064, tied=False, family="qwen2"),  # Qwen2.5-7B
    "toy": work.Shape(64, 128, 2, 2, 1, 32, 512, tied=True, family="qwen2"),
}
GROUP_SIZE, KL = 8, 0.04
LOSSES: dict[str, dict[str, Any]] = {
    "dpo": {"name": "dpo", "beta": 0.1},
    "grpo": {"name": "grpo", "kl": KL},
    "sft": {"name": "sft"},
}
MODES = ("bfloat16", "bfloat16, no autocast")


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

    @property
    def reference(self) -> bool:
        return self.loss != "sft"

    def trees(self) -> list[Tree]:
        completion = self.length // 4
        if self.loss == "sft":
            return texts(max(1, self.tokens // self.length), self.length, completion, self.shape.vocabulary)
        branches = 2 if self.loss == "dpo" else GROUP_SIZE
        rows = max(1, self.tokens // (branches * self.length))
        return work.random_trees(
            rows,
            self.length - completion,
            completion,
            vocabulary=self.shape.vocabulary,
            branches=branches,
            rollout=self.loss == "grpo",
        )


def texts(rows: int, length: int, scored: int, vocabulary: int) -> list[Tree]:
    """Rows of random tokens, the last `scored` of each scored."""
    rng = np.random.default_rng(0)
    mask = np.arange(length) >= length - scored
    return [Tree(n, Segment(rng.integers(3, vocabulary, length), mask), origin=f"row {n}") for n in range(rows)]


Setting = tuple[str, Callable[[], tuple[float, float]], work.Layout]
"""Its name; an update, which returns loss and gradient norm; what it computes."""


class Side(ABC):
    """One side's trainer for one loss. `settings` makes it ready for each setting in turn."""

    name: str

    def __init__(self, folder: Path, device: str):
        self.folder, self.device = folder, device
        self.checkpointing = False

    @abstractmethod
    def settings(self, case: Case) -> Iterator[Setting]: ...

    @abstractmethod
    def forget(self) -> None:
        """Let go of the trainer."""

    def measure(self, case: Case) -> dict[str, Any]:
        """The fastest setting that fits: setting, loss and norm of the first update, seconds, bytes, FLOP; and what was
        tried. SystemExit where nothing fits."""
        tried: dict[str, Any] = {}
        while True:
            best, first = None, None
            for setting, update, layout in self.settings(case):
                label = setting + (", checkpointing" if self.checkpointing else "")
                found = attempt(update, case.repeats)
                tried[label] = "out of memory" if found is None else round(min(found["seconds"]), 4)
                print(f"  {self.name}, {label}: {tried[label]}{'' if found is None else ' s'}", flush=True)
                if found is None:
                    continue
                first = first or found["first"]  # with the adapter as drawn
                if best is None or min(found["seconds"]) < min(best["seconds"]):
                    flop = work.update_flop(case.shape, layout, reference=case.reference)
                    best = {**found, "setting": label, "work": flop}
            setting = update = layout = None  # an update holds its trainer
            if best is not None:
                empty()
                return {**best, "first": first, "tried": tried}
            if self.checkpointing:
                raise SystemExit(f"error: {self.name}: nothing fits this device: {', '.join(tried)}")
            self.checkpointing = True
            self.forget()


class Ours(Side):
    name = "ours"
    trainer: Any = None

    def forget(self) -> None:
        self.trainer = None
        empty()

    def make(self, case: Case) -> Any:
        if self.trainer is None:
            self.trainer = work.make_trainer(
                self.folder,
                LOSSES[case.loss],
                dtype="bfloat16",
                device=self.device,
                checkpointing=self.checkpointing,
                reference=case.reference,
            )
        return self.trainer

    def settings(self, case: Case) -> Iterator[Setting]:
        trainer, trees = self.make(case), case.trees()
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


class Theirs(Side):
    """TRL's. liger: with liger's kernels."""

    def __init__(self, folder: Path, device: str, liger: bool = False):
        super().__init__(folder, device)
        self.liger = liger
        self.name = "TRL with liger" if liger else "TRL"
        self.modes = list(MODES)
        self.held: tuple[str, Any] | None = None

    def forget(self) -> None:
        self.held = None
        empty()

    def make(self, case: Case, mode: str) -> None:
        """Hold TRL's trainer of this mode, and no other beside it."""
        if self.held is not None and self.held[0] == mode:
            return
        self.forget()
        options: dict[str, Any] = {"device": self.device, "checkpointing": self.checkpointing, "liger": self.liger}
        if case.loss == "grpo":
            options |= {"group_size": GROUP_SIZE, "max_completion": case.length // 4, "kl": KL}
            self.held = mode, peer_grpo.Grpo(self.folder, mode, **options)
        else:
            kind: Any = peer_text.Dpo if case.loss == "dpo" else peer_text.Sft
            self.held = mode, kind(self.folder, case.trees(), mode, **options)

    def update(self, trees: list[Tree], batch: int) -> tuple[float, float]:
        assert self.held is not None
        found: tuple[float, float] = self.held[1].update(trees, batch)
        return found

    def liger_layers(self, case: Case) -> int:
        self.make(case, self.modes[0])
        assert self.held is not None
        found: int = self.held[1].liger_layers()
        return found

    def settings(self, case: Case) -> Iterator[Setting]:
        trees = case.trees()
        items = len(trees) * (GROUP_SIZE if case.loss == "grpo" else 1)
        for mode in self.modes:
            self.make(case, mode)
            for batch in peer.usable(case.batches, items) or [1]:
                assert self.held is not None
                self.held[1].draw_adapter()
                yield f"{mode}, batch {batch}", functools.partial(self.update, trees, batch), self._layout(case, batch)

    def _layout(self, case: Case, batch: int) -> work.Layout:
        compact = case.device == "cuda"
        if case.loss == "grpo":
            return padded(case.trees(), batch, compact=compact)
        return work.padded_layout(peer.windows_of(case.trees(), batch), compact_head=compact)

    def measure(self, case: Case) -> dict[str, Any]:
        found = super().measure(case)
        self.modes = [found["setting"].partition(", batch")[0]]
        return found


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
        pass
    empty()  # out here: the error holds what was computed until then
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


def compared(
    case: Case, ours: dict[str, Any], theirs: dict[str, Any], peak: tuple[float, str, str], other: str = "TRL"
) -> dict[str, Any]:
    """Figures of a comparison; refused, by SystemExit, unless both sides compute the same loss and gradient norm."""
    where = f"{case.model} {case.loss} at {case.length}"
    common.check_same_work(ours["first"], theirs["first"], "bfloat16", where, other)
    found = {"ours": ours, other: theirs}
    tokens = sum(len(tree.trunk) + sum(map(len, tree.branches)) for tree in case.trees())
    if case.reference:  # counted without sharing
        tokens = sum(len(tree.trunk) + len(branch) for tree in case.trees() for branch in tree.branches)
    sides = [common.Side(n, f["setting"], f["seconds"], f["work"], {"tokens": tokens}) for n, f in found.items()]
    ratio = common.Rounds({name: f["seconds"] for name, f in found.items()}, [peak[0]]).ratio("ours", other)
    print(common.table(sides, peak[0]))
    memory = ", ".join(f"{name} {f['bytes'] / 2**30:.1f} GiB" for name, f in found.items())
    print(f"{where}: ours is {common.describe_ratio(ratio)}; peak memory: {memory}", flush=True)
    return {
        **vars(case),
        "device": peak[2],
        "peak_tflop_per_s": peak[0] / 1e12,
        "peak_from": peak[1],
        "loss_and_norm": {name: f["first"] for name, f in found.items()},
        "ratio": ratio,
        "sides": {
            side.name: side.figures(peak[0])
            | {"peak_memory_gib": found[side.name]["bytes"] / 2**30, "tried": found[side.name]["tried"]}
            for side in sides
        },
    }


def write(model: str, folder: Path, device: str) -> Path:
    return work.write_model(MODELS[model], folder, dtype="bfloat16", device=device)
