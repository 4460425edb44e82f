"""Tiny vision-language models of eight families on disk: random weights, a tokenizer that knows the family's marks, and
the family's own processor. Heads of 32 in the text model: the smallest that vLLM's CPU attention takes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

Settings = dict[str, Any]

TEXT = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 1024,
    "bos_token_id": None,
}
QWEN_MARKS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
IDEFICS_MARKS = (
    "<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>",
    *(f"<row_{i}_col_{j}>" for i in range(1, 7) for j in range(1, 7)),
)  # fmt: skip
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}{% generation %}{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}{% else %}@@{% endif %}{% endfor %}{% endif %}"
    "<|im_end|>{% endgeneration %}\n"
    "{% else %}{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}"
    "{% if p.type == 'text' %}{{ p.text }}{% else %}@@{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_tiny_vlm(folder: Path, family: str, *, seed: int = 0, **changes: Any) -> Path:
    """Write model, tokenizer, processor and chat template of `family` (a key of FAMILIES).

    changes: of the text config. Images of any size up to about 112 x 112 are small in all of them.
    """
    from transformers import AutoConfig, AutoModelForImageTextToText
    from transformers.utils import logging

    logging.set_verbosity_error()
    folder.mkdir(parents=True, exist_ok=True)
    marks, image_mark, make_config, make_processor = FAMILIES[family]
    tokenizer = _write_tokenizer(folder, family, marks, image_mark)
    ids = {mark: tokenizer.convert_tokens_to_ids(mark) for mark in marks}
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    text = {**TEXT, "vocab_size": len(tokenizer), **ends, **changes}
    config = AutoConfig.for_model(family, **make_config(text, ids))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(folder)
    if family in SIGLIP:
        _rename_as_published(folder / "model.safetensors")
    make_processor(tokenizer).save_pretrained(folder)
    return folder


SIGLIP = ("llava_onevision", "gemma3")


def _rename_as_published(file: Path) -> None:
    """Published checkpoints have a level in their tower that transformers' model has not; it writes it again when it
    has read it, and vLLM knows no other names."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(file)
    save_file(
        {k.replace("vision_tower.", "vision_tower.vision_model."): v for k, v in tensors.items()},
        file,
        {"format": "pt"},
    )


def _write_tokenizer(folder: Path, family: str, marks: tuple[str, ...], image_mark: str) -> Any:
    from tokenizers import AddedToken, Tokenizer
    from transformers import AutoTokenizer

    from tests.conftest import write_tokenizer

    write_tokenizer(folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    if family == "gemma3":  # its tokenizer has runs of newlines, and vLLM looks for them
        tokenizer.add_tokens([AddedToken("\n" * n, normalized=False) for n in (1, 2, 3, 4)])
    tokenizer.add_special_tokens([AddedToken(mark, special=True, normalized=False) for mark in marks])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(TEMPLATE.replace("@@", image_mark), encoding="utf-8")
    names = NAMED_MARKS.get(family)
    if names:
        file = folder / "tokenizer_config.json"
        settings = json.loads(file.read_text(encoding="utf-8"))
        settings["extra_special_tokens"] = names
        file.write_text(json.dumps(settings, indent=2), encoding="utf-8")
    return AutoTokenizer.from_pretrained(folder)


NAMED_MARKS = {
    "internvl": {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    },
    "gemma3": {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"},
}


# ------------------------------------------------------------------------------------------------- Qwen


def _qwen(text: Settings, vision: Settings, ids: dict[str, int], **rope: Any) -> Settings:
    names = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id")
    marks = {name: ids[mark] for name, mark in zip(names, QWEN_MARKS, strict=True)}
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6], **rope}
    return {"text_config": {**text, "rope_parameters": rope}, "vision_config": vision, **marks}


def _qwen2_vl(text: Settings, ids: dict[str, int]) -> Settings:
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": text["hidden_size"], "num_heads": 2, "mlp_ratio": 2}
    return _qwen(text, vision, ids)


def _qwen2_5_vl(text: Settings, ids: dict[str, int]) -> Settings:
    vision = {
        "depth": 2, "hidden_size": 32, "out_hidden_size": text["hidden_size"], "num_heads": 2, "intermediate_size": 48,
        "window_size": 56, "fullatt_block_indexes": [1],
    }  # fmt: skip
    return _qwen(text, vision, ids)


def _qwen3_vl(text: Settings, ids: dict[str, int]) -> Settings:
    vision = {
        "depth": 2, "hidden_size": 32, "out_hidden_size": text["hidden_size"], "num_heads": 2, "intermediate_size": 48,
        "num_position_embeddings": 64, "deepstack_visual_indexes": [0],
    }  # fmt: skip
    return _qwen(text, vision, ids, mrope_interleaved=True)


def _qwen_processor(name: str, patch: int) -> Callable[[Any], Any]:
    def make(tokenizer: Any) -> Any:
        import transformers as hf

        size = {"shortest_edge": 4 * 4 * patch * patch, "longest_edge": 64 * 4 * patch * patch}
        kwargs = {"patch_size": patch, "merge_size": 2, "temporal_patch_size": 2, "size": size}
        three = name == "Qwen3VLProcessor"
        video = hf.Qwen3VLVideoProcessor if three else hf.Qwen2VLVideoProcessor
        return getattr(hf, name)(
            image_processor=hf.Qwen2VLImageProcessor(**kwargs),
            tokenizer=tokenizer,
            video_processor=video(**kwargs),
            chat_template=tokenizer.chat_template,
        )

    return make


# ------------------------------------------------------------------------------------------------- towers of one size

VISION = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 14,
}  # fmt: skip


def _internvl(text: Settings, ids: dict[str, int]) -> Settings:
    vision = {**VISION, "image_size": [56, 56], "patch_size": [14, 14]}
    return {
        "text_config": {"model_type": "qwen2", **text}, "vision_config": vision, "image_token_id": ids["<IMG_CONTEXT>"],
        "image_seq_length": 4, "tie_word_embeddings": False,
    }  # fmt: skip


def _internvl_processor(tokenizer: Any) -> Any:
    import transformers as hf

    size = {"height": 56, "width": 56}
    images = hf.GotOcr2ImageProcessor(size=size, crop_to_patches=True, min_patches=1, max_patches=3)
    return hf.InternVLProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        video_processor=hf.InternVLVideoProcessor(size=size),
        image_seq_length=4,
        chat_template=tokenizer.chat_template,
    )


PINPOINTS = [[56, 112], [112, 56], [112, 112]]


def _llava_onevision(text: Settings, ids: dict[str, int]) -> Settings:
    vision = {"model_type": "siglip_vision_model", **VISION, "image_size": 56, "vision_use_head": False}
    return {
        "text_config": {"model_type": "qwen2", **text}, "vision_config": vision, "image_token_id": ids["<image>"],
        "video_token_id": ids["<video>"], "image_grid_pinpoints": PINPOINTS, "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
    }  # fmt: skip


def _llava_onevision_processor(tokenizer: Any) -> Any:
    import transformers as hf

    size = {"height": 56, "width": 56}
    return hf.LlavaOnevisionProcessor(
        image_processor=hf.LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=PINPOINTS),
        tokenizer=tokenizer,
        video_processor=hf.LlavaOnevisionVideoProcessor(size=size),
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        chat_template=tokenizer.chat_template,
    )


def _gemma3(text: Settings, ids: dict[str, int]) -> Settings:
    vision = {"model_type": "siglip_vision_model", **VISION, "image_size": 56, "vision_use_head": False}
    text = {
        **text, "query_pre_attn_scalar": 24, "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention"],
    }  # fmt: skip
    return {
        "text_config": text, "vision_config": vision, "mm_tokens_per_image": 4,
        "boi_token_index": ids["<start_of_image>"], "eoi_token_index": ids["<end_of_image>"],
        "image_token_index": ids["<image_soft_token>"],
    }  # fmt: skip


def _gemma3_processor(tokenizer: Any) -> Any:
    import transformers as hf

    images = hf.Gemma3ImageProcessor(size={"height": 56, "width": 56})
    template = tokenizer.chat_template
    return hf.Gemma3Processor(image_processor=images, tokenizer=tokenizer, image_seq_length=4, chat_template=template)


def _idefics3(text: Settings, ids: dict[str, int]) -> Settings:
    vision = {**VISION, "image_size": 56}
    text = {"model_type": "llama", **text}
    return {"text_config": text, "vision_config": vision, "image_token_id": ids["<image>"], "scale_factor": 2}


def _idefics3_processor(name: str) -> Callable[[Any], Any]:
    def make(tokenizer: Any) -> Any:
        import transformers as hf

        sizes = {"size": {"longest_edge": 112}, "max_image_size": {"longest_edge": 56}}
        video = {"video_processor": hf.SmolVLMVideoProcessor(**sizes)} if name == "SmolVLM" else {}
        return getattr(hf, f"{name}Processor")(
            image_processor=getattr(hf, f"{name}ImageProcessor")(**sizes),
            tokenizer=tokenizer,
            image_seq_len=4,
            chat_template=tokenizer.chat_template,
            **video,
        )

    return make


_QWEN_IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
# marks of the tokenizer, what a template writes for an image, the config, the processor
FAMILIES: dict[str, tuple[tuple[str, ...], str, Callable[..., Settings], Callable[[Any], Any]]] = {
    "qwen2_vl": (QWEN_MARKS, _QWEN_IMAGE, _qwen2_vl, _qwen_processor("Qwen2VLProcessor", 14)),
    "qwen2_5_vl": (QWEN_MARKS, _QWEN_IMAGE, _qwen2_5_vl, _qwen_processor("Qwen2_5_VLProcessor", 14)),
    "qwen3_vl": (QWEN_MARKS, _QWEN_IMAGE, _qwen3_vl, _qwen_processor("Qwen3VLProcessor", 16)),
    "internvl": (("<img>", "</img>", "<IMG_CONTEXT>", "<video>"), "<IMG_CONTEXT>", _internvl, _internvl_processor),
    "llava_onevision": (("<image>", "<video>"), "<image>", _llava_onevision, _llava_onevision_processor),
    "gemma3": (
        ("<start_of_image>", "<end_of_image>", "<image_soft_token>"), "<start_of_image>", _gemma3, _gemma3_processor,
    ),
    "idefics3": (IDEFICS_MARKS, "<image>", _idefics3, _idefics3_processor("Idefics3")),
    "smolvlm": (IDEFICS_MARKS, "<image>", _idefics3, _idefics3_processor("SmolVLM")),
}  # fmt: skip
