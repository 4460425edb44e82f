"""What `align rewards` takes; apart from the verb itself, so that the parser imports nothing else of it."""

from __future__ import annotations

import argparse


def add_verbs(parser: argparse.ArgumentParser, common: argparse.ArgumentParser) -> None:
    """The verbs `list` and `try`; `arguments.action` says which."""
    verbs = parser.add_subparsers(title="verbs", required=True, metavar="VERB", dest="action")
    verbs.add_parser(
        "list", parents=[common], help="ours and those of installed packages, with what they give and take"
    )
    one = verbs.add_parser("try", parents=[common], help="score completions that are in a file; prove its gold answers")
    one.add_argument("name", help="one of ours, an entry point, file.py:function or package.module:function")
    one.add_argument("--data", required=True, metavar="FILE", help="data file or folder, or a run's rollouts")
    one.add_argument("--completion", required=True, metavar="COLUMN", help="column with the text to score, or a list")
    one.add_argument(
        "--args", nargs="+", default=[], metavar="key=value", help="the plugin's arguments; values are YAML"
    )
    one.add_argument(
        "--columns", nargs="+", default=[], metavar="ours=theirs", help="as in a recipe, such as prompt=question"
    )
    one.add_argument("--limit", type=int, default=100, metavar="ROWS", help="rows to read (default 100)")
    one.add_argument("--show", type=int, default=5, metavar="N", help="samples to print with their texts (default 5)")
    one.add_argument("--signature", choices=("align", "trl", "swift"), default="align")
    one.add_argument("--scope", choices=("sample", "batch", "group"), help="as in a recipe: what a call may hold")
    one.add_argument(
        "--text",
        choices=("stripped", "raw"),
        help="as in a recipe: of a run's rollouts, with special tokens or without",
    )
