"""Arguments that several verbs take. Nothing but argparse and errors."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from align.errors import UserError


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


def columns_of(said: str, such_as: str) -> dict[str, str]:
    """Our columns to the data's, of `--columns ours=theirs,ours=theirs`. Raises UserError."""
    pairs = [pair.partition("=") for pair in said.split(",") if pair]
    if any(not (ours and theirs) for ours, _, theirs in pairs):
        raise UserError(f"{said!r} names no columns", where="--columns", remedy=f"write {such_as}")
    return {ours.strip(): theirs.strip() for ours, _, theirs in pairs}


def whole(least: int) -> Callable[[str], int]:
    """The type of an argument that is a whole number of at least `least`."""

    def read(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r}: give a whole number, {least} or more")
        return int(text)

    return read
