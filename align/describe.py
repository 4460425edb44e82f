"""`python -m align.describe package.module:function NAME`: what a function of ours says of a plugin, as a line of JSON.

It runs user code: make it a child (`align.plugins.asked_in_child`)."""

from __future__ import annotations

import json
import os
import sys
import threading

from align.errors import PluginError
from align.plugins import of_ours

_MAIN = threading.main_thread()


def main() -> None:
    """Print the answer, or {"error": {"what", "where", "remedy"}}."""
    answer_fd = os.dup(1)
    os.dup2(2, 1)  # what the plugin prints while it is imported goes to stderr, not into the answer
    try:
        answer: object = of_ours(sys.argv[1])(sys.argv[2])
        _refuse_threads(sys.argv[2])
    except PluginError as error:
        answer = {"error": {"what": error.what, "where": error.where, "remedy": error.remedy}}
    with os.fdopen(answer_fd, "w") as out:
        out.write(json.dumps(answer) + "\n")


def _refuse_threads(name: str) -> None:
    """A thread that is waited for at the end of a process would keep the check's, and a run's, for ever."""
    kept = [thread.name for thread in threading.enumerate() if not thread.daemon and thread is not _MAIN]
    if kept:
        raise PluginError(
            f"importing it started the thread {kept[0]!r}, for which every process that imports it would wait",
            where=name,
            remedy="start it on first use, or with `daemon=True`",
        )


if __name__ == "__main__":
    main()
    os._exit(0)  # whatever the plugin left running
