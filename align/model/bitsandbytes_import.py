"""Importing bitsandbytes without torch's compiler. To be called before peft is imported, which imports bitsandbytes
wherever that is installed, used or not.

bitsandbytes (backends/default/ops.py) decorates kernels with `torch.compile` as it is imported, and that alone loads
TorchInductor: two to three seconds of a core, in every process that has an adapter. Here what is decorated is compiled
at its first call instead; nothing else differs.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
from collections.abc import Callable
from typing import Any

import torch


def import_bitsandbytes() -> None:
    """Import it, where it is installed and was not imported yet."""
    if "bitsandbytes" in sys.modules or importlib.util.find_spec("bitsandbytes") is None:
        return
    usual = torch.compile
    torch.compile = functools.partial(_compile_at_first_call, usual)
    try:
        import bitsandbytes  # noqa: F401
    finally:
        torch.compile = usual


def _compile_at_first_call(
    usual: Callable[..., Any], function: Callable[..., Any] | None = None, **options: Any
) -> Callable[..., Any]:
    if function is None:
        return functools.partial(_compile_at_first_call, usual, **options)
    compiled: list[Callable[..., Any]] = []

    @functools.wraps(function)
    def run(*arguments: Any, **named: Any) -> Any:
        if not compiled:
            compiled.append(usual(function, **options))
        return compiled[0](*arguments, **named)

    return run
