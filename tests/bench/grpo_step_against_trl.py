"""Whole synchronous GRPO steps, ours against TRL's GRPOTrainer: prompts to updated weights, generation included.

    python -m tests.bench.grpo_step_against_trl --model models/smollm2 [--steps 4] [--groups 8] [--max-tokens 48]

The prompts are those of recipes/real.yaml, the reward is `ifeval` on both sides, the adapter LoRA of rank 16, no KL (as
both have it by default). Ours is an `align run` with vLLM; TRL generates by itself, in the process and on the threads
it has: vLLM has no server mode that TRL could use on a CPU. TRL's batch is the best of those tried with a step each.
Each side samples for itself, so the work is equal on average only: seconds a step are given with the tokens generated,
and the ratio is that of seconds per generated token. The first step of each side is left out; it warms up.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from tests import generators
from tests.bench import common, work
from tests.bench.peer import MODES

GOAL = 3.0
REWARD = "ifeval"


def recipe(arguments: argparse.Namespace, folder: Path) -> Path:
    """One online stage on the model as it is."""
    stage = {
        "id": "grpo",
        "kind": "online",
        "adapter": {"kind": "lora", "rank": work.RANK, "alpha": work.ALPHA},
        "data": {"path": f"{generators.RECIPES / 'documented.py'}:prompts", "options": {"rows": 400}},
        "batch": {"groups": arguments.groups, "group_size": arguments.group_size},
        "rollout": {"name": "vllm", "temperature": 1.0, "max_tokens": arguments.max_tokens, "truncated": "keep"},
        "rewards": [{"use": REWARD}],
        "optim": {"lr": work.LR, "schedule": "constant", "warmup": 0.0},
        "steps": arguments.steps + 1,
        "save": {"every": arguments.steps + 1},
    }
    model = {"path": str(arguments.model.resolve()), "dtype": arguments.dtype}
    written = {"name": "ours", "output": str(folder), "model": model, "stages": [stage]}
    path = folder / "ours.yaml"
    path.write_text(json.dumps(written), encoding="utf-8")  # JSON is YAML
    return path


def ours(arguments: argparse.Namespace, folder: Path) -> list[dict[str, float]]:
    """Seconds and generated tokens of each step."""
    command = [sys.executable, "-m", "align.cli.main", "run", str(recipe(arguments, folder))]
    subprocess.run(command, check=True, cwd=work.CHECKOUT)
    lines = (folder / "ours" / "grpo" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    parts = ("time/generate", "time/train", "time/publish", "time/prepare", "time/score")
    return [
        {"seconds": row["time/step"], "tokens": row["tokens/generated"], **{part: row[part] for part in parts}}
        for row in rows
    ]


def theirs(model: str, dtype: str, shape: tuple[int, int, int], steps: int, batch: int) -> list[dict[str, float]]:
    """The same of GRPOTrainer. shape: groups, completions a group, longest completion; batch: completions at once."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOTrainer

    from rewards import Sample
    from rewards.builtins.ifeval import ifeval

    found: list[dict[str, float]] = []
    generated = [0]

    def reward(completion_ids: Any, completions: Any, **columns: Any) -> list[float]:
        generated[0] += sum(len(ids) for ids in completion_ids)
        rows = zip(columns["instruction_id_list"], columns["kwargs"], strict=True)
        samples = [
            Sample(said[0]["content"], row={"instruction_id_list": kinds, "kwargs": kwargs})
            for said, (kinds, kwargs) in zip(completions, rows, strict=True)
        ]
        return [float(score.values) for score in ifeval(samples)]  # type: ignore[arg-type]

    class Timed(TrainerCallback):
        begun = 0.0

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.begun = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            found.append({"seconds": time.perf_counter() - self.begun, "tokens": float(generated[0])})
            generated[0] = 0

    rows = list(generators.load("documented").prompts(rows=shape[0] * (steps + 1)))
    with tempfile.TemporaryDirectory() as folder:
        trainer = GRPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, MODES[dtype][0])),
            reward_funcs=[reward],
            args=_arguments(folder, dtype, shape, steps, batch),
            train_dataset=Dataset.from_list(rows),
            processing_class=AutoTokenizer.from_pretrained(model),
            peft_config=LoraConfig(
                r=work.RANK, lora_alpha=work.ALPHA, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
            ),
            callbacks=[Timed()],
        )
        trainer.train()
    return found


def _arguments(folder: str, dtype: str, shape: tuple[int, int, int], steps: int, batch: int) -> Any:
    from trl import GRPOConfig

    groups, size, longest = shape
    return GRPOConfig(
        output_dir=folder,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=groups * size // batch,
        num_generations=size,
        max_completion_length=longest,
        max_steps=steps + 1,
        learning_rate=work.LR,
        lr_scheduler_type="constant",
        temperature=1.0,
        loss_type="dapo",
        use_cpu=True,
        bf16=MODES[dtype][1],
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        gradient_checkpointing=False,
        dataloader_pin_memory=False,
    )


def per_token(steps: Sequence[dict[str, float]]) -> list[float]:
    return [step["seconds"] / step["tokens"] for step in steps]


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run and print; returns what is recorded."""
    arguments = parse(argv)
    started = time.perf_counter()
    threads = common.use_threads(arguments.threads)
    shape = (arguments.groups, arguments.group_size, arguments.max_tokens)
    model, kind = str(arguments.model.resolve()), arguments.dtype
    print(f"{shape[0]} groups of {shape[1]}, up to {shape[2]} tokens; {kind}, {threads} threads")
    tried = {}
    for batch in arguments.batches:
        first = common.apart(theirs, model, kind, shape, 0, batch)
        tried[f"TRL, batch {batch}"] = per_token(first)[0]
        print(f"  TRL, batch {batch}: {first[0]['seconds']:.1f} s, {first[0]['tokens']:.0f} tokens", flush=True)
    best = min(arguments.batches, key=lambda batch: tried[f"TRL, batch {batch}"])
    peaks = [common.matmul_peak(kind, seconds=0.2)]
    trl = common.apart(theirs, model, kind, shape, arguments.steps, best)[1:]
    peaks.append(common.matmul_peak(kind, seconds=0.2))
    with tempfile.TemporaryDirectory() as folder:
        mine = ours(arguments, Path(folder))[1:]
    peaks.append(common.matmul_peak(kind, seconds=0.2))
    ratios = [b / a for a, b in zip(sorted(per_token(mine)), sorted(per_token(trl)), strict=True)]
    ratio = {"median": median(per_token(trl)) / median(per_token(mine)), "min": min(ratios), "max": max(ratios)}
    for name, steps in (("ours", mine), ("TRL", trl)):
        for step in steps:
            print(f"  {name}: " + "  ".join(f"{key} {value:.1f}" for key, value in step.items()))
    print(f"a generated and trained token is {common.describe_ratio(ratio)} than TRL's, batch {best}; goal {GOAL}x")
    figures = {
        "model": arguments.model.resolve().name,
        "shape": {"groups": shape[0], "group_size": shape[1], "max_tokens": shape[2]},
        "dtype": kind,
        "ratio": ratio,
        "steps": {"ours": mine, "TRL": trl},
        "TRL's batch": best,
        "seconds_per_token_of_settings_in_one_step": tried,
        "matmul_peak_gflop_per_s": [round(peak / 1e9, 1) for peak in peaks],
    }
    if not arguments.toy:
        claim = f"a whole GRPO step at least {GOAL} times as fast as TRL 1.16's, per generated token"
        name = f"grpo-step-against-trl-{arguments.model.resolve().name}-{kind}"
        common.write_result(name, goal=claim, met=ratio["median"] >= GOAL, figures=figures, started=started)
    return figures


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="the folder of a chat model")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--groups", type=int, default=8)
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--max-tokens", type=int, default=48)
    parser.add_argument("--batches", type=common.integers, default=[8, 32], help="TRL's, in completions")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--toy", action="store_true", help="nothing is recorded")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
