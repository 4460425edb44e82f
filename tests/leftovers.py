"""What a test run must not leave behind: processes, shared memory, temporary folders.

`python -m tests.leftovers start FILE` notes what is there before the tests; `python -m tests.leftovers check FILE`
afterwards names what came since and is ours, and exits 1 if there is any.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path

import psutil

MARK = "ALIGN_TEST_RUN"
"""Environment variable of the test run; processes inherit it."""
TITLES = ("ray::", "VLLM::", "raylet", "gcs_server")
"""Processes that set their own title, which overwrites the environment that others can read."""
CACHES = ("pytest-of-", "torchinductor_")
"""Folders that pytest and torch keep for the next run, one per user."""
GRACE_S = 15.0


def processes(mark: str | None = None) -> dict[int, str]:
    """Processes other than this one and its ancestors with the run's mark or one of the titles: pid -> command."""
    own = {os.getpid(), *(parent.pid for parent in psutil.Process().parents())}
    found = {}
    for process in psutil.process_iter():
        try:
            if process.pid in own or process.status() == psutil.STATUS_ZOMBIE:
                continue
            command = " ".join(process.cmdline()) or process.name()
            marked = mark is not None and process.environ().get(MARK) == mark
        except psutil.Error:  # ended meanwhile, or another user's
            continue
        program = Path(command.split(" ")[0]).name
        if marked or program.startswith(TITLES):
            found[process.pid] = command[:200]
    return found


def files() -> set[str]:
    """Entries of shared memory and of the folders in which Ray, vLLM, torch and we make temporary folders."""
    folders = {Path("/dev/shm"), Path("/tmp"), Path("/tmp/ray"), Path(tempfile.gettempdir())}
    return {
        str(entry)
        for folder in folders
        if folder.is_dir()
        for entry in folder.iterdir()
        if not entry.name.startswith(CACHES)
    }


def main(action: str, note: Path) -> int:
    if action == "start":
        note.write_text(json.dumps({"processes": sorted(processes()), "files": sorted(files())}))
        return 0
    before = json.loads(note.read_text())
    deadline = time.monotonic() + GRACE_S
    while True:
        late = {p: c for p, c in processes(os.environ.get(MARK)).items() if p not in before["processes"]}
        left = files() - set(before["files"]) - {str(note)}
        if not (late or left) or time.monotonic() > deadline:
            break
        time.sleep(0.5)
    for pid, command in sorted(late.items()):
        print(f"left behind: process {pid}: {command}", file=sys.stderr)
    for entry in sorted(left):
        print(f"left behind: {entry}", file=sys.stderr)
    return 1 if late or left else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2])))
