"""The flags of `align simulate`. Nothing but argparse: every call of the command reads this."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

NUMBERS = {
    "length-mean": "tokens of a completion (log-normal)",
    "length-sigma": "standard deviation of the logarithm of the length; 0: all alike",
    "engine-speed": "tokens/s of one sequence that has an engine to itself",
    "engine-peak": "tokens/s of an engine with all slots filled",
    "prompt-s": "seconds an engine takes for a prompt, once for its group",
    "reward-s": "seconds from a scoring call to its answer",
    "train-s": "seconds of training a step",
    "publish-s": "seconds until every engine holds a version",
    "loop-s": "seconds of the loop itself a step",
    "silent": "share of groups without signal, for dynamic_sampling",
    "failure-s": "mean seconds until an engine fails (default: none does)",
    "restart-s": "seconds until a failed engine serves again",
}
_ABOVE_0 = {"length-mean", "engine-speed", "engine-peak", "failure-s"}


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--stage", metavar="ID", help="an online stage; where there is one alone, that")
    parser.add_argument("--from", dest="run", metavar="RUN", help="a finished run's folder: take its measurements")
    parser.add_argument("--staleness", type=_stalenesses, default=[0, 1, 2], metavar="0,1,2", help="those to try")
    parser.add_argument("--steps", type=_whole, metavar="N", help="to count, after the first few (default: 40)")
    engines = parser.add_mutually_exclusive_group()
    engines.add_argument("--engines", type=_whole, metavar="N", help="default: the recipe's rollout.workers")
    engines.add_argument("--devices", type=_whole, metavar="N", help="try ways to divide so many among both sides")
    parser.add_argument("--engine-slots", type=_whole, metavar="N", help="sequences that an engine samples at once")
    for name, meaning in NUMBERS.items():
        parser.add_argument(f"--{name}", type=_number(name), metavar="X", help=meaning)
    parser.add_argument("--json", action="store_true", help="print JSON for programs")


def _number(name: str) -> Callable[[str], float]:
    above, most = name in _ABOVE_0, 1.0 if name == "silent" else math.inf
    wanted = "a number above 0" if above else "a number from 0 to 1" if most == 1 else "a number of at least 0"

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (value > 0 if above else value >= 0) or not math.isfinite(value) or value > most:
            raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")
        return value

    return read


def _whole(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def _stalenesses(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers such as 0,1,2")
    return sorted({int(part) for part in parts})
