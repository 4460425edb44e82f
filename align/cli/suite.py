"""`align check --model FOLDER --suite`: what this engine can do with a model folder, tried on it."""

from __future__ import annotations

import argparse

from align.check.scratch import scratch
from align.hub import resolve_model_folder

MARKS = {"passed": "ok", "failed": "FAILED", "not checked": "-"}


def main(arguments: argparse.Namespace) -> int:
    """Print a line for each check; 0 where none failed, 1 else. Raises ModelError where the folder is none."""
    folder = resolve_model_folder(arguments.model)
    from align.export.suite import run_suite  # torch: only once the folder is there
    from align.report.quiet import quiet

    quiet()
    failed = 0
    print(f"{folder}\n")
    with scratch() as work:
        checks = run_suite(folder, work, trust_remote_code=arguments.trust_remote_code)
        for check in checks:
            first, *more = check.detail.splitlines() or [""]
            print(f"{MARKS[check.status]:<7} {check.name:<44} {check.seconds:>6.1f} s  {first}", flush=True)
            for line in more:
                print(f"{'':<63}{line}", flush=True)
            failed += check.status == "failed"
    print(f"\n{failed} of the checks failed" if failed else "\nall right")
    return 1 if failed else 0
