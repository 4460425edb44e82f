"""Arguments that several verbs take. Nothing but argparse."""

from __future__ import annotations

import argparse
from collections.abc import Callable


def add_debug(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error"
    )


def add_recipe(parser: argparse.ArgumentParser, *, optional: bool = False) -> None:
    parser.add_argument("recipe", nargs="?" if optional else None, help="a YAML file")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="such as stages.grpo.rollout.workers=2, seed=3, name=second"
    )


def add_stage(parser: argparse.ArgumentParser, kind: str) -> None:
    parser.add_argument("--stage", metavar="ID", help=f"stage of kind {kind}; where there is one alone, that")


def add_parallel(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--parallel",
        type=whole(1),
        default=1,
        metavar="N",
        help="runs at once, each on 1/N of the machine (default: 1)",
    )


def whole(least: int) -> Callable[[str], int]:
    """The type of an argument that is a whole number of at least `least`."""

    def read(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r}: give a whole number, {least} or more")
        return int(text)

    return read
