"""What a model from scratch that reads images has beside its weights: nested configurations, and a processor."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from align.errors import ModelError, Unsupported
from align.recipe.families import FAMILIES, Family

WHERE = "model.config"
# images in units of merged patches (a token each): what Qwen's own processors allow
LEAST_TOKENS, MOST_TOKENS = 4, 16384
_PROCESSORS = {"qwen2_vl": "Qwen2VLProcessor", "qwen2_5_vl": "Qwen2_5_VLProcessor", "qwen3_vl": "Qwen3VLProcessor"}


def vision_family(model_type: str) -> Family | None:
    """The family of a model that reads images; None for one of text. Raises Unsupported for other families."""
    from transformers.models.auto import modeling_auto as known

    if model_type in known.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return None
    if model_type not in FAMILIES:
        raise Unsupported(
            f"a {model_type} model from scratch",
            where=f"{WHERE}.model_type",
            remedy=f"those that read images are {', '.join(FAMILIES)}; give any other as `model.path`",
        )
    return FAMILIES[model_type]


def nested_config(
    wanted: Mapping[str, Any],
    family: Family,
    tokens: Mapping[str, int | None],
    ids: Mapping[str, int],
    check: Callable[[Any, Mapping[str, Any], str], None],
) -> dict[str, Any]:
    """Keyword arguments of the family's configuration: the recipe's `wanted`, completed.

    tokens: vocab_size and the ids of bos, eos and pad; ids: of the tokenizer's tokens, by their text. check: refuses
    settings that a configuration has not, given it, the settings and where they stand.

    Raises ModelError for unknown settings, sizes that do not fit each other, a tokenizer without the family's marks.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    model_type = str(wanted["model_type"])
    known = CONFIG_MAPPING[model_type]()
    outer = {key: value for key, value in wanted.items() if key != "model_type"}
    check(known, outer, WHERE)
    nested: dict[str, dict[str, Any]] = {}
    for name in ("text_config", "vision_config"):
        settings = outer.get(name)
        if not isinstance(settings, dict):
            raise ModelError(
                f"a {model_type} model from scratch needs `{name}`: its own default is of billions of parameters",
                where=f"{WHERE}.{name}",
                remedy=f"write `{name}: {{hidden_size: ..., ...}}`",
            )
        check(getattr(known, name), settings, f"{WHERE}.{name}")
        nested[name] = settings
    missing = [mark for mark in family.marks if mark not in ids]
    if missing:
        raise ModelError(f"the tokenizer lacks {', '.join(missing)}", where="model.tokenizer")
    text = {**tokens, **nested["text_config"]}
    text.setdefault("rope_parameters", _rope(model_type, text, known.text_config))
    marks = {key: ids[mark] for key, mark in family.ids.items()}
    return {**marks, **outer, "text_config": text, "vision_config": _vision(model_type, nested["vision_config"], text)}


def _rope(model_type: str, text: Mapping[str, Any], known: Any) -> dict[str, Any]:
    """Rotary settings whose three axes share a head as the family's do (time a quarter, height and width the rest)."""
    head = text.get("head_dim", getattr(known, "head_dim", None))
    if head is None:
        hidden = text.get("hidden_size", known.hidden_size)
        head = int(hidden) // int(text.get("num_attention_heads", known.num_attention_heads))
    half = int(head) // 2
    time = half // 4
    height = (half - time) // 2
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [time, height, half - time - height]}
    return {**rope, "mrope_interleaved": True} if model_type == "qwen3_vl" else rope


def _vision(model_type: str, vision: dict[str, Any], text: Mapping[str, Any]) -> dict[str, Any]:
    """The tower's settings; its last layer is as wide as the language model, however the family calls that."""
    key = "hidden_size" if model_type == "qwen2_vl" else "out_hidden_size"
    width = text.get("hidden_size")
    if width is None:
        raise ModelError(
            "the language model's width is not given", where=f"{WHERE}.text_config", remedy="give `hidden_size`"
        )
    if vision.get(key, width) != width:
        raise ModelError(
            f"`{key}: {vision[key]}` is what the tower hands to the language model, whose hidden_size is {width}",
            where=f"{WHERE}.vision_config.{key}",
            remedy="leave it out",
        )
    return {**vision, key: width}


def write_processor(config: Any, tokenizer_folder: Path, folder: Path) -> None:
    """Write the processor of a model's `config`, for the tokenizer and template in `tokenizer_folder`, to `folder`."""
    import transformers as hf

    vision = config.vision_config
    patch, merge, frames = vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size
    area = (patch * merge) ** 2
    size = {"shortest_edge": LEAST_TOKENS * area, "longest_edge": MOST_TOKENS * area}
    settings = {"patch_size": patch, "merge_size": merge, "temporal_patch_size": frames, "size": size}
    tokenizer = hf.AutoTokenizer.from_pretrained(tokenizer_folder, local_files_only=True)
    three = config.model_type == "qwen3_vl"
    if three:
        settings |= {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
    videos = hf.Qwen3VLVideoProcessor if three else hf.Qwen2VLVideoProcessor
    processor = getattr(hf, _PROCESSORS[config.model_type])(
        image_processor=hf.Qwen2VLImageProcessor(**settings),
        video_processor=videos(**settings),
        tokenizer=tokenizer,
        chat_template=tokenizer.chat_template,
    )
    processor.save_pretrained(folder)
