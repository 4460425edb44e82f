"""`python -m align.losses.describe NAME`: does a loss load? One line of JSON. It runs user code: make it a child."""

from __future__ import annotations

import json
import os
import sys

from align.errors import PluginError
from align.losses import load


def main() -> None:
    """Print {"name", "options"}, or {"error": {"what", "where", "remedy"}}."""
    answer_fd = os.dup(1)
    os.dup2(2, 1)  # what the module prints while it is imported goes to stderr, not into the answer
    try:
        answer: object = {"name": sys.argv[1], "options": list(load(sys.argv[1]).Config.model_fields)}
    except PluginError as error:
        answer = {"error": {"what": error.what, "where": error.where, "remedy": error.remedy}}
    with os.fdopen(answer_fd, "w") as out:
        out.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
