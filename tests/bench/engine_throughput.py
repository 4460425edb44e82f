"""Tokens per second through fleet and worker, against vLLM alone with the same settings, prompts and seeds.

    python -m tests.bench.engine_throughput [--hidden 256 --layers 4 --groups 16 --group-size 4 --max-tokens 64]
    python -m tests.bench.engine_throughput --publish

Sides: "fleet" (a RayFleet of one worker), "AsyncLLM" (driven by one asyncio script in a process of its own, as a server
would), "LLM" (its `generate` in process, the least there can be). All three are started once and run in turn, the same
list of prompts each time. With --publish: start and publish times of our engine instead, and tokens per second with
base weights, an adapter and merged weights.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from align.protocols.fleet import PromptItem, Sampling, group_seed
from align.protocols.trainer import Publication
from rollout.base import EngineSpec, generate, make_engine
from tests.bench.common import columns, write_result

GOAL = 0.95
LONGEST = 256


def prompts(count: int) -> list[PromptItem]:
    random = np.random.default_rng(0)
    return [PromptItem(i, random.integers(3, 259, 16), group_seed(0, "bench", i)) for i in range(count)]


# ------------------------------------------------------------------------------------------------ three sides


def run_fleet(spec: EngineSpec, arguments: argparse.Namespace, serve: Callable[[Callable[[], int]], None]) -> None:
    from rollout.fleet import RayFleet
    from tests.ray_local import local_ray

    sampling = Sampling(max_tokens=arguments.max_tokens)
    with local_ray(), asyncio.Runner() as loop:
        fleet = RayFleet(spec, 1, cpus=1)
        loop.run(fleet.publish(Publication(1, "base", "", "")))

        async def once() -> int:
            groups = [g async for g in fleet.stream(prompts(arguments.groups), arguments.group_size, sampling)]
            return sum(len(c.token_ids) for group in groups for c in group.completions)  # type: ignore[union-attr]

        serve(lambda: loop.run(once()))
        loop.run(fleet.close())


def requests(arguments: argparse.Namespace, folder: str) -> list[tuple[dict[str, Any], Any]]:
    """vLLM's prompt and parameters of each group, as our engine makes them."""
    from align.protocols.ends import end_ids
    from rollout.vllm import sampling_parameters

    ends = end_ids(Path(folder), None)
    sampling = Sampling(max_tokens=arguments.max_tokens)
    return [
        ({"prompt_token_ids": item.token_ids.tolist()}, sampling_parameters(item, arguments.group_size, sampling, ends))
        for item in prompts(arguments.groups)
    ]


def run_async(spec: EngineSpec, arguments: argparse.Namespace, serve: Callable[[Callable[[], int]], None]) -> None:
    os.environ["TORCHDYNAMO_DISABLE"] = "1"  # as our engine has it on CPU
    from vllm import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    from rollout.vllm_start import engine_arguments

    with asyncio.Runner() as loop:

        async def started() -> Any:
            return AsyncLLM.from_engine_args(AsyncEngineArgs(**engine_arguments(spec, 0)))

        engine = loop.run(started())
        numbers = iter(range(10**9))

        async def group(prompt: Any, parameters: Any) -> int:
            tokens = 0
            async for output in engine.generate(prompt, parameters, str(next(numbers))):
                tokens += sum(len(drawn.token_ids) for drawn in output.outputs)
            return tokens

        async def once() -> int:
            await engine.reset_prefix_cache()
            return sum(await asyncio.gather(*(group(*request) for request in requests(arguments, spec.folder))))

        serve(lambda: loop.run(once()))
        engine.shutdown()


def run_llm(spec: EngineSpec, arguments: argparse.Namespace, serve: Callable[[Callable[[], int]], None]) -> None:
    from rollout.vllm_start import start, stop

    llm = start(spec, 0)

    def once() -> int:
        llm.reset_prefix_cache()
        items, parameters = zip(*requests(arguments, spec.folder), strict=True)
        outputs = llm.generate(list(items), list(parameters), use_tqdm=False)
        return sum(len(drawn.token_ids) for output in outputs for drawn in output.outputs)

    serve(once)
    stop(llm)


SIDES = {"fleet": run_fleet, "AsyncLLM": run_async, "LLM": run_llm}


def work(side: str, spec: EngineSpec, arguments: argparse.Namespace, pipe: Any) -> None:
    """In a child process: start the side, then run once for each message until an empty one."""

    def serve(once: Callable[[], int]) -> None:
        pipe.send((0.0, 0))
        while pipe.recv():
            started = time.perf_counter()
            tokens = once()
            pipe.send((time.perf_counter() - started, tokens))

    SIDES[side](spec, arguments, serve)


@contextmanager
def started_side(side: str, spec: EngineSpec, arguments: argparse.Namespace) -> Any:
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    child = context.Process(target=work, args=(side, spec, arguments, there))
    child.start()
    here.recv()
    try:
        yield here
    finally:
        here.send("")
        child.join(30)
        child.kill()


def compare(spec: EngineSpec, arguments: argparse.Namespace) -> dict[str, list[float]]:
    """Tokens per second by side, one number per round; the first run of each side is not counted."""
    rates: dict[str, list[float]] = {side: [] for side in SIDES}
    with ExitStack() as stack:
        pipes = {side: stack.enter_context(started_side(side, spec, arguments)) for side in SIDES}
        for number in range(arguments.repeats + 1):
            order = list(SIDES) if number % 2 == 0 else list(SIDES)[::-1]
            for side in order:
                pipes[side].send("go")
                seconds, tokens = pipes[side].recv()
                if number:
                    rates[side].append(tokens / seconds)
            if number:
                print("  round", number, "  ".join(f"{s} {r[-1]:,.0f} tokens/s" for s, r in rates.items()), flush=True)
    return rates


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    rounds = [a / b for a, b in zip(ours, theirs, strict=True)]
    return {"median": median(rounds), "min": min(rounds), "max": max(rounds)}


def main_compare(folder: Path, arguments: argparse.Namespace) -> None:
    from tests.tiny_models import write_tiny_qwen3

    began = time.perf_counter()
    base = write_tiny_qwen3(folder / "base", layers=arguments.layers, hidden=arguments.hidden)
    spec = EngineSpec("vllm", str(base), max_model_len=LONGEST, threads=arguments.threads)
    rates = compare(spec, arguments)
    found = {side: ratios(rates["fleet"], rates[side]) for side in ("AsyncLLM", "LLM")}
    print(columns([["", "tokens/s"], *([side, f"{median(r):,.0f}"] for side, r in rates.items())]))
    for side, ratio in found.items():
        print(f"fleet / {side}: {ratio['median']:.2f} (rounds: {ratio['min']:.2f} to {ratio['max']:.2f})")
    if not arguments.toy:
        write_result(
            "engine-throughput",
            goal=f"through fleet and worker at least {GOAL:.0%} of a bare AsyncLLM's tokens per second",
            met=found["AsyncLLM"]["median"] >= GOAL,
            figures={"settings": vars(arguments), "tokens_per_second": rates, "fleet_over": found},
            started=began,
        )


# ------------------------------------------------------------------------------------------------ publishing


def write_versions(folder: Path, hidden: int, layers: int, rank: int) -> dict[str, Publication]:
    """A model, an adapter on all its linear layers, and the two merged."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    from align.model.adapters import attach, digest, merged_state, save, tensors_digest
    from align.recipe.adapter import Adapter
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


def measure(spec: EngineSpec, publication: Publication, arguments: argparse.Namespace, out: Any) -> None:
    """In a child process: start, publish three times (the first one probes), generate; the best of the calls counts."""
    marks = [time.perf_counter()]
    engine = make_engine(replace(spec, lora_rank=publication.rank))
    marks.append(time.perf_counter())
    for _ in range(3):
        engine.publish(publication)
        marks.append(time.perf_counter())
    sampling, rates = Sampling(max_tokens=arguments.max_tokens), []
    for _ in range(arguments.repeats):
        started = time.perf_counter()
        groups = generate(engine, prompts(arguments.groups), arguments.group_size, sampling)
        tokens = sum(len(c.token_ids) for g in groups for c in g.completions)
        rates.append((tokens / (time.perf_counter() - started), tokens))
    engine.close()
    seconds = np.diff(marks)
    out.put((float(seconds[0]), float(seconds[1]), float(seconds[2:].min()), rates[0][0], max(rates)[0], rates[0][1]))


def main_publish(folder: Path, arguments: argparse.Namespace) -> None:
    context = multiprocessing.get_context("spawn")
    versions = write_versions(folder, arguments.hidden, arguments.layers, arguments.rank)
    spec = EngineSpec("vllm", f"{folder}/base", max_model_len=LONGEST, threads=arguments.threads)
    rows = [["", "start s", "1st publish s", "publish s", "1st tok/s", "best tok/s", "tokens"]]
    for name, publication in versions.items():
        out = context.Queue()
        child = context.Process(target=measure, args=(spec, publication, arguments, out))
        child.start()
        start, first, publish, cold, best, tokens = out.get(timeout=600)
        child.join()
        rows.append([name, f"{start:.1f}", f"{first:.2f}", f"{publish:.3f}", f"{cold:.0f}", f"{best:.0f}", str(tokens)])
    print(columns(rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (
        ("hidden", 256),
        ("layers", 4),
        ("rank", 16),
        ("groups", 16),
        ("group-size", 4),
        ("max-tokens", 64),
        ("repeats", 5),
        ("threads", len(os.sched_getaffinity(0))),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--publish", action="store_true", help="start and publish times of our engine")
    parser.add_argument("--toy", action="store_true", help="write no result")
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)  # children read it before they import torch
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    with tempfile.TemporaryDirectory() as folder:
        (main_publish if arguments.publish else main_compare)(Path(folder), arguments)


if __name__ == "__main__":
    main()
