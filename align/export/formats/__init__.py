"""Formats of an export, one file each, found by its name: `format: NAME` is the module NAME here.

A format's module imports torch only inside its functions, or where only they load it, and exports

    plan(folder, dtype) -> Plan             what is to be written of the model in `folder`, before anything is, and in
                                            which torch `dtype`; raises ModelError or Unsupported where it cannot be
    write(plan, target) -> Written          into the empty folder `target`; every byte is read back and compared
    prove(plan, target, proof) -> checks    `LoadCheck`s of who loads it; raises ExportError where one computes else

Nothing here imports torch: `align check` asks which formats there are.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any

from align.plugins import known_module

OWN = "safetensors"  # what stages write and start from


@dataclass(frozen=True)
class Written:
    """What a format wrote: numbers of tensors and bytes, names of files."""

    tensors: int
    bytes: int
    files: tuple[str, ...]


@dataclass(frozen=True)
class Proof:
    """How an export is proved. engines: rollout engines that must load it, where they are installed; time_limit_s: of
    each loader; seed: of the tokens that are compared."""

    engines: tuple[str, ...]
    seed: int
    trust_remote_code: bool
    time_limit_s: float


def load_format(name: str) -> Any:
    """The module of a format. Raises ValueError where there is none."""
    return import_module(f"{__name__}.{known_module(name, __name__, 'export format')}")
