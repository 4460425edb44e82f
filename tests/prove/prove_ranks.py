"""One rank = two ranks = ZeRO 1 = 2 = 3, and a checkpoint of any of them is resumed by any other.

    python -m tests.prove ranks

Tiny float32 models on CPU ranks over gloo, 20 updates of each case of `tests.sharded`: uneven trees, several
microbatches, a text-only rank beside one with a picture (and steps without any), tied and trained heads, gradient
checkpointing, offload. ALIGN_PROVE_CASES sets a subset of cases.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from align.train.ranks import Ranks
from tests.prove.entry import conclude
from tests.sharded import CASES, SPREAD, STEPS, apart, on_ranks, train, write_bases

LOSSES, WEIGHTS = 1e-6, 1e-5
RESUMED = "sft"  # the case whose checkpoints cross
HALF = STEPS // 2


def whole(folder: Path, cases: tuple[str, ...], ranks: Ranks) -> dict[str, Any]:
    """Every case by every strategy; of the case that is resumed, a checkpoint in the middle."""
    found = {}
    for name in cases:
        for strategy in CASES[name].strategies if ranks.size > 1 else ("replicated",):
            found[f"{name} {strategy}"] = train(folder, CASES[name], strategy, ranks, range(STEPS))
    for strategy in shapes(ranks.size):
        train(folder, CASES[RESUMED], strategy, ranks, range(HALF), saved=saved(folder, ranks.size, strategy))
    return found


def shapes(size: int) -> tuple[str, ...]:
    return SPREAD if size > 1 else ("replicated", "zero3")


def saved(folder: Path, size: int, strategy: str) -> Path:
    return folder / "checkpoints" / f"{size}-{strategy}"


def resumed(folder: Path, ranks: Ranks) -> dict[str, Any]:
    """Every checkpoint, by every strategy on this number of ranks."""
    steps, case = range(HALF, STEPS), CASES[RESUMED]
    return {
        f"{size} {before} -> {ranks.size} {after}": train(
            folder, case, after, ranks, steps, resumed=saved(folder, size, before)
        )
        for size in (1, 2)
        for before in shapes(size)
        for after in shapes(ranks.size)
    }


def main() -> int:
    begun = time.monotonic()
    cases = tuple(os.environ.get("ALIGN_PROVE_CASES", ",".join(CASES)).split(","))
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_bases(folder)
        runs = {size: on_ranks(size, folder, partial(whole, folder, cases), limit_s=3000) for size in (1, 2)}
        again = {size: on_ranks(size, folder, partial(resumed, folder), limit_s=3000) for size in (1, 2)}
    for case in cases:
        alone = runs[1][0][f"{case} replicated"]
        for strategy in CASES[case].strategies:
            figures[f"{case}: two ranks, {strategy}"] = judged(apart(alone, runs[2][0][f"{case} {strategy}"]))
    straight = runs[1][0].get(f"{RESUMED} replicated")
    if straight is not None:
        late = {**straight, "losses": straight["losses"][HALF:], "norms": straight["norms"][HALF:]}
        for size in (1, 2):
            figures |= {f"resumed: {key}": judged(apart(late, run)) for key, run in again[size][0].items()}
    for key, part in figures.items():
        print(key, part["differences"], "" if all(part["checks"].values()) else "FAILED", flush=True)
    claim = (
        f"1 rank = 2 ranks = ZeRO 1 = 2 = 3 over {STEPS} updates: losses to {LOSSES:g}, final weights to {WEIGHTS:g}; "
        "checkpoints cross ranks and stages"
    )
    return conclude("ranks", claim=claim, command="python -m tests.prove ranks", figures=figures, begun=begun)


def judged(differences: dict[str, float]) -> dict[str, Any]:
    checks = {"losses": differences["losses"] <= LOSSES, "weights": differences["weights"] <= WEIGHTS}
    return {"differences": differences, "checks": checks}


if __name__ == "__main__":
    sys.exit(main())
