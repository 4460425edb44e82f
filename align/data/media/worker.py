"""The child process that decodes: it reads jobs from stdin, runs the model's processor, and answers on stdout.

A job is a line of JSON, {folder, trust_remote_code} first and then {kind, key, store, limits, is_list, blobs}, followed
by the bytes of those blobs that have a `size` (the others are files, read here and compared with their hash). The
answer is a line: {"facts": ...}, {"refused": reason}, or {"broken": [what, where, remedy]} where no job can be done.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import signal
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any


def main() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: elsewhere the closed stdin ends it
    # What libraries print goes to stderr; only answers go where the parent reads.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    jobs = sys.stdin.buffer
    processor = _opened(json.loads(jobs.readline()), answers)
    while processor is not None and (line := jobs.readline()):
        job = json.loads(line)
        given = [jobs.read(blob["size"]) if "size" in blob else None for blob in job["blobs"]]
        _say(answers, answer(processor, job, given))


def _say(answers: Any, value: dict[str, Any]) -> None:
    answers.write(json.dumps(value) + "\n")
    answers.flush()


def _opened(asked: dict[str, Any], answers: Any) -> Any:
    from align.data.media.process import Processor
    from align.errors import ModelError

    try:
        processor = Processor(Path(asked["folder"]), asked["trust_remote_code"])
    except ModelError as error:
        _say(answers, {"broken": [error.what, error.where, error.remedy]})
        return None
    _say(answers, processor.describe())
    return processor


def answer(processor: Any, job: dict[str, Any], given: list[bytes | None]) -> dict[str, Any]:
    """The answer of a `Processor` to a job; given: per blob its bytes, None where it is a file to be read."""
    from align.data.media.process import Limits
    from align.data.records import RowError

    store, key, limits = Path(job["store"]), job["key"], Limits(**job["limits"])
    try:
        blobs = [_bytes(blob, data) for blob, data in zip(job["blobs"], given, strict=True)]
        if job["kind"] == "image":
            facts = processor.image(*blobs[0], limits, store, key)
        else:
            facts = processor.video(job["name"], blobs if job["is_list"] else blobs[0][1], limits, store, key)
    except RowError as error:
        return {"refused": str(error)}
    except MemoryError:
        return {"refused": f"{job['name']} does not fit into memory when it is decoded"}
    return {"facts": asdict(facts)}


def _bytes(blob: dict[str, Any], data: bytes | None) -> tuple[str, bytes]:
    from align.data.records import RowError

    if data is not None:
        return blob["name"], data
    try:
        data = Path(blob["path"]).read_bytes()
    except OSError as e:
        raise RowError(f"{blob['name']} cannot be read: {e.strerror}") from e
    if hashlib.sha256(data).hexdigest() != blob["sha256"]:
        raise RowError(f"{blob['name']} changed while it was read")
    return blob["name"], data
