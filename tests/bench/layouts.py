"""Is every supported family computed packed, with its prompts once and the attention that was asked for?

    python -m tests.bench.layouts [--real FOLDER]

Every family of the tests, in float32 and bfloat16, fresh and loud (matrices enlarged until bfloat16 is as far off as a
pretrained model's), as a LoRA stage loads it; and a pretrained model in a local folder, by --real or ALIGN_REAL_MODEL.
Fails, by exit code, where one falls back that holds no state; prints layout, attention, errors, seconds and why.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tests.bench import common
from tests.unit.core.families import FAMILIES, STATEFUL, make_family

DTYPES = ("float32", "bfloat16")
LOUDER = 3.0


class Line(NamedTuple):
    model: str
    dtype: str
    adapter: str
    layout: str
    attention: str
    own_error: float
    error: float
    seconds: float
    why: tuple[str, ...]
    expected: str

    @property
    def fell_back(self) -> bool:
        return self.layout != self.expected or bool(self.why and self.expected == "shared")


def load(name: str, folder: Path, dtype: str, kind: str, expected: str = "shared") -> Line:
    """The verdict on a folder, as a stage loads it."""
    from align.recipe.adapter import Adapter
    from align.recipe.inputs import Model
    from align.recipe.parts import LossTerm, Optim
    from align.train.spec import TrainerSpec
    from align.train.trainer import PolicyTrainer

    started = time.perf_counter()
    trainer = PolicyTrainer(
        TrainerSpec(
            model=Model(path=str(folder), dtype=dtype),
            base=str(folder),
            adapter_config=Adapter(kind="full") if kind == "full" else Adapter(rank=4, alpha=8),
            losses=(LossTerm(name="sft"),),
            optim=Optim(lr=1e-4, schedule="constant", warmup=0.0),
            total_updates=1,
        )
    )
    found: Any = trainer.module.verdict
    seconds = time.perf_counter() - started
    how = (found.layout, found.attention, found.own_error, found.error)
    return Line(name, dtype, kind, *how, seconds, found.why, expected)


def families(names: Sequence[str], work: Path) -> Iterator[Line]:
    import torch

    for family in names:
        for loud in (False, True):
            model = make_family(family)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(LOUDER if loud and parameter.ndim > 1 else 1.0)
            folder = work / f"{family}{'-loud' if loud else ''}"
            model.save_pretrained(folder)
            expected = "padded" if family in STATEFUL else "shared"
            for dtype in DTYPES:
                yield load(folder.name, folder, dtype, "lora", expected)


def real(folder: Path) -> Iterator[Line]:
    for dtype in DTYPES:
        for kind in ("lora", "full"):
            yield load(folder.name, folder, dtype, kind)


def shown(line: Line) -> str:
    how = f"{line.layout} ({line.attention})"
    errors = f"own error {line.own_error:.1e}, ours {line.error:.1e}"
    mark = "  FELL BACK: " + "; ".join(line.why) if line.fell_back else ""
    return f"{line.model:24} {line.dtype:9} {line.adapter:5} {how:18} {errors}  {line.seconds:5.1f} s{mark}"


def main(argv: Sequence[str] | None = None) -> list[Line]:
    """Run and print; returns the lines."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.layouts", description=__doc__.splitlines()[0])
    parser.add_argument("--real", type=Path, default=os.environ.get("ALIGN_REAL_MODEL") or None)
    parser.add_argument("--families", default=",".join(FAMILIES), help="names of tests/unit/core/families.py")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args(argv)
    common.use_threads(arguments.threads)
    found = []
    with tempfile.TemporaryDirectory() as name:
        names = [family for family in arguments.families.split(",") if family]
        lines = families(names, Path(name))
        for source in (lines, real(Path(arguments.real)) if arguments.real else iter(())):
            for line in source:
                print(shown(line), flush=True)
                found.append(line)
    return found


if __name__ == "__main__":
    sys.exit(any(line.fell_back for line in main()))
