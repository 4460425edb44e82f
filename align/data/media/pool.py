"""Child processes that decode and process media: as many as there is work for, up to a number; each dies with us."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import LifoQueue
from typing import Any

import align
from align.data.media.sources import Located
from align.data.records import RowError
from align.errors import ModelError, SetupError

_ENDS_S = 5.0  # for a process that has closed its output to be gone
STARTUP_S = 300.0
"""For a child to import transformers and load the processor: generous, on a machine that many start on at once."""


class Pool:
    """Up to `workers` children with the processor of `folder`. Started when needed; close it."""

    def __init__(self, folder: Path, workers: int, timeout_s: float, trust_remote_code: bool = False):
        start = {"folder": str(folder), "trust_remote_code": trust_remote_code}
        self._children = [_Child(start, timeout_s) for _ in range(workers)]
        # A child is killed when the thread that started it ends (its parent-death signal), so these threads stay.
        self._threads = ThreadPoolExecutor(max_workers=workers, thread_name_prefix="align-media")
        # last in, first out: where one child keeps up with the work, no second one is started
        self._idle: LifoQueue[_Child] = LifoQueue()
        for child in self._children:
            self._idle.put(child)

    def describe(self) -> dict[str, Any]:
        """`Processor.describe`. Raises ModelError."""
        return self._threads.submit(self._with_child, lambda child: child.described()).result()

    def process(
        self, jobs: Sequence[tuple[str, Located]], store: Path, limits: dict[str, Any]
    ) -> list[dict[str, Any] | RowError]:
        """Facts of each medium under its key, or why there are none, in order. Raises ModelError."""
        return list(self._threads.map(lambda job: self._one(job[0], job[1], store, limits), jobs))

    def _one(self, key: str, medium: Located, store: Path, limits: dict[str, Any]) -> dict[str, Any] | RowError:
        blobs = [
            {"name": b.name, "path": str(b.path), "sha256": b.sha256}
            if b.data is None
            else {"name": b.name, "size": len(b.data)}
            for b in medium.blobs
        ]
        job = {
            "kind": medium.kind, "key": key, "name": medium.name, "store": str(store), "limits": limits,
            "is_list": medium.is_list, "blobs": blobs,
        }  # fmt: skip
        payload = [b.data for b in medium.blobs if b.data is not None]
        answer = self.ask(job, payload)
        facts = answer.get("facts")
        if "refused" in answer or not isinstance(facts, dict):
            return RowError(str(answer.get("refused", f"{medium.name}: its process answered something else")))
        return facts

    def ask(self, job: dict[str, Any], payload: Sequence[bytes]) -> dict[str, Any]:
        """The answer of a child (see worker.py) to one job; `payload`: the blobs that it does not read itself."""
        return self._with_child(lambda child: child.ask(job, payload))

    def _with_child(self, work: Callable[[_Child], dict[str, Any]]) -> dict[str, Any]:
        child = self._idle.get()
        try:
            return work(child)
        finally:
            self._idle.put(child)

    def close(self) -> None:
        self._threads.shutdown(cancel_futures=True)
        for child in self._children:
            child.close()


def _read(line: bytes) -> dict[str, Any] | None:
    """A child's answer; None where the line is none, as where the model's own code wrote it."""
    try:
        answer = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return answer if isinstance(answer, dict) else None


class _Child:
    """One worker process; started when it is first asked, and again after it died."""

    def __init__(self, start: dict[str, Any], timeout_s: float):
        self.start, self.timeout_s = start, timeout_s
        self._process: subprocess.Popen[bytes] | None = None
        self._described: dict[str, Any] = {}

    def described(self) -> dict[str, Any]:
        self._running()
        return self._described

    def ask(self, job: dict[str, Any], payload: Sequence[bytes]) -> dict[str, Any]:
        process = self._running()
        answer, why = self._exchange(process, [json.dumps(job).encode() + b"\n", *payload], self.timeout_s)
        if answer is not None:
            return answer
        self.close()
        return {"refused": f"{job['name']}: {why}"}

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._process.poll() is None:
            return self._process
        # Our own root replaces the working directory at the head of sys.path: a user's json.py there is not imported.
        root = str(Path(align.__file__).parent.parent)
        code = f"import sys; sys.path[0] = {root!r}; from align.data.media.worker import main; main()"
        env = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "CUDA_VISIBLE_DEVICES": "",
            "OPENCV_LOG_LEVEL": "OFF",
        }
        process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=env,
        )
        self._process = process
        answer, why = self._exchange(process, [json.dumps(self.start).encode() + b"\n"], STARTUP_S)
        if answer is None or "broken" in answer:
            self.close()
            what, where, remedy = (answer or {}).get("broken", (None, None, None))
            if what is None:
                raise SetupError(f"the process that decodes media did not start: {why}", remedy="see `align doctor`")
            raise ModelError(what, where=where, remedy=remedy)
        self._described = answer
        return process

    def _exchange(
        self, process: subprocess.Popen[bytes], parts: Sequence[bytes], limit: float
    ) -> tuple[dict[str, Any] | None, str]:
        """(answer, ""), or (None, why there is none): the child took too long, or ended."""
        assert process.stdin is not None and process.stdout is not None
        late = threading.Event()

        def end() -> None:
            late.set()
            process.kill()

        timer = threading.Timer(limit, end)
        timer.start()
        try:
            for part in parts:
                process.stdin.write(part)
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = b""
        finally:
            timer.cancel()
        if line.endswith(b"\n"):
            answer = _read(line)
            return (answer, "") if answer is not None else (None, "what its process answered cannot be read")
        try:
            status = process.wait(_ENDS_S)
        except subprocess.TimeoutExpired:  # it has closed its output, and lives on
            process.kill()
            return None, "the process that decoded it stopped answering"
        if late.is_set():
            return None, f"it was not processed within {limit:g} s (`media.timeout_s`)"
        how = f"signal {-status}" if status < 0 else f"status {status}"
        return None, f"the process that decoded it ended with {how} (out of memory, or a damaged file)"

    def close(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        for stream in (process.stdin, process.stdout):
            try:
                if stream is not None:
                    stream.close()
            except BrokenPipeError:
                continue
        process.kill()
        process.wait()
