"""The proof that others can load a model folder: each loader does, in a child process with a time limit.

Log-probabilities of the same random tokens are compared. An engine that is not installed is reported as not checked;
one that is and cannot load the folder fails the export.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

import align
from align.errors import ExportError
from align.export.compare import BOUNDS, random_tokens
from align.export.images import has_processor
from align.export.load_probe import plain_logps
from align.model.score_head import scoring


@dataclass(frozen=True)
class LoadCheck:
    """status: "proved", or "not checked" where the loader is not installed (message says why, and what of a proof was
    left out).

    mean_difference, max_difference: of log-probabilities of the same tokens in nats: for plain transformers against
    the source folder, for an engine against plain transformers on the exported folder; both in float32 where the
    engine computes in it. bound: on the mean; in float32 the largest has one of its own.
    """

    loader: str
    status: Literal["proved", "not checked"]
    seconds: float
    mean_difference: float | None = None
    max_difference: float | None = None
    bound: float | None = None
    message: str = ""


def make_request(exported: Path, dtype: torch.dtype, seed: int, trust_remote_code: bool) -> dict[str, Any]:
    """What `align.export.load_probe` is asked."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(exported, trust_remote_code=trust_remote_code, local_files_only=True)
    return {
        "tokens": [ids.tolist() for ids in random_tokens(config, seed)],
        "dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "trust_remote_code": trust_remote_code,
        "image_seed": seed if has_processor(exported) else None,
    }


def prove_loading(
    source: Path,
    exported: Path,
    dtype: torch.dtype,
    request: dict[str, Any],
    time_limit_s: float,
    engines: tuple[str, ...],
) -> tuple[LoadCheck, ...]:
    """Load the exported folder in every loader, each in a child, and compare. Raises ExportError."""
    tokens = [np.array(ids, dtype=np.int64) for ids in request["tokens"]]
    reference = plain_logps(source, tokens, request["trust_remote_code"], image_seed=request["image_seed"])
    answer, seconds = run_child("plain", exported, request, time_limit_s)
    plain, noise = _logps("transformers", exported, answer), answer.get("noise")
    checks = [compare("transformers", plain, reference, dtype, seconds)]
    for engine in engines:
        if scoring(exported):
            checks.append(LoadCheck(engine, "not checked", 0.0, message="it generates, and this model scores"))
            continue
        answer, seconds = run_child(engine, exported, request, time_limit_s)
        if answer["status"] == "unavailable":
            checks.append(LoadCheck(engine, "not checked", seconds, message=answer["message"]))
            continue
        found = _logps(engine, exported, answer)
        proved = compare(engine, found, plain[: len(found)], dtype, seconds, noise)
        checks.append(replace(proved, message=answer["message"]))
    return tuple(checks)


TIMES_NOISE, LEAST_BOUND = 3.0, 2e-2
FLOAT32_LARGEST = 5e-3
"""Beside the bound on the mean. SmolLM2-135M-Instruct, trained, in vLLM: 1e-5 to 1.5e-5 on the mean; at one random
token in three thousand, which its context makes ill-conditioned, 1.6e-3, where transformers in float32 is 3.5e-4 from
float64."""


def compare(
    loader: str,
    found: list[np.ndarray],
    wanted: list[np.ndarray],
    dtype: torch.dtype,
    seconds: float,
    noise: float | None = None,
) -> LoadCheck:
    """Compare f32[n - 1] log-probabilities. noise: what computing in the dtype costs this model, of an engine that
    does; the bound is then three times that. Raises ExportError beyond it, or beyond the dtype's own (of float32 two,
    on the mean and on the largest).

    On SmolLM2-135M-Instruct in bfloat16 that noise is 0.063 nats on random tokens and 0.025 on text; the cast of its
    weights alone, computed in float32, 0.015 and 0.006. A fixed bound of 0.1 refuses a model not much noisier.
    """
    difference = np.abs(np.concatenate(found) - np.concatenate(wanted))
    exact, mean, largest = dtype == torch.float32, float(difference.mean()), float(difference.max())
    bound = BOUNDS[dtype].logp if exact or noise is None else max(TIMES_NOISE * noise, LEAST_BOUND)
    problem = ""
    if not mean <= bound:
        problem = f"mean difference {mean:.2e} nats (at most {bound:.0e})"
    elif exact and not largest <= FLOAT32_LARGEST:
        problem = f"largest difference {largest:.2e} nats (at most {FLOAT32_LARGEST:.0e})"
    if problem:
        raise ExportError(
            f"{loader} loads the exported folder but computes other log-probabilities: {problem}",
            remedy="nothing was written; report this model",
        )
    return LoadCheck(loader, "proved", seconds, mean, largest, bound)


def _logps(loader: str, folder: Path, answer: dict[str, Any]) -> list[np.ndarray]:
    if answer["status"] != "loaded":
        raise ExportError(f"{loader} cannot load the folder: {answer['message']}", where=folder)
    return [np.array(row, dtype=np.float32) for row in answer["logps"]]


def run_child(loader: str, folder: Path, request: dict[str, Any], time_limit_s: float) -> tuple[dict[str, Any], float]:
    """Answer of `align.export.load_probe` and the seconds it took. Raises ExportError where the child dies or hangs."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="align-probe-") as scratch:
        tokens, out, output = (Path(scratch, name) for name in ("request.json", "answer.json", "output.txt"))
        tokens.write_text(json.dumps(request), encoding="utf-8")
        command = [
            sys.executable,
            "-m",
            "align.export.load_probe",
            loader,
            str(folder.resolve()),
            str(tokens),
            str(out),
        ]
        with output.open("w", encoding="utf-8") as stream:
            code = _run(command, stream, time_limit_s)
        tail = output.read_text(encoding="utf-8", errors="replace")[-2000:].strip()
        if code is None:
            raise ExportError(
                f"{loader} did not load the folder within {time_limit_s:g} s; its last words: {tail[-500:]}",
                where=folder,
            )
        if code != 0 or not out.is_file():
            raise ExportError(f"{loader} died (exit code {code}) while it loaded the folder: {tail}", where=folder)
        answer: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    return answer, round(time.perf_counter() - started, 3)


def _run(command: list[str], stream: Any, time_limit_s: float) -> int | None:
    """Exit code, or None where the time was up. The child leads its own group, so that its children end with it.

    It runs where our packages lie: `-m` looks in the working directory first, where a user's file may have our name.
    """
    home = Path(align.__file__).parents[1]
    child = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True, cwd=home)
    try:
        return child.wait(time_limit_s)
    except subprocess.TimeoutExpired:
        return None
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
