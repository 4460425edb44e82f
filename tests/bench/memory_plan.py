"""The memory plan of `align check` against what a trainer then takes: peak memory of an update.

    python -m tests.bench.memory_plan [--tokens 1024 --hidden 640 --layers 12 --vocabulary 16384] [--toy]
    python -m tests.bench.memory_plan --gpu      the shape of Qwen2.5-7B in bfloat16, random weights; needs a GPU

Each case runs in a process of its own. What it holds after its imports and a first product of matrices is taken away;
the trainer is built and makes an update, so that moments exist and what was only needed to load is gone; then a second
update runs. Its peak is taken twice. Allocated: what malloc has given out, asked for every millisecond, and the weights
that are mapped from their file; on a GPU what torch allocated. Resident (5 into /proc/self/clear_refs before, VmHWM
after): with the gaps that malloc leaves between, which the plan has as a part of its own, a rule of thumb. An update
has two microbatches, as one of a recipe that does not fit one has.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import re
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.bench import common
from tests.bench.resident import reset_peak, resident_peak

LIMIT, GPU_GOAL_GB = 0.15, 9.0
GPU_CASES = ("qlora, checkpointing", "lora, checkpointing")
CASES: dict[str, dict[str, Any]] = {
    "lora": {"kind": "lora"},
    "lora, checkpointing": {"kind": "lora", "checkpointing": True},
    "qlora": {"kind": "qlora"},
    "qlora, checkpointing": {"kind": "qlora", "checkpointing": True},
    "dora": {"kind": "dora"},
    "dora, checkpointing": {"kind": "dora", "checkpointing": True},
    "full": {"kind": "full"},
    "full, checkpointing": {"kind": "full", "checkpointing": True},
    "full, 8-bit AdamW": {"kind": "full", "optimizer": "adamw_8bit"},
}


def config_of(arguments: argparse.Namespace) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "vocab_size": arguments.vocabulary,
        "hidden_size": arguments.hidden,
        "intermediate_size": arguments.hidden * 8 // 3,
        "num_hidden_layers": arguments.layers,
        "num_attention_heads": arguments.hidden // 64,
        "num_key_value_heads": max(1, arguments.hidden // 256),
        "tie_word_embeddings": True,
    }


def planned(config: dict[str, Any], case: dict[str, Any], tokens: int, gpu: bool = False) -> Any:
    """The plan's Estimate."""
    from align.check.memory.plan import Work, trainer
    from align.check.memory.sizes import sizes_of
    from align.recipe.adapter import Adapter

    sizes = sizes_of(config)
    assert sizes is not None
    work = Work(
        "bfloat16" if gpu else "float32",
        tokens,
        gpu=gpu,
        checkpointing=case.get("checkpointing", False),
        optimizer=case.get("optimizer", "adamw"),
    )
    return trainer(sizes, Adapter(kind=case["kind"]), work)


def gpu_config() -> dict[str, Any]:
    """Of Qwen2.5-7B."""
    return {
        "model_type": "qwen2",
        "vocab_size": 152_064,
        "hidden_size": 3584,
        "intermediate_size": 18_944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "tie_word_embeddings": False,
    }


def write_model(folder: Path, config: dict[str, Any], gpu: bool = False) -> None:
    """Random weights; on a GPU drawn there, in bfloat16."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    settings = {key: value for key, value in config.items() if key != "model_type"}
    made = AutoConfig.for_model(config["model_type"], **settings)
    with torch.device("cuda" if gpu else "cpu"):
        model = AutoModelForCausalLM.from_config(made, dtype=torch.bfloat16 if gpu else torch.float32)
    model.save_pretrained(folder)


class _Info(ctypes.Structure):
    """struct mallinfo2, malloc.h."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keep",
        )
    ]


class Allocated:
    """The most that malloc had given out at once inside the block, since this was made; bytes."""

    def __init__(self) -> None:
        self._asked = ctypes.CDLL(None).mallinfo2
        self._asked.restype = _Info
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.before, self.peak = self.now(), 0

    def now(self) -> int:
        info = self._asked()
        return int(info.uordblks + info.hblkhd)

    def _watch(self) -> None:
        while not self._done.wait(0.001):
            self.peak = max(self.peak, self.now() - self.before)

    def __enter__(self) -> Allocated:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._done.set()
        self._thread.join()


def mapped() -> int:
    """Bytes of weights that are resident in mappings of their files."""
    blocks = re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text())
    own = (block for block in blocks if block.partition("\n")[0].endswith(".safetensors"))
    return 1024 * sum(int(found[1]) for block in own if (found := re.search(r"Rss:\s+(\d+) kB", block)))


def measured(folder: str, case: dict[str, Any], tokens: int, vocabulary: int, gpu: bool = False) -> dict[str, float]:
    """{"allocated", "resident": growth in bytes at the peak of the second update, "seconds": of it}; in a process that
    has done nothing else."""
    from align.train import memory

    os.environ.update(memory.ENVIRONMENT)  # as in a trainer's actor

    import bitsandbytes  # noqa: F401  (its library is no part of a trainer)
    import torch

    from align.recipe.adapter import Adapter
    from align.recipe.inputs import Model
    from align.recipe.parts import LossTerm, Optim
    from align.train.spec import TrainerSpec
    from align.train.trainer import PolicyTrainer

    common.use_threads(None)
    torch.randn(512, 512) @ torch.randn(512, 512)
    reset_peak()
    before, allocated = resident_peak(), Allocated()
    dtype: Any = "bfloat16" if gpu else "float32"
    model = Model(path=folder, dtype=dtype, gradient_checkpointing=case.get("checkpointing", False))
    optim = Optim(name=case.get("optimizer", "adamw"), lr=1e-4, schedule="constant", warmup=0.0)
    spec = TrainerSpec(
        model=model,
        base=folder,
        adapter_config=Adapter(kind=case["kind"]),
        losses=(LossTerm(name="sft"),),
        optim=optim,
        total_updates=10,
        max_tokens=tokens,
        device="cuda" if gpu else "cpu",
    )
    trainer = PolicyTrainer(spec)
    trees = conversations(2 * tokens, vocabulary)
    trainer.step(trees, step=0, progress=0.0)
    reset_peak()
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    with allocated:
        trainer.step(trees, step=1, progress=0.1)
    seconds = time.perf_counter() - started
    if gpu:
        return {"allocated": torch.cuda.max_memory_allocated(), "seconds": seconds}
    return {"allocated": allocated.peak + mapped(), "resident": resident_peak() - before, "seconds": seconds}


def conversations(tokens: int, vocabulary: int, length: int = 256) -> list[Any]:
    """Trees of random tokens, all but the first scored."""
    import numpy as np

    from align.protocols.trees import Segment, Tree

    rng = np.random.default_rng(0)
    mask = np.arange(length) > 0
    ids = (rng.integers(3, vocabulary, length).astype(np.int64) for _ in range(tokens // length))
    return [Tree(id=n, trunk=Segment(token_ids=own, loss_mask=mask)) for n, own in enumerate(ids)]


def compared(plan: Any, got: dict[str, float]) -> dict[str, Any]:
    """Gigabytes planned and measured, and relative errors of the plan."""
    own = plan.total - plan.parts.get("malloc's gaps", 0.0)
    found = {"plan_gb": own / 1e9, "allocated_gb": got["allocated"] / 1e9, "error": own / got["allocated"] - 1}
    if "resident" in got:
        found |= {"with_gaps_gb": plan.total / 1e9, "resident_gb": got["resident"] / 1e9}
        found["error_with_gaps"] = plan.total / got["resident"] - 1
    return {**found, "seconds": got["seconds"]}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run and print; returns what is recorded."""
    arguments = parse(argv)
    gpu, started = arguments.gpu, time.perf_counter()
    config = gpu_config() if gpu else config_of(arguments)
    found: dict[str, dict[str, Any]] = {}
    rows = [["", "plan GB", "allocated", "error", "with gaps", "resident", "error", "seconds"]]
    with tempfile.TemporaryDirectory(prefix="memory-plan-") as folder:
        common.apart(write_model, Path(folder), config, gpu)
        for name in arguments.cases or (GPU_CASES if gpu else CASES):
            plan = planned(config, CASES[name], arguments.tokens, gpu)
            got = common.apart(measured, folder, CASES[name], arguments.tokens, config["vocab_size"], gpu)
            found[name] = compared(plan, got)
            rows.append(
                [name, *(f"{value:+.1%}" if "error" in key else f"{value:.3f}" for key, value in found[name].items())]
            )
            found[name]["parts_gb"] = {part: size / 1e9 for part, size in plan.parts.items()}
            print("  " + "  ".join(rows[-1]) + f"  ({plan})", flush=True)
    print(common.columns(rows))
    worst = max(abs(own[key]) for own in found.values() for key in own if key.startswith("error"))
    print(f"largest error {worst:.1%}, at most {LIMIT:.0%} wanted")
    figures = {"config": config, "tokens": arguments.tokens, "largest_error": worst, "cases": found}
    if not arguments.toy:
        goal = f"the memory plan is within {LIMIT:.0%} of what an update allocates and has resident at its peak"
        met = worst <= LIMIT
        if gpu:
            goal += f", and QLoRA of the 7B shape takes at most {GPU_GOAL_GB:g} GB at {arguments.tokens} tokens"
            met = met and found[GPU_CASES[0]]["allocated_gb"] <= GPU_GOAL_GB
        name = "memory-plan-gpu" if gpu else "memory-plan"
        common.write_result(name, goal=goal, met=met, figures=figures, started=started)
    return figures


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("tokens", None), ("hidden", 640), ("layers", 12), ("vocabulary", 16384)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--cases", nargs="+", choices=CASES)
    parser.add_argument("--gpu", action="store_true", help="at 2,048 tokens unless --tokens says other")
    parser.add_argument("--toy", action="store_true", help="nothing is recorded")
    arguments = parser.parse_args(argv)
    arguments.tokens = arguments.tokens or (2048 if arguments.gpu else 1024)
    return arguments


if __name__ == "__main__":
    main()
