"""What the folder of an adapter says of itself in words of the recipe, and of the base in four bits that it belongs on.

An adapter that was trained on packed weights is another model on the base in full precision. Its folder holds, beside
peft's files, how the base was packed: whoever merges it packs the base again, to the same weights.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.errors import ModelError
from align.recipe.adapter import Adapter, Part, Quant

QUANTISED = "quantised_base.json"


@dataclass(frozen=True)
class QuantisedBase:
    """How a base was packed, and which parts of the model. dtype: what it was packed from and computed with."""

    quant: Quant
    parts: tuple[Part, ...]
    dtype: str

    def write(self, folder: Path) -> None:
        values = {**self.quant.model_dump(), "parts": self.parts, "dtype": self.dtype}
        (folder / QUANTISED).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def quantised_base(folder: Path) -> QuantisedBase | None:
    """What the adapter in `folder` was trained on, where that was packed. Raises ModelError for an unreadable file."""
    file = Path(folder) / QUANTISED
    if not file.is_file():
        return None
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        if "quant_method" in values:  # the base came quantised: nobody here packs it
            return None
        parts, dtype = tuple(values.pop("parts")), str(values.pop("dtype"))
        return QuantisedBase(Quant.model_validate(values), parts, dtype)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"unreadable: {error}", where=file, remedy="copy the adapter again") from None


def described(config: Mapping[str, Any], base: QuantisedBase | None) -> Adapter:
    """The recipe's `adapter:` for peft's adapter_config.json, as far as a recipe can say it; whoever loads the adapter
    checks the rest."""
    targets, exclude = config.get("target_modules") or (), config.get("exclude_modules") or ()
    return Adapter(
        kind="dora" if config.get("use_dora") else "qlora" if base else "lora",
        rank=config.get("r", 8),
        alpha=config.get("lora_alpha", 8),
        dropout=config.get("lora_dropout", 0.0),
        targets=targets if isinstance(targets, str) else tuple(sorted(targets)),
        exclude=(exclude,) if isinstance(exclude, str) else tuple(sorted(exclude)),
        rslora=bool(config.get("use_rslora")),
        quant=base.quant if base else None,
    )
