"""Where a run's time went: start-up, generation, scoring, training, publishing, evaluation, the rest; per stage.

    python tests/bench/phase_times.py runs/demo                             of a run that has been made
    python tests/bench/phase_times.py recipes/demo.yaml [key=value ...]     runs the recipe first, in a temporary folder

start-up is what passes before a stage's first step: reading data, actors, models, engines. `other` is the remainder:
checkpoints, artefacts, shutting down. Of a run that was resumed, each stage counts from the start that finished it.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

PHASES = ("generate", "score", "train", "publish", "eval")
COLUMNS = ("total", "start-up", *PHASES, "other")


def stage_times(entry: dict[str, Any], metrics: list[dict[str, Any]]) -> dict[str, float]:
    """Seconds by phase of one finished stage.

    Args:
        entry: its entry in run.json, with `begun` and `ended` in seconds since 1970.
        metrics: its lines of metrics.jsonl; empty for a stage without training steps.
    """
    total = entry["ended"] - entry["begun"]
    lines = [line for line in metrics if line["time"] >= entry["begun"]]
    times = {phase: sum(line.get(f"time/{phase}") or 0.0 for line in lines) for phase in PHASES}
    stepped = [line for line in lines if "time/step" in line]
    startup = 0.0
    if stepped:
        first = lines[0]
        took = first.get("time/step", 0.0) + first.get("time/eval", 0.0)
        startup = max(0.0, first["time"] - took - entry["begun"])
    other = total - startup - sum(times.values())
    return {"total": total, "start-up": startup, **times, "other": other}


def run_times(folder: Path) -> dict[str, dict[str, float]]:
    """Seconds by phase of every finished stage, the driver's and Ray's own start as `(start)`, and their sum."""
    run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    rows: dict[str, dict[str, float]] = {}
    finished = {name: entry for name, entry in run["stages"].items() if entry["state"] == "finished"}
    if not finished:
        raise SystemExit(f"error: {folder}: no stage of this run is finished")
    first = min(entry["begun"] for entry in finished.values())
    if first >= run["started"]:  # else an earlier start made it, and when that began is not kept
        before = first - run["started"]
        rows["(start)"] = {column: before if column in ("total", "start-up") else 0.0 for column in COLUMNS}
    for name, entry in finished.items():
        path = folder / name / "metrics.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        rows[name] = stage_times(entry, [json.loads(line) for line in lines])
    rows["sum"] = {column: sum(row[column] for row in rows.values()) for column in COLUMNS}
    return rows


def show(rows: dict[str, dict[str, float]]) -> str:
    width = max(len(name) for name in rows)
    lines = [" " * width + "".join(f"{column:>10}" for column in COLUMNS) + "   seconds"]
    lines += [f"{name:<{width}}" + "".join(f"{row[column]:>10.1f}" for column in COLUMNS) for name, row in rows.items()]
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    if not arguments:
        print(__doc__)
        return 2
    target = Path(arguments[0])
    if target.is_dir():
        print(show(run_times(target)))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        command = ["run", str(target), *arguments[1:], f"output={folder}", "name=timed"]
        done = subprocess.run([sys.executable, "-m", "align.cli.main", *command], check=False)
        if done.returncode == 0:
            print(show(run_times(Path(folder) / "timed")))
        return done.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
