"""`python -m rewards.describe SPEC`: what a plugin offers, as one line of JSON. It runs user code: make it a child.

    python -m rewards.describe my.py:judge --folder RECIPE_FOLDER --args '{"model": "x"}' --signature trl

Keys: name, doc, objectives {name: {kind, range}}, scope, options, parameters {name: {required, type, default}},
open_args, args, is_async, gold, version, source, sha256, modules. A plugin that is not found or whose arguments do not
fit ends with status 2 and {"error": {"what", "where", "remedy"}}.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from typing import Any

from rewards.api import PluginError
from rewards.find import load
from rewards.plugin import PluginSpec


def describe(spec: PluginSpec, folder: str, *, check: bool = True) -> dict[str, Any]:
    """`Plugin.describe` of a plugin; PluginError where it cannot be loaded. Runs user code in this process.

    check: False where its arguments are not known yet.
    """
    return load(spec, folder, check=check).describe()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m rewards.describe")
    parser.add_argument("use")
    parser.add_argument("--folder", default=".")
    parser.add_argument("--as", dest="name")
    parser.add_argument("--args", type=json.loads, default={})
    parser.add_argument("--options", type=json.loads, default={})
    parser.add_argument("--signature", choices=("align", "trl", "swift"), default="align")
    parser.add_argument("--unchecked", action="store_true", help="whatever arguments it needs")
    given = parser.parse_args(argv)
    spec = PluginSpec(given.use, given.name, given.args, given.options, given.signature)
    answer_fd = os.dup(1)
    os.dup2(2, 1)  # what the plugin prints while it is imported goes to stderr, not into the answer
    try:
        answer: dict[str, Any] = describe(spec, given.folder, check=not given.unchecked)
        status = 0
    except PluginError as error:
        answer = {"error": {"what": error.what, "where": error.where, "remedy": error.remedy}}
        status = 2
    sys.stdout.flush()
    with os.fdopen(answer_fd, "w") as out:
        out.write(json.dumps(answer, default=repr) + "\n")
    return status


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    os._exit(status)  # threads that the plugin started must not keep the process; they do not keep the one it runs in
