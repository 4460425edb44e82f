"""Prompts with media for vLLM: the trainer's tokens, and beside them what vLLM's own processor makes of each medium.

vLLM usually expands a placeholder by itself. Here the prompt's tokens are the trainer's and stay as they are: they hold
every token of every medium. vLLM's processor is given the same picture (the view in the media store, which it need not
resize again) and says which tokens it would put there; they must be those that stand there. So the two sides cannot
disagree about a prompt without an error that says so, in any family, whatever its marks look like.

The key of a medium is its name in vLLM's caches: of processed media, of the tower's outputs, and (through the blocks'
hashes) of prefixes. Equal text with another picture shares nothing beyond the picture's first token.
"""

from __future__ import annotations

import json
import wave
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from align.errors import EngineError, Unsupported
from align.mediastore import pixel_bounds, processor_files, read_frames, view_path
from align.protocols.trees import Medium

PROBE_PIXELS = 56  # a side of the picture that probes; processors make it as large as they need

FRAMES_PER_SECOND = 2.0
"""Of a video, where its frames carry no times of their own: what processors assume of sampled frames."""


def media_prompt(llm: Any, token_ids: np.ndarray, media: Sequence[Medium]) -> Any:
    """vLLM's input for a prompt that holds media.

    Args:
        token_ids: i64[n], with all tokens of the media. media: in order of `start`.

    Raises:
        EngineError: a view is missing, or vLLM makes other tokens of a medium than stand in the prompt.
        Unsupported: the model takes no media of a kind in this vLLM, or fewer of them in one prompt.
    """
    by_kind: dict[str, list[Medium]] = {}
    for medium in media:
        by_kind.setdefault(medium.kind, []).append(medium)
    _check_limits(llm.llm_engine.renderer, {kind: len(some) for kind, some in by_kind.items()})
    data = {kind: [_opened(medium) for medium in some] for kind, some in by_kind.items()}
    made = _processed(llm, data, {kind: [medium.key for medium in some] for kind, some in by_kind.items()})
    ranges: dict[str, list[Any]] = {}
    try:
        for kind, some in by_kind.items():
            placed = zip(some, made.prompt_updates[kind], strict=True)
            ranges[kind] = [_placed(medium, token_ids, updates) for medium, updates in placed]
        for medium, item in zip(by_kind.get("video", ()), made.kwargs.get("video", ()), strict=True):
            if item is not None:  # None: vLLM knows it from before
                check_extent(llm.model_config.hf_config, item.get_data(), medium)
    except (EngineError, Unsupported):
        llm.reset_mm_cache()  # the two halves of vLLM's cache must agree on what was sent
        raise
    return _input(token_ids.tolist(), made, ranges)


def picture_prompt(llm: Any, around: np.ndarray) -> Any:
    """vLLM's input for a made-up picture in the middle of the tokens `around` i64[n].

    Raises:
        Unsupported: the model takes no pictures in this vLLM.
    """
    from PIL import Image
    from vllm.multimodal.inputs import PlaceholderRange

    _check_limits(llm.llm_engine.renderer, {"image": 1})
    values = np.random.default_rng(0).integers(0, 256, (PROBE_PIXELS, PROBE_PIXELS, 3), dtype=np.uint8)
    made = _processed(llm, {"image": [Image.fromarray(values)]}, {"image": [f"made up, {PROBE_PIXELS}"]})
    content = made.prompt_updates["image"][0][0].content
    half = len(around) // 2
    mask = None if content.is_embed is None else content.is_embed(content.full)
    tokens = [*around[:half].tolist(), *content.full, *around[half:].tolist()]
    return _input(tokens, made, {"image": [PlaceholderRange(half, len(content.full), is_embed=mask)]})


def _processed(llm: Any, data: Mapping[str, Sequence[Any]], keys: Mapping[str, Sequence[str]]) -> Any:
    """What the model's processor in vLLM makes of media: tensors, hashes, and the tokens it would write for each."""
    from vllm.multimodal.processing.context import TimingContext
    from vllm.multimodal.processing.inputs import ProcessorInputs

    renderer = llm.llm_engine.renderer
    processor = renderer.get_mm_processor()
    inputs = ProcessorInputs(
        prompt=[],
        mm_data_items=processor.info.parse_mm_data(data),
        mm_uuid_items=keys,
        cache=renderer.mm_processor_cache,
    )
    return processor._cached_apply_hf_processor(inputs, TimingContext(enabled=False))


def _input(tokens: list[int], made: Any, ranges: Mapping[str, Sequence[Any]]) -> Any:
    from vllm.inputs.engine import mm_input

    return mm_input(tokens, made.kwargs, made.hashes, ranges)


def pixel_arguments(folder: Path, pixels: Mapping[str, int]) -> dict[str, Any]:
    """Arguments by which a processor that itself counts pixels (Qwen's, which joins patches) has the recipe's limits in
    place of its own; {} for any other, which would not know them."""
    for file in processor_files(folder):
        config = json.loads(file.read_text(encoding="utf-8"))
        config = config.get("image_processor") or config
        size = config.get("size") or {}
        lowest = size.get("shortest_edge", config.get("min_pixels"))
        highest = size.get("longest_edge", config.get("max_pixels"))
        if "merge_size" not in config or lowest is None or highest is None:
            continue
        least, most = pixel_bounds(lowest, highest, pixels.get("min_pixels"), pixels.get("max_pixels"))
        return {"images_kwargs": {"size": {"shortest_edge": least, "longest_edge": most}}}
    return {}


def _check_limits(renderer: Any, counts: Mapping[str, int]) -> None:
    """Raise Unsupported for media that the model cannot take, or not so many."""
    processor = renderer.mm_processor
    allowed = {} if processor is None else processor.info.allowed_mm_limits
    for kind, count in counts.items():
        if not allowed.get(kind):
            raise Unsupported(
                f"this model takes no {kind} in vLLM",
                where="rollout.name",
                remedy="set rollout.name=transformers, or leave these rows out",
            )
        if count > allowed[kind]:
            raise Unsupported(
                f"a prompt has {count} media of kind {kind}, the engine was started for {allowed[kind]}",
                where="rollout.engine.limit_mm_per_prompt",
                remedy="leave rollout.engine.limit_mm_per_prompt out, or raise it",
            )


def _opened(medium: Medium) -> Any:
    """What vLLM takes of a view: an RGB image, frames with what is known of their times, or samples with their rate."""
    path = view_path(medium)
    try:
        if medium.kind == "image":
            from PIL import Image

            with Image.open(path) as image:
                return image.convert("RGB")
        if medium.kind == "video":
            return read_frames(medium), _frame_times(path)
        with wave.open(str(path)) as sound:
            samples = np.frombuffer(sound.readframes(sound.getnframes()), np.int16).astype(np.float32) / 2**15
            return samples.reshape(-1, sound.getnchannels()).mean(axis=1), float(sound.getframerate())
    except (OSError, ValueError, wave.Error) as error:
        raise EngineError(
            f"the view of a medium cannot be read: {error}",
            where=path,
            remedy="start again: the check writes the store anew (on a cluster the folder must be shared)",
        ) from error


def _frame_times(path: Path) -> dict[str, Any]:
    """Which frames of its file a video's are (`align.mediastore`), and that none of them is to be left out."""
    from safetensors import safe_open

    with safe_open(path, framework="np") as header:
        known = json.loads((header.metadata() or {}).get("video", "{}"))
        count = header.get_slice("frames").get_shape()[0]
    whole = {
        "fps": FRAMES_PER_SECOND,
        "duration": count / FRAMES_PER_SECOND,
        "total_num_frames": count,
        "frames_indices": list(range(count)),
    }
    return {**whole, **known, "video_backend": "align", "do_sample_frames": False}


ENDLESS = ("qwen2_vl", "qwen2_5_vl")


def check_extent(config: Any, data: Mapping[str, Any], medium: Medium) -> None:
    """Raise Unsupported for a video after which vLLM counts positions otherwise than transformers.

    In Qwen2-VL and Qwen2.5-VL text goes on behind the largest position of a video. For transformers (5.19) that is of
    its height and width; vLLM takes its time into account, which only matters where a video is longer than it is large.
    """
    if config.model_type not in ENDLESS:
        return
    frames, height, width = (int(n) for n in data["video_grid_thw"].flatten().tolist())
    interval = float(data.get("second_per_grid_ts", 1.0)) * getattr(config.vision_config, "tokens_per_second", 1.0)
    sides = max(height, width) // config.vision_config.spatial_merge_size
    last = int((frames - 1) * interval)
    if last >= sides:
        raise Unsupported(
            f"a video takes {last + 1} positions in time and {sides} in space; vLLM counts the text behind it from the "
            "larger number, transformers from the second",
            where=view_path(medium),
            remedy="lower media.video_frames, raise media.min_pixels, or set rollout.name=transformers",
        )


def _placed(medium: Medium, token_ids: np.ndarray, updates: Sequence[Any]) -> Any:
    """Where what vLLM would write for this medium stands in the prompt, and which of it the tower's outputs replace.

    updates: vLLM's alternatives for this medium (they differ in what they replace, seldom in what they write). Marks at
    either end may have merged with the text around (newlines, in Gemma 3), so what is compared is what lies between
    the first and the last token that is replaced. The range is vLLM's own, marks included or not as it has them: some
    models count their positions from it.
    """
    import torch
    from vllm.multimodal.inputs import PlaceholderRange

    own = torch.from_numpy(token_ids[medium.start : medium.start + medium.length])
    sizes = set()
    for update in updates:
        full, chosen = torch.tensor(update.content.full), update.content.is_embed
        mask = torch.ones_like(full, dtype=torch.bool) if chosen is None else chosen(update.content.full)
        (first, core), (own_first, own_core) = _core(full, mask), _core(own, torch.isin(own, full[mask]))
        if torch.equal(core, own_core):
            offset = medium.start + own_first - first
            return PlaceholderRange(offset, len(full), is_embed=None if chosen is None else mask)
        sizes.add(len(full))
    raise EngineError(
        f"vLLM makes {' or '.join(str(n) for n in sorted(sizes))} tokens of a medium of kind {medium.kind} for "
        f"which the prompt has {medium.length} tokens, or other ones",
        where=view_path(medium),
        remedy="its processor must neither resize nor tile the picture in another way: check media.max_pixels, "
        "media.min_pixels and rollout.engine.mm_processor_kwargs, or set rollout.name=transformers",
    )


def _core(tokens: Any, mask: Any) -> tuple[int, Any]:
    """What lies between the first and the last token of the mask, and where it begins."""
    places = mask.nonzero()[:, 0].tolist()
    return (places[0], tokens[places[0] : places[-1] + 1]) if places else (0, tokens[:0])
