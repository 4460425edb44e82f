"""Work on model files, each in a Ray task of its own: the driver never holds a model's tensors."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from align.actors.cluster import die_with_parent
from align.recipe.chat_files import ChatFiles
from align.recipe.inputs import Model
from align.shared_files import require_shared


def multiplied(token: Path, inner: int, outer: int, threads: int) -> dict[str, float]:
    """See `align.model.speed`. token: see `require_shared`, here and below."""
    die_with_parent()
    require_shared(token)
    from align.model import speed

    return speed.multiplied(inner, outer, threads)


def write_base(token: Path, model: Model, folder: Path, seed: int) -> None:
    """Config and weights of a model from scratch beside its tokenizer."""
    die_with_parent()
    require_shared(token)
    from align.model import scratch

    scratch.write_base(model, folder, seed)


def merge(token: Path, base: Path, adapter: Path, out: Path, dtype: str, seed: int, chat: ChatFiles) -> dict[str, Any]:
    """One plain model folder at `out`; the merge's report as plain numbers. The run has compared adapter and base."""
    die_with_parent()
    require_shared(token, base, adapter)
    from align.export import merge as module

    return asdict(module.merge(base, adapter, out, dtype=dtype, seed=seed, chat=chat, other_base=True))


def export(token: Path, folder: Path, out: Path, form: str, dtype: str) -> dict[str, Any]:
    """`folder` converted to `form` at `out`; the export's report as plain numbers."""
    die_with_parent()
    require_shared(token, folder)
    from align.export import export as module

    return asdict(module.export(folder, out, format=form, dtype=dtype))
