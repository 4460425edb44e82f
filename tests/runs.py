"""Real runs for tests and proofs: a tiny story of sums, `align run` as a process of its own, and what it left."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from align.stages import processes
from align.stages.owned import PREFIX
from align.stages.processes import ProcessId

GONE_S = 20.0
START_S = 300.0

CONFIG = {
    "model_type": "qwen3",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}
REWARDS = '''"""The name that users choose first; it must not hide ours."""

from rewards import reward


@reward
def correct(samples):
    return [float(s.completion.strip() == s.row["reference_answer"]) for s in samples]


@reward
def brevity(samples):
    return [-0.1 * len(s.token_ids) for s in samples]
'''


def write_data(folder: Path) -> None:
    """sums.jsonl (conversations), pairs.jsonl, and rewards.py in `folder`."""
    sums = [(a, b) for a in range(8) for b in range(8)]
    questions = [{"role": "user", "content": f"{a} + {b} ="} for a, b in sums]
    answers = [{"role": "assistant", "content": str(a + b)} for a, b in sums]
    wrong = [{"role": "assistant", "content": f"It is {a + b + 1}."} for a, b in sums]
    write_jsonl(folder / "sums.jsonl", [{"messages": [q, a]} for q, a in zip(questions, answers, strict=True)])
    pairs = [
        {"prompt": [q], "chosen": [c], "rejected": [r]}
        for q, c, r in list(zip(questions, answers, wrong, strict=True))[::2]
    ]
    write_jsonl(folder / "pairs.jsonl", pairs)
    (folder / "rewards.py").write_text(REWARDS)


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def sft(**changes: Any) -> dict[str, Any]:
    return {
        "id": "sft", "kind": "sft", "adapter": {"kind": "full"}, "data": "sums.jsonl", "batch": {"sequences": 16},
        "optim": {"lr": 3e-3}, "steps": 40, "save": {"every": 8},
        "eval": {"data": {"path": "sums.jsonl", "limit": 16}, "every": 20, "at_start": True}, **changes,
    }  # fmt: skip


def dpo(**changes: Any) -> dict[str, Any]:
    return {
        "id": "dpo", "kind": "preference", "from": "sft", "adapter": {"kind": "lora", "rank": 4, "alpha": 8},
        "data": "pairs.jsonl", "batch": {"pairs": 8}, "optim": {"lr": 1e-3}, "steps": 8, "save": {"every": 2},
        **changes,
    }  # fmt: skip


def grpo(**changes: Any) -> dict[str, Any]:
    return {
        "id": "grpo", "kind": "online", "from": "dpo", "data": "sums.jsonl", "batch": {"groups": 8, "group_size": 4},
        "rollout": {"max_tokens": 8}, "rewards": [{"use": "rewards.py:correct"}, {"use": "rewards.py:brevity"}],
        "loss": {"name": "grpo", "kl": 0.01}, "optim": {"lr": 1e-3}, "steps": 6, "save": {"every": 2},
        "eval": {"data": {"path": "sums.jsonl", "limit": 16}, "every": 3}, **changes,
    }  # fmt: skip


def write_recipe(folder: Path, name: str, stages: list[dict[str, Any]], **changes: Any) -> Path:
    """A recipe over the data of `write_data`, from scratch in float32; returns its path."""
    recipe = {
        "name": name,
        "output": "runs",
        "model": {"dtype": "float32", "config": CONFIG, "tokenizer": {"train_on": "sums.jsonl", "vocab_size": 300}},
        "report": {"tensorboard": False},
        "stages": stages,
        **changes,
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path


# ------------------------------------------------------------------------------------------------- processes


@contextmanager
def started(recipe: Path, *words: str) -> Iterator[subprocess.Popen[bytes]]:
    """`align run recipe words...` in the recipe's folder, its output in <name>.log; ended with the block."""
    log = recipe.with_suffix(".log")
    with log.open("ab") as out:
        command = [sys.executable, "-m", "align.cli.main", "run", recipe.name, *words]
        process = subprocess.Popen(command, cwd=recipe.parent, stdout=out, stderr=out, start_new_session=True)
        try:
            yield process
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
                process.wait(60)


def run(recipe: Path, *words: str) -> str:
    """Run to the end; returns what it printed. Fails with the output where it does not exit 0."""
    code, text = run_any(recipe, *words)
    assert code == 0, text
    return text


def run_any(recipe: Path, *words: str) -> tuple[int, str]:
    with started(recipe, *words) as process:
        code = process.wait()
    return code, recipe.with_suffix(".log").read_text()


def family(process: subprocess.Popen[bytes]) -> list[ProcessId]:
    """Every process below a run, as told from strangers."""
    import psutil

    found = []
    for child in psutil.Process(process.pid).children(recursive=True):
        described = processes.describe(child.pid, child.name())
        if described is not None:
            found.append(described)
    return found


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_S
    while not condition():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, f"nothing happened for {START_S:.0f} s\n{log.read_text()}"
        time.sleep(0.005)


@dataclass(frozen=True)
class Stopped:
    """A run that got a signal: its exit code, and its processes and folders that were still there 20 s later."""

    code: int
    processes: list[ProcessId]
    folders: list[Path]


def stop_at(recipe: Path, reached: Callable[[], bool], number: int, *words: str) -> Stopped:
    """Start, and send signal `number` to the driver once `reached`."""
    with started(recipe, *words) as process:
        wait_until(reached, process, recipe.with_suffix(".log"))
        below = family(process)
        os.kill(process.pid, number)
        code = process.wait(60)
    deadline = time.monotonic() + GONE_S
    while time.monotonic() < deadline:
        left = Stopped(code, [p for p in below if processes.is_alive(p)], folders_of(process.pid))
        if not (left.processes or left.folders):
            break
        time.sleep(0.1)
    return left


def folders_of(pid: int) -> list[Path]:
    """Folders outside the run folder (sockets, published versions) that belong to a driver."""
    found = []
    for place in (Path("/dev/shm"), Path(tempfile.gettempdir())):
        for owner in place.glob(f"{PREFIX}*/owner.json") if place.is_dir() else ():
            if json.loads(owner.read_text())["pid"] == pid:
                found.append(owner.parent)
    return found


# ------------------------------------------------------------------------------------------------- what it left


def metrics(run_folder: Path, stage: str) -> list[dict[str, Any]]:
    path = run_folder / stage / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def timeless(run_folder: Path, stage: str) -> list[dict[str, Any]]:
    """Metrics without times, rates, and calls of rewards (groups that finish together share one): what a resumed run
    must repeat bit for bit."""
    return [{k: v for k, v in line.items() if not _timed(k)} for line in metrics(run_folder, stage)]


def _timed(name: str) -> bool:
    return (
        name == "time"
        or name.startswith("time/")
        or name.endswith(("seconds", "per_second", "/calls"))
        or "/latency_" in name
    )


def weights(run_folder: Path, stage: str) -> dict[str, str]:
    """SHA-256 of every weight file of a stage's artefact."""
    found = sorted(p for kind in ("adapter", "model") for p in (run_folder / stage / kind).glob("*.safetensors"))
    assert found, f"no weights in {run_folder / stage}"
    return {str(p.relative_to(run_folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in found}


def rollouts(run_folder: Path, stage: str, of: str = "") -> list[dict[str, Any]]:
    """Of an online stage, or of what an evaluate stage judged (`of`); without what a clock says of an episode."""
    import pyarrow.parquet

    files = sorted((run_folder / stage / "rollouts" / of).glob("*.parquet"))
    rows = [row for file in files for row in pyarrow.parquet.read_table(file).to_pylist()]
    return [{name: value for name, value in row.items() if name != "waited_seconds"} for row in rows]
