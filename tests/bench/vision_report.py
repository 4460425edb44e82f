"""Flags and figures that the benches of images share."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from typing import Any

from tests.bench import common, peer

GOAL, PADDED_GOAL = 2.0, 3.0


def parser(description: str | None) -> argparse.ArgumentParser:
    """The flags that the benches of images share."""
    found = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    found.add_argument("--tower", choices=("frozen", "trained"), default="frozen")
    found.add_argument("--repeats", type=int, default=3)
    found.add_argument("--threads", type=int)
    found.add_argument("--toy", action="store_true", help="a tiny model and small pictures")
    found.add_argument("--record", action="store_true", help="write the result down")
    return found


def report(
    name: str,
    arguments: argparse.Namespace,
    rounds: Any,
    *,
    settings: Mapping[str, str],
    budget: int,
    work_of: Callable[[str], float],
    amounts: Mapping[str, float],
    about: Mapping[str, Any],
    tried: dict[str, float],
    started: float,
) -> dict[str, Any]:
    """`common.report` of a bench: settings by side (ours: `budget` tokens), operations by side, and what an update
    trains on in units."""
    sides = [
        common.Side(side, settings.get(side, f"max_tokens {budget}"), seconds, work_of(side), dict(amounts))
        for side, seconds in rounds.seconds.items()
    ]
    return common.report(
        f"{name}-{arguments.tower}-{arguments.dtype}",
        sides,
        rounds,
        goal=GOAL,
        other_goals={"padded": PADDED_GOAL},
        about={**about, "tower": arguments.tower, "dtype": arguments.dtype, "note": peer.HEAD_NOTE},
        tried=tried,
        started=started,
        record=arguments.record,
    )
