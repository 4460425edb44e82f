"""Our three packages under their own names, whatever lies in the working directory; and large libraries in less time.

`rewards.py` is the most natural name for a user's file. Ray puts the working directory first in its workers, and so
does `python -m`: whoever imports ours first, and checks, is safe from then on.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PACKAGES = ("align", "rewards", "rollout")


def bind() -> None:
    """Import our packages before a folder of the user's is searched for their names. Raises ImportError where another
    file has taken one of the names already."""
    ours = str(Path(__file__).resolve().parents[1])
    sys.path.insert(0, ours)
    try:
        for name in PACKAGES:
            module = importlib.import_module(name)
            found = Path(str(module.__file__)).resolve()
            if found != Path(ours, name, "__init__.py"):
                raise ImportError(f"the name {name!r} is taken by {found}; rename or move that file")
    finally:
        sys.path.remove(ours)


@contextmanager
def quick_imports() -> Iterator[None]:
    """Import torch, transformers or vLLM in three quarters of the time: without the garbage collector, which would walk
    the growing million of their objects again and again, and find nothing. What is there at the end is not looked at by
    any later collection either, so that those are quick as well."""
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
        gc.freeze()
        atexit.unregister(gc.unfreeze)
        atexit.register(gc.unfreeze)  # libraries that count their objects at the end find them collected, as always
    finally:
        gc.enable()
