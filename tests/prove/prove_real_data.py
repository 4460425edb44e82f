"""The recipes of recipes/ on real data: they learn what they are for, and their data reports are right.

    python -m tests.prove real_data

The models are made here, small and from scratch, with tokenizers trained on the data. SFT starts from random weights:
a learning rate meant for a grown model moves a small trained one less than its batches differ. DPO starts after SFT on
the chosen answers, GRPO after SFT on questions of the same kind, early enough that its layout is often wrong.
Only model and paths are overridden (for SFT also the number of rows).
ALIGN_PROVE_RECIPES names a subset of the recipes.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.prove.entry import CHECKOUT, conclude

DATA = Path(os.environ.get("ALIGN_SHARED_DATA", CHECKOUT.parent / "shared" / "data")) / "text"
GSM8K = DATA / "gsm8k" / "train.jsonl"
MULTITURN = DATA / "preference_paired" / "lf_dpo_en_demo.json"
POLITE = DATA / "preference_paired" / "llms_from_scratch_preference.json"
STANDARD_ERRORS = 3.0
LEAST_STEPS = 100

CONFIG = {
    "model_type": "qwen3",
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "initializer_range": 0.05,
}


def align_run(recipe: Path, output: Path, *overrides: str) -> Path:
    """Run a recipe in a process of its own; returns its run folder."""
    command = [sys.executable, "-m", "align.cli.main", "run", str(recipe), f"output={output}", *overrides]
    subprocess.run(command, cwd=CHECKOUT, check=True)
    name = next((o.partition("=")[2] for o in overrides if o.startswith("name=")), recipe.stem)
    return output / name


def small_model(folder: Path, name: str, rows: list[dict[str, Any]], *, vocab_size: int, steps: int) -> Path:
    """A model from scratch after `steps` steps of SFT on `rows` ({messages}); returns its folder."""
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    sft = {
        "id": "sft",
        "kind": "sft",
        "adapter": {"kind": "full"},
        "data": {"path": str(data), "max_length": 8192},
        "batch": {"sequences": 32},
        "optim": {"lr": 3e-3},
        "steps": steps,
    }
    tokenizer = {"train_on": str(data), "vocab_size": vocab_size}
    recipe = {"name": name, "model": {"dtype": "float32", "config": CONFIG, "tokenizer": tokenizer}, "stages": [sft]}
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps(recipe), encoding="utf-8")  # JSON is YAML
    return align_run(path, folder) / "sft" / "model"


def math_model(folder: Path) -> Path:
    rows = [json.loads(line) for line in GSM8K.read_text(encoding="utf-8").splitlines()][2000:]
    turns = [[("user", row["question"]), ("assistant", row["answer"])] for row in rows]
    return small_model(folder, "math", [messages(turn) for turn in turns], vocab_size=2048, steps=120)


def chat_model(folder: Path) -> Path:
    roles = {"human": "user", "gpt": "assistant", "system": "system"}
    turns = [
        [(roles[turn["from"]], turn["value"]) for turn in (*row["conversations"], row["chosen"])]
        for row in json.loads(MULTITURN.read_text(encoding="utf-8"))
    ]
    turns += [
        [("user", f"{row['instruction']}\n{row['input']}".strip()), ("assistant", row["chosen"])]
        for row in json.loads(POLITE.read_text(encoding="utf-8"))
    ]
    return small_model(folder, "chat", [messages(turn) for turn in turns], vocab_size=4096, steps=60)


def messages(turns: list[tuple[str, str]]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


# ------------------------------------------------------------------------------------------------- what is proved


@dataclass(frozen=True)
class Trend:
    """A metric's mean over the first and the last tenth of the steps, and their difference in standard errors."""

    first: float
    last: float
    standard_errors: float


def trend(values: list[float]) -> Trend:
    tenth = max(2, len(values) // 10)
    first, last = values[:tenth], values[-tenth:]
    error = math.sqrt(statistics.variance(first) / tenth + statistics.variance(last) / tenth)
    difference = statistics.mean(last) - statistics.mean(first)
    return Trend(statistics.mean(first), statistics.mean(last), difference / error if error else math.inf)


def lines_of(run: Path, stage: str) -> list[dict[str, float | None]]:
    return [json.loads(line) for line in (run / stage / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def series(lines: list[dict[str, Any]], name: str) -> list[float]:
    return [line[name] for line in lines if line.get(name) is not None]


def common(run: Path, stage: str) -> tuple[dict[str, Any], dict[str, bool], list[dict[str, Any]], dict[str, Any]]:
    """Figures and checks of every recipe; the stage's metrics and its data report."""
    lines = lines_of(run, stage)
    report = json.loads((run / stage / "data.json").read_text(encoding="utf-8"))
    refused = [row for source in report["sources"] for row in source["refused"]]
    figures = {"steps": len(lines), "data": {k: report[k] for k in ("read", "kept", "used", "refused", "truncated")}}
    checks = {
        f"at least {LEAST_STEPS} steps": len(lines) >= LEAST_STEPS,
        "every metric of every step is finite": all(
            v is not None and math.isfinite(v) for x in lines for v in x.values()
        ),
        "the data report adds up": report["read"] == report["kept"] + report["refused"]
        and len(refused) == report["refused"],
        "the merged model is there": (run / "merged" / "model" / "config.json").is_file(),
    }
    return figures, checks, lines, report


def falling_loss(run: Path, stage: str, read: int, refused: int) -> tuple[dict[str, Any], dict[str, bool]]:
    figures, checks, lines, report = common(run, stage)
    loss = trend(series(lines, "loss/total"))
    figures["loss"] = vars(loss)
    checks |= {
        "the loss falls by more than three standard errors": loss.standard_errors < -STANDARD_ERRORS,
        f"{read} rows read, {refused} refused, none cut": (report["read"], report["refused"], report["truncated"])
        == (read, refused, 0),
    }
    return figures, checks


def sft(folder: Path, model: Path) -> tuple[dict[str, Any], dict[str, bool]]:
    untrained = model.parents[1] / "base"  # what the model's own run wrote before its first step
    overrides = (f"model.path={untrained}", f"stages.sft.data.path={GSM8K}", "stages.sft.data.limit=2000")
    return falling_loss(align_run(CHECKOUT / "recipes" / "gsm8k-sft.yaml", folder, *overrides), "sft", 2000, 0)


def multiturn(folder: Path, model: Path) -> tuple[dict[str, Any], dict[str, bool]]:
    overrides = (f"model.path={model}", f"stages.dpo.data.path={MULTITURN}")
    return falling_loss(align_run(CHECKOUT / "recipes" / "dpo-multiturn.yaml", folder, *overrides), "dpo", 300, 0)


def polite(folder: Path, model: Path) -> tuple[dict[str, Any], dict[str, bool]]:
    overrides = (f"model.path={model}", f"stages.dpo.data.path={POLITE}")
    run = align_run(CHECKOUT / "recipes" / "dpo-polite.yaml", folder, *overrides)
    figures, checks = falling_loss(run, "dpo", 1100, 6)
    text = POLITE.read_text(encoding="utf-8")
    starts = [number for number, line in enumerate(text.splitlines(), start=1) if line == "    {"]
    rows = zip(starts, json.loads(text), strict=True)
    same = [f"{POLITE}:{line}" for line, row in rows if row["chosen"] == row["rejected"]]
    report = json.loads((run / "dpo" / "data.json").read_text(encoding="utf-8"))
    refused = [row for source in report["sources"] for row in source["refused"]]
    figures["refused"] = [{**row, "origin": Path(row["origin"]).name} for row in refused]
    checks["the six rows whose sides are equal are named by line"] = [row["origin"] for row in refused] == same
    return figures, checks


def grpo(folder: Path, model: Path) -> tuple[dict[str, Any], dict[str, bool]]:
    overrides = (f"model.path={model}", f"stages.grpo.data.path={GSM8K}")
    run = align_run(CHECKOUT / "recipes" / "gsm8k-grpo.yaml", folder, *overrides)
    figures, checks, lines, _ = common(run, "grpo")
    layout = trend(series(lines, "objective/layout/mean"))
    figures |= {
        "layout": vars(layout),
        "correct": vars(trend(series(lines, "objective/correct/mean"))),
        "dead_groups": statistics.mean(series(lines, "advantage/dead_groups")),
        "truncated": vars(trend(series(lines, "completion/truncated"))),
    }
    reported = ("objective/correct/mean", "advantage/dead_groups", "completion/truncated")
    checks |= {
        "the layout reward rises by more than three standard errors": layout.standard_errors > STANDARD_ERRORS,
        "every step reports correctness, dead groups and truncation": all(
            name in x for x in lines for name in reported
        ),
    }
    return figures, checks


RECIPES: dict[str, tuple[Callable[[Path, Path], tuple[dict[str, Any], dict[str, bool]]], str]] = {
    "gsm8k-sft": (sft, "math"),
    "dpo-multiturn": (multiturn, "chat"),
    "dpo-polite": (polite, "chat"),
    "gsm8k-grpo": (grpo, "math"),
}
MODELS = {"math": math_model, "chat": chat_model}


def main() -> int:
    begun = time.monotonic()
    wanted = os.environ.get("ALIGN_PROVE_RECIPES", ",".join(RECIPES)).split(",")
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        models: dict[str, Path] = {}
        for name in wanted:
            prove, model = RECIPES[name]
            if model not in models:
                models[model] = MODELS[model](folder)
            start = time.monotonic()
            found, checks = prove(folder, models[model])
            figures[name] = {**found, "seconds": round(time.monotonic() - start), "checks": checks}
            print(json.dumps({name: figures[name]}, indent=1), flush=True)
    return conclude(
        "real-data",
        claim=f"each recipe learns what it is for from real data in at least {LEAST_STEPS} steps, by more than "
        f"{STANDARD_ERRORS:g} standard errors, and its data report is right; only model and paths are overridden",
        command=f"ALIGN_PROVE_RECIPES={','.join(wanted)} python -m tests.prove real_data",
        figures=figures,
        begun=begun,
    )


if __name__ == "__main__":
    sys.exit(main())
