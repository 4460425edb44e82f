"""What a model's parts are and what an adapter would train of them, from its configuration alone: nothing is loaded.

    python -m align.model.measure '{"config": {...}, "adapters": [{...}]}'

Answers {"tables": [{part: {"mode", "parameters", "trained"}}]}, one table for each adapter of a recipe, or {"error"}.
A process of its own, because it imports torch and transformers, which `align check` does not.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import Any

import torch

from align.errors import UserError
from align.model.load import auto_class_of, quiet
from align.model.lora_targets import fresh_config, targeted_modules
from align.model.parts import parts_of, sizes
from align.recipe.schema import Adapter

Table = dict[str, dict[str, Any]]


def empty_model(config: Mapping[str, Any]) -> Any:
    """The model of a transformers configuration (config.json's content), without memory for its weights."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    made = CONFIG_MAPPING[config["model_type"]].from_dict(dict(config))
    with quiet(), torch.device("meta"):
        return auto_class_of(config["model_type"]).from_config(made)


def table_of(model: Any, adapter: Adapter) -> Table:
    """Of each part: its mode, its parameters, and how many numbers are trained (an adapter's, or all).

    Raises ModelError or Unsupported where the adapter does not fit the model.
    """
    parts, counts = parts_of(model), sizes(model)
    adapted: dict[str, int] = {}
    if adapter.kind != "full":
        modules = dict(model.named_modules())
        for path in targeted_modules(model, fresh_config(model, adapter)):
            wide, narrow = modules[path].weight.shape
            adapted[parts.of(path)] = adapted.get(parts.of(path), 0) + adapter.rank * (wide + narrow)
    table: Table = {}
    for part, size in counts.items():
        mode = adapter.modes[part]
        trained = {"full": size, "frozen": 0, "lora": adapted.get(part, 0)}[mode]
        table[part] = {"mode": mode, "parameters": size, "trained": trained}
    return table


def main(argument: str) -> dict[str, Any]:
    asked = json.loads(argument)
    try:
        model = empty_model(asked["config"])
        return {"tables": [table_of(model, Adapter.model_validate(one)) for one in asked["adapters"]]}
    except UserError as error:
        return {"error": {"what": error.what, "where": error.where, "remedy": error.remedy}}


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1])))
