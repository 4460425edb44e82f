"""The child process of a data generator: reads a job from stdin, writes rows to stdout as JSON lines, exits.

A row that JSON cannot hold is one row's problem: its line begins with `REFUSED` and says why, and the others go on.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
import signal
import sys
from itertools import islice
from pathlib import Path
from typing import Any

REFUSED = b"!"  # begins no JSON object


def main() -> None:
    """Run one job {file, function, options, limit}. Any failure is an exit status and a last line on stderr."""
    _die_with_parent()
    # What the user prints goes to stderr; only rows go where the parent reads.
    rows_to, sys.stdout = os.fdopen(os.dup(1), "wb"), sys.stderr
    os.dup2(2, 1)
    job = json.load(sys.stdin)
    file = Path(job["file"])
    sys.path.append(str(file.parent))  # appended, so that siblings import but cannot hide our modules
    spec = importlib.util.spec_from_file_location(f"align_generator_{file.stem}", file)
    if spec is None or spec.loader is None:
        raise ImportError(f"{file} cannot be imported")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    function = getattr(module, job["function"], None)
    if not callable(function):
        names = ", ".join(sorted(n for n, v in vars(module).items() if callable(v) and not n.startswith("_")))
        raise AttributeError(f"{file.name} has no function {job['function']!r} (it has: {names})")
    count = 0
    with rows_to as out:
        for row in islice(function(**job["options"]), job["limit"]):
            if not isinstance(row, dict):
                raise TypeError(f"row {count} is a {type(row).__name__}; a generator yields dicts")
            out.write(_line(row) + b"\n")
            count += 1
        out.write(f"{count}\n".encode())  # the last line says that this is the end


def _line(row: dict[Any, Any]) -> bytes:
    try:
        return json.dumps(row, allow_nan=False).encode()  # ASCII: half a character is for the reader to name
    except (TypeError, ValueError, RecursionError) as e:
        return REFUSED + json.dumps(f"the row is no JSON: {e}").encode()


def _die_with_parent() -> None:
    """Linux only: elsewhere the time limit is what ends an orphan."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
