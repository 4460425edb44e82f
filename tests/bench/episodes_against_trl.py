"""Whole steps of GRPO on episodes with a tool, ours against TRL's GRPOTrainer: the same class, model, groups and turns.

    python -m tests.bench.episodes_against_trl [--steps 4] [--record]

The model is a small one from scratch, shown traces of recipes/calculator.py under TRL's own template of Qwen2.5; the
environment is a class for TRL's environment_factory, which ours runs by `signature: trl`. Ours samples by vLLM, TRL
by transformers in its process: on a CPU it has no other way. The first step of each is left out. Then the same class
with a tool that never returns for one question: what each side does within `--patience` seconds.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from tests import generators
from tests.bench import common, work

GOAL = 3.0
MAX_TURNS, TURN, WHOLE = 3, 48, 160
WORLD = '''
import time


class Calculator:
    """As TRL has environments: reset, tools, get_reward."""

    def reset(self, answer="", hang=False, **row):
        self.answer, self.hang, self.result = str(answer), hang, None

    def add(self, a: int, b: int) -> int:
        """Add two numbers.

        Args:
            a: one
            b: the other

        Returns:
            The sum.
        """
        if self.hang:
            time.sleep(3600)
        self.result = a + b
        return self.result

    def get_reward(self):
        return float(str(self.result) == self.answer)
'''


def template() -> Path:
    """TRL's copy of Qwen2.5's template, which it reads calls of."""
    import trl

    return Path(trl.__file__).parent / "chat_templates" / "qwen2_5.jinja"


def align(recipe: dict[str, Any], folder: Path, patience: float | None = None) -> Path:
    """`align run`; the run's folder."""
    path = folder / f"{recipe['name']}.json"
    path.write_text(json.dumps(recipe), encoding="utf-8")  # JSON is YAML
    command = [sys.executable, "-m", "align.cli.main", "run", str(path)]
    subprocess.run(command, check=True, cwd=work.CHECKOUT, timeout=patience)
    return folder / recipe["name"]


def make_model(folder: Path) -> Path:
    """A model that calls the tool, mostly: trained from scratch on traces."""
    source = f"{generators.RECIPES / 'calculator.py'}"
    config = {
        "model_type": "qwen3", "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 2048,
        "tie_word_embeddings": True, "initializer_range": 0.05,
    }  # fmt: skip
    words = {"train_on": {"path": f"{source}:words"}, "vocab_size": 512}
    stage = {
        "id": "sft", "kind": "sft", "adapter": {"kind": "full"}, "batch": {"sequences": 16}, "steps": 150,
        "data": {"path": f"{source}:sft", "options": {"rows": 4000}}, "optim": {"lr": 3e-3},
    }  # fmt: skip
    model = {"dtype": "float32", "config": config, "tokenizer": words, "chat_template": str(template())}
    run = align({"name": "model", "output": str(folder), "model": model, "stages": [stage]}, folder)
    return run / "sft" / "model"


def rows(count: int, hang: bool) -> list[dict[str, Any]]:
    found = [dict(row) for row in generators.load("calculator").prompts(rows=count)]
    return [{**row, "hang": hang and number == 0} for number, row in enumerate(found)]


def ours(model: Path, folder: Path, shape: tuple[int, int], steps: int, hang: bool) -> list[dict[str, float]]:
    """Seconds and sampled tokens of each step."""
    (folder / "world.py").write_text(textwrap.dedent(WORLD))
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows(shape[0] * (steps + 1), hang)))
    environment = {
        "use": str(folder / "world.py:Calculator"), "signature": "trl", "max_turns": MAX_TURNS, "max_tokens": WHOLE,
        "timeout_s": 2.0, "max_observation_tokens": 32,
    }  # fmt: skip
    stage = {
        "id": "grpo", "kind": "online", "adapter": {"kind": "full"}, "data": str(data), "environment": environment,
        "batch": {"groups": shape[0], "group_size": shape[1]}, "rollout": {"max_tokens": TURN, "truncated": "keep"},
        "optim": {"lr": 1e-6, "schedule": "constant", "warmup": 0.0}, "steps": steps + 1, "save": {"every": steps + 1},
    }  # fmt: skip
    written = {
        "name": "ours",
        "output": str(folder),
        "model": {"path": str(model), "dtype": "float32"},
        "stages": [stage],
    }
    run = align(written, folder)
    lines = (run / "grpo" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    kept = ("tokens/generated", "episode/turns", "episode/calls", "episode/call_errors")
    return [{"seconds": row["time/step"], **{name: row[name] for name in kept}} for row in map(json.loads, lines)]


def theirs(model: str, folder: str, shape: tuple[int, int], steps: int, hang: bool) -> list[dict[str, float]]:
    """The same of GRPOTrainer."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    space: dict[str, Any] = {}
    exec(textwrap.dedent(WORLD), space)
    found: list[dict[str, float]] = []
    counts = {"tokens": 0.0, "calls": 0.0}

    def counted(completion_ids: Any, completions: Any, **_: Any) -> list[float]:
        counts["tokens"] += sum(len(ids) for ids in completion_ids)
        counts["calls"] += sum(len(m.get("tool_calls") or ()) for said in completions for m in said)
        return [0.0] * len(completion_ids)

    class Timed(TrainerCallback):
        begun = 0.0

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.begun = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            found.append({"seconds": time.perf_counter() - self.begun, **counts})
            counts.update(tokens=0.0, calls=0.0)

    arguments = GRPOConfig(
        output_dir=folder, per_device_train_batch_size=shape[0] * shape[1], num_generations=shape[1],
        max_completion_length=WHOLE, max_steps=steps + 1, learning_rate=1e-6, lr_scheduler_type="constant",
        temperature=1.0, loss_type="dapo", use_cpu=True, bf16=False, report_to="none", save_strategy="no",
        disable_tqdm=True, gradient_checkpointing=False, dataloader_pin_memory=False,
        max_tool_calling_iterations=MAX_TURNS - 1,
    )  # fmt: skip
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(model),
        reward_funcs=[counted],
        args=arguments,
        train_dataset=Dataset.from_list(rows(shape[0] * (steps + 1), hang)),
        processing_class=AutoTokenizer.from_pretrained(model),
        environment_factory=space["Calculator"],
        callbacks=[Timed()],
    )
    trainer.train()
    return found


def hanging(model: Path, folder: Path, shape: tuple[int, int], patience: float) -> dict[str, Any]:
    """What each side does with a tool that never returns: seconds of its steps, or that it still waits."""
    import multiprocessing

    aside = folder / "hang"
    aside.mkdir()
    mine = ours(model, aside, shape, 1, True)
    other = multiprocessing.get_context("spawn").Process(target=theirs, args=(str(model), str(aside), shape, 1, True))
    begun = time.monotonic()
    other.start()
    other.join(patience)
    ended = other.exitcode
    if ended is None:
        other.kill()
        other.join()
    said = "still waits" if ended is None else f"ended with {ended}"
    return {"ours": mine, "TRL": f"{said} after {time.monotonic() - begun:.0f} s"}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run and print; returns what is recorded."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--groups", type=int, default=8)
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--patience", type=float, default=90.0, help="seconds that TRL has with a tool that hangs")
    parser.add_argument("--record", action="store_true", help="write the result")
    arguments = parser.parse_args(argv)
    started = time.perf_counter()
    threads = common.use_threads(None)
    shape = (arguments.groups, arguments.group_size)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = make_model(folder)
        trl = common.apart(theirs, str(model), str(folder / "trl"), shape, arguments.steps, False)[1:]
        mine = ours(model, folder, shape, arguments.steps, False)[1:]
        hung = hanging(model, folder, shape, arguments.patience)
    seconds = {"ours": [step["seconds"] for step in mine], "TRL": [step["seconds"] for step in trl]}
    ratios = [b / a for a, b in zip(sorted(seconds["ours"]), sorted(seconds["TRL"]), strict=True)]
    ratio = {"median": median(seconds["TRL"]) / median(seconds["ours"]), "min": min(ratios), "max": max(ratios)}
    for side, steps in (("ours", mine), ("TRL", trl)):
        for step in steps:
            print(f"  {side}: " + "  ".join(f"{key} {value:.2f}" for key, value in step.items()))
    print(f"a step of {shape[0]} groups of {shape[1]} episodes: {common.describe_ratio(ratio)}; goal {GOAL}x")
    print(f"a tool that never returns: ours goes on ({hung['ours']}); TRL {hung['TRL']}")
    figures = {
        "shape": {"groups": shape[0], "group_size": shape[1], "max_turns": MAX_TURNS, "max_tokens": WHOLE},
        "threads": threads, "ratio": ratio, "steps": {"ours": mine, "TRL": trl}, "hanging": hung,
    }  # fmt: skip
    if arguments.record:
        claim = f"a GRPO step on episodes with a tool at least {GOAL} times as fast as TRL 1.16's, and none that hangs"
        met = ratio["median"] >= GOAL
        common.write_result("episodes-against-trl", goal=claim, met=met, figures=figures, started=started)
    return figures


if __name__ == "__main__":
    main()
