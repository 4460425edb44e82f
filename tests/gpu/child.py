"""The process of one step: `python -m tests.gpu.child module:function FILE`, its context as JSON in the file."""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

from tests.gpu.runner import Context


class Watched(Context):
    """Remembers the checks that were written last."""

    checks: dict[str, bool]

    def write(self, figures: Any) -> None:
        super().write(figures)
        object.__setattr__(self, "checks", dict(figures.get("checks", {})))


def main() -> int:
    module, _, name = sys.argv[1].partition(":")
    told = json.loads(Path(sys.argv[2]).read_text(encoding="utf-8"))
    context = Watched(**{**told, "found": Path(told["found"]), "work": Path(told["work"])})
    getattr(importlib.import_module(module), name)(context)
    checks = getattr(context, "checks", {})
    for words, held in checks.items():
        print(f"  {'ok' if held else 'FAILED'}: {words}")
    return 0 if checks and all(checks.values()) else 1


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    os._exit(status)  # without waiting for threads of libraries
