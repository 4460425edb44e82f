"""The flags of `align classify`. Nothing but argparse: every call reads this."""

from __future__ import annotations

import argparse
from typing import Any


def add_verb(verbs: Any, common: argparse.ArgumentParser) -> None:
    parser = verbs.add_parser("classify", parents=[common], help="what a classifier or reward model says of a file")
    parser.add_argument("model", metavar="MODEL", help="a classifier or reward model, or its adapter: folder or hub id")
    parser.add_argument("data", metavar="DATA", help="as a recipe's `data.path`: a file, a folder, file.py:function")
    parser.add_argument("--out", required=True, metavar="FILE", help="new .jsonl: a line for each row, in order")
    parser.add_argument("--base", metavar="MODEL", help="of an adapter, where its folder names another place")
    parser.add_argument("--columns", default="", metavar="text=review,label=stars", help="our columns to the data's")
    parser.add_argument("--format", metavar="NAME", help="the data's layout, where several fit")
    parser.add_argument("--limit", type=int, metavar="N", help="read so many rows")
    parser.add_argument("--max-length", type=int, metavar="N", help="in tokens (default: the model's positions)")
    parser.add_argument(
        "--truncate", default="error", choices=("error", "right", "left"), help="what becomes of longer rows"
    )
    parser.add_argument("--on-bad-row", default="error", choices=("error", "skip"), help="rows that cannot be used")
    parser.add_argument("--max-tokens", type=int, metavar="N", help="computed at once; changes no result")
    parser.add_argument("--chat-template", metavar="NAME", help="as `model.chat_template` of the stage that trained it")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--trust-remote-code", action="store_true", help="run model code from the folder")
    parser.set_defaults(verb=_classify)


def _classify(arguments: argparse.Namespace) -> int:
    from align.cli import classify

    return classify.main(arguments)
