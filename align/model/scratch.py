"""A model from scratch: weights drawn from a seed, written once into the folder that already holds the tokenizer."""

from __future__ import annotations

import difflib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from align.errors import ModelError
from align.model.folders import flush, sync_path
from align.model.load import auto_class_of, quiet, resolve_dtype
from align.model.scratch_vision import nested_config, vision_family, write_processor
from align.recipe.families import FAMILIES
from align.recipe.inputs import Model

WHERE = "model.config"
PROCESSOR = "processor_config.json"


def write_base(model: Model, folder: Path, seed: int) -> None:
    """Write config.json, generation_config.json and safetensors for `Model.config` beside the tokenizer in `folder`;
    for a model that reads images, its processor too.

    `vocab_size` and the bos, eos and pad ids come from the tokenizer's files where the recipe does not give them; a
    larger (padded) `vocab_size` is kept. Weights are drawn in float32 by the architecture's own initialisation from
    `seed` alone: the same recipe writes the same bytes. config.json arrives last, so that its presence means that the
    folder is complete.

    Raises ModelError for an unknown `model_type` or key, a vocabulary smaller than the tokenizer's, or missing
    tokenizer files.
    """
    from transformers import GenerationConfig

    folder = Path(folder)
    tokens = tokenizer_facts(folder)
    config = make_config(dict(model.config or {}), tokens, token_ids(folder))
    dtype = resolve_dtype(model.dtype, "cpu")
    config.dtype = dtype
    with quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = auto_class_of(config.to_dict()).from_config(config, dtype=torch.float32).to(dtype)
    aside = folder / ".partial"
    shutil.rmtree(aside, ignore_errors=True)
    try:
        with quiet():
            network.save_pretrained(aside)
            ids = {key: value for key, value in tokens.items() if key != "vocab_size" and value is not None}
            GenerationConfig(**ids).save_pretrained(aside)
            if config.model_type in FAMILIES:
                write_processor(config, folder, aside / "processor")
                os.replace(aside / "processor" / PROCESSOR, aside / PROCESSOR)
                shutil.rmtree(aside / "processor")  # and the tokenizer, which is there already
        flush(aside)
        for path in sorted(aside.iterdir(), key=lambda p: (p.name == "config.json", p.name)):
            os.replace(path, folder / path.name)
        sync_path(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def make_config(wanted: dict[str, Any], tokens: dict[str, int | None], ids: Mapping[str, int]) -> Any:
    """A transformers config from the recipe's keys, each of which the architecture must know. ids: of the tokenizer's
    tokens by their text."""
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    model_type = str(wanted.get("model_type"))
    if model_type not in CONFIG_MAPPING:
        near = difflib.get_close_matches(str(model_type), list(CONFIG_MAPPING), n=1)
        raise ModelError(
            f"`model_type` is {wanted.get('model_type')!r}, which this transformers version does not know",
            where=WHERE,
            remedy=f"did you mean {near[0]!r}?" if near else "name an architecture, for instance model_type: qwen3",
        )
    family = vision_family(model_type)
    if family is None:
        settings = {key: value for key, value in wanted.items() if key != "model_type"}
        require_known(CONFIG_MAPPING[model_type](), settings, WHERE)
        settings = {**tokens, **settings}
        text, where = settings, WHERE
    else:
        settings = nested_config(wanted, family, tokens, ids, require_known)
        text, where = settings["text_config"], f"{WHERE}.text_config"
    smallest = tokens["vocab_size"]
    assert smallest is not None
    if text["vocab_size"] < smallest:
        raise ModelError(
            f"vocab_size is {text['vocab_size']}, but the tokenizer has {smallest} tokens",
            where=f"{where}.vocab_size",
            remedy=f"leave it out, or give at least {smallest}",
        )
    try:
        return AutoConfig.for_model(model_type, **settings)
    except (TypeError, ValueError) as error:
        raise ModelError(f"{model_type!r} refuses this configuration: {error}", where=WHERE) from error


def require_known(known: Any, wanted: Mapping[str, Any], where: str) -> None:
    """Raise ModelError for a key that a transformers config has not, with the nearest that it has."""
    for key in wanted:
        # for_model takes any keyword in silence: a misspelt hidden_size would make a model of the default size
        if not hasattr(known, key):
            near = difflib.get_close_matches(key, list(known.to_dict()), n=1)
            raise ModelError(
                f"{key!r} is no setting of {known.model_type!r} models",
                where=f"{where}.{key}",
                remedy=f"did you mean {near[0]!r}?" if near else "remove it",
            )


def token_ids(folder: Path) -> dict[str, int]:
    """Every token of the tokenizer in `folder` and its id."""
    from tokenizers import Tokenizer

    file = folder / "tokenizer.json"
    if not file.is_file():
        raise ModelError("no tokenizer.json where the model is to be written", where=folder)
    found: dict[str, int] = Tokenizer.from_file(str(file)).get_vocab(with_added_tokens=True)
    return found


def tokenizer_facts(folder: Path) -> dict[str, int | None]:
    """vocab_size, bos_token_id, eos_token_id and pad_token_id of the tokenizer in `folder` (None: it has none)."""
    ids = token_ids(folder)
    facts: dict[str, int | None] = {"vocab_size": max(ids.values()) + 1}
    settings_file = folder / "tokenizer_config.json"
    settings = json.loads(settings_file.read_text(encoding="utf-8")) if settings_file.is_file() else {}
    for name in ("bos_token", "eos_token", "pad_token"):
        token = settings.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        if token is not None and token not in ids:
            raise ModelError(
                f"{name} {token!r} is not in the tokenizer's vocabulary",
                where=settings_file,
            )
        facts[f"{name}_id"] = None if token is None else ids[token]
    return facts
