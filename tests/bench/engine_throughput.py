"""Tokens per second of the vLLM engine with base weights, with an adapter, and with merged weights; start and publish
times. Every way of publishing starts an engine of its own in a child process.

    python tests/bench/engine_throughput.py [--hidden 128 --layers 4 --groups 16 --group-size 8 --max-tokens 16]
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from align.protocols import PromptItem, Publication, Sampling, group_seed


def write_versions(folder: Path, hidden: int, layers: int, rank: int) -> dict[str, Publication]:
    """A model, an adapter on all its linear layers, and the two merged."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    from align.model.adapters import attach, digest, merged_state, save, tensors_digest
    from align.recipe.schema import Adapter
    from tests.tiny_models import write_tiny_qwen3

    base = write_tiny_qwen3(folder / "base", layers=layers, hidden=hidden)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, hidden {hidden}, {layers} layers, float32")
    peft = attach(model, Adapter(rank=rank), None, seed=0)
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.02)
    save(peft, folder / "adapter")
    (folder / "merged").mkdir()
    merged = {name: tensor.contiguous() for name, tensor in merged_state(peft, torch.float32)}
    save_file(merged, folder / "merged" / "model.safetensors")
    return {
        "base": Publication(1, "base", "", ""),
        "adapter": Publication(1, "adapter", str(folder / "adapter"), digest(peft, torch.float32), rank),
        "merged": Publication(1, "weights", str(folder / "merged"), tensors_digest(merged)),
    }


def measure(base: str, publication: Publication, arguments: argparse.Namespace, out: Any) -> None:
    """In a child process: start, publish three times (the first one probes), generate; the best of the calls counts."""
    from rollout.base import EngineSpec, make_engine

    marks = [time.perf_counter()]
    engine = make_engine(
        EngineSpec("vllm", base, max_model_len=256, lora_rank=publication.rank, threads=arguments.threads)
    )
    marks.append(time.perf_counter())
    for _ in range(3):
        engine.publish(publication)
        marks.append(time.perf_counter())
    random = np.random.default_rng(0)
    prompts = [PromptItem(i, random.integers(3, 259, 16), group_seed(0, "bench", i)) for i in range(arguments.groups)]
    rates = []
    for _ in range(arguments.repeats):
        started = time.perf_counter()
        groups = engine.generate(prompts, arguments.group_size, Sampling(max_tokens=arguments.max_tokens))
        tokens = sum(len(c.token_ids) for g in groups for c in g.completions)
        rates.append((tokens / (time.perf_counter() - started), tokens))
    engine.close()
    seconds = np.diff(marks)
    out.put((float(seconds[0]), float(seconds[1]), float(seconds[2:].min()), rates[0][0], max(rates)[0], rates[0][1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (
        ("hidden", 128),
        ("layers", 4),
        ("rank", 16),
        ("groups", 16),
        ("group-size", 8),
        ("max-tokens", 16),
        ("repeats", 5),
        ("threads", len(os.sched_getaffinity(0))),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)  # children read it before they import torch
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        versions = write_versions(Path(folder), arguments.hidden, arguments.layers, arguments.rank)
        print(f"{arguments.groups} groups of {arguments.group_size}, {arguments.threads} threads")
        print(f"{'':10}{'start s':>9}{'1st publish s':>15}{'publish s':>11}", end="")
        print(f"{'1st tok/s':>11}{'best tok/s':>12}{'tokens':>8}")
        for name, publication in versions.items():
            out = context.Queue()
            child = context.Process(target=measure, args=(f"{folder}/base", publication, arguments, out))
            child.start()
            start, first, publish, cold, best, tokens = out.get(timeout=600)
            child.join()
            print(f"{name:10}{start:9.1f}{first:15.2f}{publish:11.3f}{cold:11.0f}{best:12.0f}{tokens:8d}")


if __name__ == "__main__":
    main()
