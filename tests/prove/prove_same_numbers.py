"""A change of the house changes no number: this tree and another one run the same recipe and leave the same bits.

    python -m tests.prove.prove_same_numbers --against TREE

TREE: a checkout, or a commit of this one (default: the one before HEAD). The recipe has a stage of every kind, and one
of every loss on pairs and on single completions, over a model from scratch: a minute or two for each tree on two cores.
Compared: every line of metrics.jsonl without times and memory, every file of weights, every completion and score of the
rollouts, and what was found of the data. Each difference is named.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tests.prove.entry import CHECKOUT, record, unpacked
from tests.runs import dpo, grpo, rollouts, sft, timeless, write_data, write_jsonl, write_recipe

LIMIT_S = 3600.0
LORA = {"kind": "lora", "rank": 4, "alpha": 8}
SHORT: dict[str, Any] = {"steps": 3, "adapter": LORA, "save": {"every": 3}}
PAIRS = ("orpo", "simpo", "cpo", {"name": "modpo", "preference_weight": 0.5})
ENGINE = {"name": "transformers", "max_tokens": 8}
WORDS = ("red", "green", "blue")
SHOWN = 40  # differences that are printed


def stages() -> Iterator[dict[str, Any]]:
    """One of every kind, and of every loss that a stage of its kind may have."""
    yield sft(steps=8, eval={"data": {"path": "sums.jsonl", "limit": 16}, "every": 4, "at_start": True})
    yield dpo(**SHORT, eval={"data": "pairs.jsonl", "every": 3})
    yield dpo(**SHORT, id="dpo-cached", reference="cached", loss={"name": "dpo", "label_smoothing": 0.1})
    yield dpo(**SHORT, id="dpo-sft", loss=["dpo", {"name": "sft", "weight": 0.2}])
    for loss in PAIRS:
        name = loss if isinstance(loss, str) else str(loss["name"])
        yield dpo(**SHORT, id=name, loss=loss)
    yield dpo(**SHORT, id="kto", loss="kto", data="unpaired.jsonl", batch={"sequences": 8})
    yield {**dpo(**SHORT, id="judged", data="plain.jsonl", loss=PAIRS[-1]), "rewards": ["rewards.py:brevity"]}
    yield {**dpo(**SHORT, id="score"), "kind": "reward_model"}
    yield {
        "id": "colours", "kind": "classify", "from": "sft", "data": "texts.jsonl", "labels": list(WORDS),
        "batch": {"sequences": 8}, "optim": {"lr": 1e-3}, "eval": {"data": "texts.jsonl", "every": 3}, **SHORT,
    }  # fmt: skip
    common = {**SHORT, "rollout": ENGINE, "eval": {"data": {"path": "sums.jsonl", "limit": 8}, "every": 3}}
    yield grpo(**common)
    updates = {"batch": {"groups": 4, "group_size": 4}, "updates_per_batch": 2, "minibatches": 2}
    yield grpo(**common, **updates, id="grpo-updates", packing={"max_tokens": 64})
    yield {
        "id": "exam", "kind": "evaluate", "of": ["sft", "grpo"], "data": {"path": "sums.jsonl", "limit": 8},
        "rewards": ["rewards.py:correct"], "rollout": {**ENGINE, "temperature": 0.0},
    }  # fmt: skip
    yield {"id": "losses", "kind": "evaluate", "of": ["sft", "dpo"], "data": "sums.jsonl"}
    yield {"id": "merged", "kind": "merge", "from": "grpo"}
    yield {"id": "exported", "kind": "export", "from": "dpo", "dtype": "bfloat16"}


def write_inputs(folder: Path) -> Path:
    """Data of every kind, rewards and the recipe; returns its path."""
    write_data(folder)
    pairs = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    write_jsonl(folder / "plain.jsonl", pairs)
    write_jsonl(folder / "pairs.jsonl", [{**pair, "margin": 0.1 * (n % 5)} for n, pair in enumerate(pairs)])
    singles = [
        {"prompt": pair["prompt"], "completion": pair[side], "label": side == "chosen"}
        for pair in pairs
        for side in ("chosen", "rejected")
    ]
    write_jsonl(folder / "unpaired.jsonl", singles)
    texts = [{"text": f"{n} {WORDS[n % 3]} {n * n}", "label": WORDS[n % 3]} for n in range(48)]
    write_jsonl(folder / "texts.jsonl", texts)
    return write_recipe(folder, "same", list(stages()))


def run_with(tree: Path, folder: Path) -> Path:
    """The recipe, run by the code of `tree` in `folder`; returns the run folder."""
    recipe = write_inputs(folder)
    environment = {**os.environ, "PYTHONPATH": str(tree)}
    asked = [sys.executable, "-P", "-c", "import align, rewards, rollout; print(align.__file__)"]
    found = subprocess.run(asked, cwd=folder, env=environment, capture_output=True, text=True, check=True).stdout
    assert Path(found.strip()).is_relative_to(tree), f"{found.strip()} is not in {tree}"
    command = [sys.executable, "-m", "align.cli.main", "run", recipe.name]
    with recipe.with_suffix(".log").open("wb") as log:
        code = subprocess.run(command, cwd=folder, env=environment, stdout=log, stderr=log, timeout=LIMIT_S).returncode
    assert code == 0, recipe.with_suffix(".log").read_text()
    return folder / "runs" / "same"


def left(run: Path) -> dict[str, Any]:
    """Every number that a run left, by a name that says where it stands."""
    found: dict[str, Any] = {}
    for stage in (str(one["id"]) for one in stages()):
        for n, line in enumerate(timeless(run, stage)):
            found |= {f"{stage}/metrics.jsonl, line {n + 1}: {k}": v for k, v in line.items() if "memory" not in k}
        for n, row in enumerate(rollouts(run, stage)):
            row["origin"] = row["origin"].rpartition("/")[2]  # the folders have other names
            found |= {f"{stage}/rollouts, row {n}: {key}": value for key, value in row.items()}
    for path in sorted(run.rglob("*.safetensors")):
        found[str(path.relative_to(run))] = hashlib.sha256(path.read_bytes()).hexdigest()
    for path in sorted(run.glob("*/*margins.json")):
        found[str(path.relative_to(run))] = json.loads(path.read_text())
    return found


def differences(here: Mapping[str, Any], there: Mapping[str, Any]) -> list[str]:
    """Names of what is not the same, with both values; NaN is the same as NaN."""
    names = [*here, *(name for name in there if name not in here)]
    return [
        f"{name}: {there.get(name, 'nothing')} -> {here.get(name, 'nothing')}"
        for name in names
        if name not in here or name not in there or repr(here[name]) != repr(there[name])
    ]


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--against", default="HEAD~1", metavar="TREE", help="a checkout, or a commit")
    parser.add_argument("--record", action="store_true", help="write an entry to tests/prove/results")
    arguments, begun = parser.parse_args(words), time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        trees = {"here": CHECKOUT, "there": unpacked(arguments.against, folder / "tree")}
        found = {}
        for side, tree in trees.items():
            (folder / side).mkdir()
            found[side] = left(run_with(tree, folder / side))
            print(f"{side}: {len(found[side])} numbers and files of {len(list(stages()))} stages", flush=True)
    apart = differences(found["here"], found["there"])
    print("\n".join(apart[:SHOWN]))
    print(f"{len(apart)} of {len(found['here'])} differ")
    if arguments.record:
        figures = {
            "compared": len(found["here"]),
            "stages": [one["id"] for one in stages()],
            "different": apart[:SHOWN],
        }
        claim = f"every stage leaves the same numbers and weights as with {arguments.against}, bit for bit"
        command = f"python -m tests.prove.prove_same_numbers --against {arguments.against} --record"
        seconds = time.monotonic() - begun
        print(record("same-numbers", claim=claim, command=command, figures=figures, proved=not apart, seconds=seconds))
    return 1 if apart else 0


if __name__ == "__main__":
    sys.exit(main())
