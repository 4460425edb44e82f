"""What a model's parts are and what an adapter would train of them, from its configuration alone: nothing is loaded.

    python -m align.model.measure '{"config": {...}, "vocabulary": null, "adapters": [{...}]}'

config: config.json's content; or, with the tokenizer's vocabulary, what a recipe says of a model from scratch.
Answers {"tables": [{part: {"mode", "parameters", "trained"}}]}, one table for each adapter of a recipe, or {"error"}.
A process of its own, because it imports torch and transformers, which `align check` does not.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import Any

import torch

from align.errors import ModelError, UserError
from align.model.load import auto_class_of, quiet
from align.model.lora_targets import fresh_config, targeted_modules
from align.model.parts import parts_of, sizes
from align.model.scratch import make_config
from align.recipe.adapter import Adapter
from align.recipe.families import family_of

Table = dict[str, dict[str, Any]]


def empty_model(config: Mapping[str, Any], vocabulary: int | None = None) -> Any:
    """The model of a configuration, without memory for its weights. Raises ModelError where it is of no known model."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if vocabulary is not None:
        family = family_of(config)
        ids = {mark: number for number, mark in enumerate(family.marks if family else ())}
        made = make_config(dict(config), {"vocab_size": vocabulary}, ids)
    elif config.get("model_type") in CONFIG_MAPPING:
        made = CONFIG_MAPPING[config["model_type"]].from_dict(dict(config))
    else:
        raise ModelError(
            f"`model_type` is {config.get('model_type')!r}, which this transformers version does not know",
            where="config.json",
            remedy="leave `adapter.tune` out, or use a model of a family that it knows",
        )
    with quiet(), torch.device("meta"):
        return auto_class_of(made.to_dict()).from_config(made)


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
            magnitudes = wide if adapter.kind == "dora" else 0
            adapted[parts.of(path)] = adapted.get(parts.of(path), 0) + adapter.rank * (wide + narrow) + magnitudes
    table: Table = {}
    for part, size in counts.items():
        mode = adapter.modes[part]
        trained = {"full": size, "frozen": 0, "lora": adapted.get(part, 0)}[mode]
        table[part] = {"mode": mode, "parameters": size, "trained": trained}
    return table


def main(argument: str) -> dict[str, Any]:
    asked = json.loads(argument)
    try:
        model = empty_model(asked["config"], asked["vocabulary"])
        return {"tables": [table_of(model, Adapter.model_validate(one)) for one in asked["adapters"]]}
    except UserError as error:
        return {"error": {"what": error.what, "where": error.where, "remedy": error.remedy}}


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1])))
