"""The flags of `align sweep`, `pareto`, `soup` and `rescore`. Nothing but argparse: every call reads this."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import Any


def add_verbs(verbs: Any, common: argparse.ArgumentParser, recipe_arguments: Callable[..., None]) -> None:
    """Add the four parsers to `verbs`. recipe_arguments: adds RECIPE and overrides to one."""
    sweep = verbs.add_parser("sweep", parents=[common], help="one run for each vector of objective weights")
    recipe_arguments(sweep)
    _stage(sweep, "online")
    which = sweep.add_mutually_exclusive_group(required=True)
    which.add_argument(
        "--simplex", type=_points, metavar="N", help="a grid of weights that add up to 1, N along an edge"
    )
    which.add_argument("--weights", action="append", default=[], metavar="a=1,b=0.5", help="one run; may be repeated")
    sweep.add_argument(
        "--seeds", type=_seeds, default=[], metavar="0,1,2", help="each vector with each (default: the recipe's)"
    )
    _parallel(sweep)
    sweep.add_argument("--resume", action="store_true", help="finished runs are kept, interrupted ones continue")
    sweep.set_defaults(verb=_sweep)

    pareto = verbs.add_parser("pareto", parents=[common], help="the front of runs, by their evaluate stages")
    pareto.add_argument("runs", nargs="+", metavar="RUN", help="run folders, or the folder of a sweep")
    _stage(pareto, "evaluate")
    pareto.add_argument(
        "--of", metavar="ID", help="the judged stage (one run: all; several: the last that each judges)"
    )
    pareto.add_argument("--objectives", metavar="a,b", help="default: all that the runs share")
    pareto.add_argument(
        "--reference", metavar="a=0,b=0", help="of the hypervolume, own signs (default: below the worst)"
    )
    pareto.add_argument("--resamples", type=_points, default=1000, metavar="N", help="of the bootstrap (default: 1000)")
    pareto.add_argument("--seed", type=int, default=0, metavar="N", help="of the bootstrap")
    pareto.add_argument("--out", metavar="FOLDER", help="for front.png, .html, .json (default: the first RUN)")
    pareto.add_argument("--json", action="store_true", help="print JSON for programs")
    pareto.set_defaults(verb=_pareto)

    soup = verbs.add_parser("soup", parents=[common], help="interpolate adapters, exactly")
    soup.add_argument("adapters", nargs="+", metavar="ADAPTER", help="peft adapters of one base: folders or hub ids")
    how = soup.add_mutually_exclusive_group(required=True)
    how.add_argument("--grid", type=_points, metavar="N", help="all weights that add up to 1, N along an edge")
    how.add_argument(
        "--weights", type=_numbers, action="append", metavar="0.3,0.7", help="one for each adapter; may be repeated"
    )
    soup.add_argument(
        "--out", required=True, metavar="FOLDER", help="new folder; of several soups, one below it for each"
    )
    soup.add_argument("--base", metavar="MODEL", help="of all adapters, where their folders name it differently")
    soup.add_argument("--other-base", action="store_true", help="although they were trained on another, or on several")
    soup.add_argument(
        "--recipe", metavar="RECIPE", help="examine every soup by this recipe's evaluate stage; the front"
    )
    _stage(soup, "evaluate")
    _parallel(soup)
    soup.add_argument("--resume", action="store_true", help="keep soups and examinations that are there")
    soup.set_defaults(verb=_soup)

    rescore = verbs.add_parser("rescore", parents=[common], help="a run's advantages under other weights")
    rescore.add_argument("run", metavar="RUN", help="run folder")
    rescore.add_argument("overrides", nargs="*", metavar="key=value", help="of `objectives`: min_std=0, whiten=true")
    _stage(rescore, "online")
    rescore.add_argument("--weights", metavar="a=1,b=0.5", help="objectives that are not named keep the run's")
    rescore.add_argument("--combine", metavar="NAME", help="another way to combine objectives")
    rescore.add_argument("--out", metavar="FILE", help="Parquet (default: <run>/<stage>/rescored.parquet)")
    rescore.set_defaults(verb=_rescore)


def _stage(parser: argparse.ArgumentParser, kind: str) -> None:
    parser.add_argument("--stage", metavar="ID", help=f"stage of kind {kind}; where there is one alone, that")


def _parallel(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--parallel",
        type=_at_least_1,
        default=1,
        metavar="N",
        help="runs at once, each on 1/N of the machine (default: 1)",
    )


def _at_least_1(text: str) -> int:
    return _whole(text, 1)


def _points(text: str) -> int:
    return _whole(text, 2)


def _whole(text: str, least: int) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text!r}: give a whole number, {least} or more")
    return int(text)


def _seeds(text: str) -> list[int]:
    return [_whole(word, 0) for word in text.split(",")]


def _numbers(text: str) -> list[float]:
    try:
        found = [float(word) for word in text.split(",")]
    except ValueError:
        found = [math.nan]
    if not all(map(math.isfinite, found)):
        raise argparse.ArgumentTypeError(f"{text!r}: give a number for each adapter, such as 0.3,0.7")
    return found


def _sweep(arguments: argparse.Namespace) -> int:
    from align.cli import sweep

    return sweep.main(arguments)


def _pareto(arguments: argparse.Namespace) -> int:
    from align.cli import pareto

    return pareto.main(arguments)


def _soup(arguments: argparse.Namespace) -> int:
    from align.cli import soup

    return soup.main(arguments)


def _rescore(arguments: argparse.Namespace) -> int:
    from align.cli import rescore

    return rescore.main(arguments)
