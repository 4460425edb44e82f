"""Adapter folders in peft layout, read without torch: what they are, and whether this engine can use them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from math import isfinite
from pathlib import Path
from typing import Any

from align.errors import ModelError, Unsupported
from align.recipe.adapter import Adapter
from align.recipe.adapter_folder import described, quantised_base
from align.recipe.support import BASE_BESIDE_ADAPTER

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
OWN_BASE = BASE_BESIDE_ADAPTER  # where parts of the model were trained whole beside the adapter
HEAD = "score"  # the module of a model that scores, saved whole beside the adapter
PEFT_HEADS = {HEAD, "classifier"}  # peft's task type SEQ_CLS names both, whichever the model has

# Settings that make an adapter more than W + scaling * B A on linear layers, and what the user would call them.
# "train": refused where the adapter is trained further; "merge": refused by the merge as well.
BEYOND_LORA: dict[str, tuple[str, str]] = {
    "lora_bias": ("a bias in lora_B", "train"),
    "modules_to_save": (
        "whole modules saved in the adapter (modules_to_save)",
        "merge",
    ),
    "trainable_token_indices": ("trained token embeddings", "merge"),
    "target_parameters": ("LoRA on bare parameters (target_parameters)", "merge"),
    "layer_replication": ("layer replication", "merge"),
    "alora_invocation_tokens": ("activated LoRA", "merge"),
    "use_qalora": ("QALoRA", "merge"),
    "use_bdlora": ("block-diagonal LoRA", "merge"),
    "arrow_config": ("Arrow routing", "merge"),
    "kasa_config": ("KaSA", "merge"),
    "velora_config": ("VeLoRA", "merge"),
    "monteclora_config": ("MonteCLoRA", "merge"),
    "megatron_config": ("Megatron layers", "merge"),
}
# initialisations that leave the base weights alone; PiSSA, OLoRA, CorDA and LoftQ rewrite them at load. LoRA-GA rewrote
# them by gradients that no file holds: not even peft finds its base again
PLAIN_INITS, LOST_BASES = ("gaussian", "eva", "orthogonal", "mica"), ("lora_ga",)


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """adapter_config.json of a peft folder. Raises ModelError where it is missing, broken or not LoRA."""
    file = Path(folder) / CONFIG
    if not file.is_file():
        raise ModelError(f"no {CONFIG}", where=folder, remedy="give an adapter folder in peft layout")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"not valid JSON: {error}", where=file) from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else None
        raise ModelError(f"peft_type is {kind!r}; this engine knows LoRA adapters", where=file)
    for key, (words, fits) in _VALUES.items():
        bare = key == "target_modules" and config.get("target_parameters")  # which is refused by its own name
        if key in config and not bare and not fits(config[key]):
            raise ModelError(
                f"`{key}` must be {words}, and is {config[key]!r:.80}",
                where=file,
                remedy="save the adapter again with peft, or correct the file",
            )
    return config


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_flag(value: Any) -> bool:
    return value is None or isinstance(value, bool)


def _is_targets(value: Any) -> bool:
    texts = value if isinstance(value, list) else [value]
    return bool(texts) and all(isinstance(text, str) and text for text in texts)


def _is_pattern(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or (isinstance(value, dict) and all(map(fits, value.values())))


# peft takes whatever stands there: `"false"` for true, and nothing for a number until it divides by it
_VALUES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "r": ("a whole number above 0", _is_rank),
    "lora_alpha": ("a number", _is_number),
    "target_modules": ("names of modules, or a pattern of them", _is_targets),
    "rank_pattern": ("whole numbers above 0, by module", _is_pattern(_is_rank)),
    "alpha_pattern": ("numbers by module", _is_pattern(_is_number)),
    **dict.fromkeys(("use_rslora", "use_dora", "lora_bias", "fan_in_fan_out"), ("true or false", _is_flag)),
}


def weights_file(folder: Path) -> Path:
    """The adapter's tensors. Raises ModelError where they are missing."""
    file = Path(folder) / WEIGHTS
    if not file.is_file():
        raise ModelError(
            f"no {WEIGHTS} (pickled adapters are never read)",
            where=folder,
            remedy="load the adapter once in peft and save it again: it writes safetensors",
        )
    return file


def scores(config: dict[str, Any]) -> bool:
    """Whether the adapter is a reward model's or a classifier's: LoRA and a score head."""
    saved = set(config.get("modules_to_save") or ())
    return config.get("task_type") == "SEQ_CLS" and bool(saved) and saved <= PEFT_HEADS


def refuse_beyond_lora(config: dict[str, Any], folder: Path, use: str, *, score_head: bool = False) -> None:
    """Raise Unsupported where the adapter is more than plain LoRA. use: "train" or "merge". score_head: the model
    has one, and the adapter may bring its weights."""
    found = [
        words
        for key, (words, refused_for) in BEYOND_LORA.items()
        if config.get(key) and use in ("train", refused_for)
        if not (key == "modules_to_save" and score_head and scores(config))
    ]
    if not score_head and scores(config):
        raise Unsupported(
            "the adapter is a reward model's or classifier's: LoRA and a score head, which a language model has not",
            where=folder,
            remedy="only a stage of kind reward_model or classify goes on with it; start from another adapter",
        )
    if config.get("bias", "none") != "none":
        found.append(f"trained biases (bias: {config['bias']})")
    init = config.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower() in LOST_BASES:
        raise Unsupported(
            f"the adapter was initialised by {init}, which changed the base weights as it was made: it belongs on a "
            "base that is in no file",
            where=folder,
            remedy="save it as plain LoRA where it was trained: model.save_pretrained(folder, "
            "path_initial_model_for_weight_conversion=...) in peft",
        )
    if isinstance(init, str) and init.lower() not in PLAIN_INITS:
        found.append(f"{init} initialisation, which changes the base weights as it is loaded")
    if found:
        raise Unsupported(
            f"the adapter uses {', '.join(found)}",
            where=folder,
            remedy="merge it with peft (model.merge_and_unload()) and give the merged folder as `model.path`",
        )


def refuse_unknown(config: dict[str, Any], known: Iterable[str], folder: Path) -> None:
    """Raise Unsupported for a setting of another version of peft that is switched on. known: those of the installed
    one, which would drop others with a Python warning. A number alone is the measure of something that is not on."""
    unknown = sorted(
        key
        for key in config.keys() - set(known)
        if config[key] and (isinstance(config[key], bool) or not isinstance(config[key], int | float))
    )
    if unknown:
        settings = ", ".join(f"{key}: {config[key]!r:.60}" for key in unknown)
        raise Unsupported(
            f"the adapter has settings that the installed peft does not know ({settings})",
            where=Path(folder) / CONFIG,
            remedy=f"it was saved by peft {config.get('peft_version') or 'of another version'}: merge it there "
            "(model.merge_and_unload()), or take the setting out of the file if it means nothing",
        )


def recipe_adapter(folder: Path) -> Adapter:
    """The recipe's `adapter:` that describes an existing adapter, for stages that inherit it."""
    return described(read_adapter_config(folder), quantised_base(folder))


def lora_rank(folder: Path) -> int:
    """The largest rank that any module of the adapter has (per-module ranks included)."""
    config = read_adapter_config(folder)
    return max(
        [
            int(config.get("r", 8)),
            *map(int, (config.get("rank_pattern") or {}).values()),
        ]
    )
