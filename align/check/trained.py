"""What a stage trains of a model that reads images, part by part: measured in a child process, shown as a table."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from align.check.memory.sizes import Row, Table, count
from align.data.media.opening import takes_media
from align.errors import ModelError, PluginError
from align.plugins import describe_in_child
from align.recipe.adapter import PARTS, Adapter, Part, Rate
from align.recipe.families import family_of
from align.recipe.support import refuse_parts_of_text

LIMIT_S = 180.0  # a child that imports torch and transformers and makes a model without weights needs seconds


def reads_images(config: Mapping[str, Any]) -> bool:
    """Whether a transformers configuration has a part that sees."""
    return takes_media(config) or family_of(config) is not None


class Measured:
    """Tables of one model's adapters, each measured once. vocabulary: the tokenizer's, where the configuration is that
    of a model from scratch, which the model completes."""

    def __init__(self, config: Mapping[str, Any], vocabulary: int | None = None):
        self.config, self.vocabulary = config, vocabulary
        self._tables: dict[Adapter, Table] = {}

    def table(self, adapter: Adapter) -> Table | None:
        """None for a model of text. Raises Unsupported or ModelError where the adapter does not fit the model."""
        if not reads_images(self.config):
            refuse_parts_of_text(adapter)
            return None
        if adapter not in self._tables:
            adapters = [adapter.model_dump(mode="json")]
            asked = json.dumps({"config": self.config, "vocabulary": self.vocabulary, "adapters": adapters})
            try:
                answer = describe_in_child("align.model.measure", [asked], name="model", limit_s=LIMIT_S)
            except PluginError as error:
                raise ModelError(error.what, where=error.where, remedy=error.remedy) from None
            rows = {part: Row(**row) for part, row in answer["tables"][0].items()}
            self._tables[adapter] = {part: rows[part] for part in PARTS if part in rows}
        return self._tables[adapter]


def table_lines(table: Table, rates: Mapping[Part, Rate]) -> list[str]:
    """The table for a terminal."""
    lines = [f"{'part':<10} {'mode':<7} {'weights':>9} {'trained':>9} {'lr':>8} {'weight decay':>13}"]
    for part, row in table.items():
        rate = rates.get(part)
        lr, decay = (f"{rate.lr:g}", f"{rate.weight_decay:g}") if rate else ("-", "-")
        trained = count(row.trained) if row.trained else "-"
        lines.append(f"{part:<10} {row.mode:<7} {count(row.parameters):>9} {trained:>9} {lr:>8} {decay:>13}")
    return lines
