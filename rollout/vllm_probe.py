"""Does a vLLM engine compute with the adapters it holds? Holding and applying are two things: a digest proves that
one, this proves the other, once per engine.

An adapter of the published one's shape with large random weights must move log-probabilities; where the published one
has weights outside the language model, those alone must move them too, of a prompt with a picture. Move means: ten
times as far as one whose weights are all 0 does, which is the engine's own noise (its kernels need not give the same
with an adapter as without), and further than a least figure for each dtype. On SmolLM2-135M-Instruct in bfloat16 the
large weights move log-probabilities by 17 nats, those of the last layer alone by 25, zeros by 0.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from align.errors import EngineError
from rollout.vllm import made_prompt
from rollout.vllm_files import write_probe_adapter
from rollout.vllm_media import picture_prompt

TOKENS = 16
TIMES_NOISE = 10.0


def spread_tokens(llm: Any, length: int) -> np.ndarray:
    """i64[length]: ids from all over the vocabulary."""
    return np.linspace(0, llm.model_config.get_vocab_size() - 1, length).astype(np.int64)


def probe_prompt(llm: Any, *, with_picture: bool) -> Any:
    """vLLM's input for a prompt to probe with.

    Raises:
        EngineError: its picture has more tokens than the engine takes. Unsupported: the engine takes no pictures.
    """
    longest = llm.model_config.max_model_len
    around = spread_tokens(llm, min(TOKENS, longest - 1))
    prompt = picture_prompt(llm, around) if with_picture else made_prompt(llm, around, ())
    length = len(prompt["prompt_token_ids"])
    if length >= longest:
        raise EngineError(
            f"the prompt that probes adapters has {length} tokens, those of a picture among them, and the engine was "
            f"started for {longest}",
            remedy="raise rollout.max_model_len",
        )
    return prompt


def require_applied(
    prompt: Any,
    like: Path,
    shapes: Mapping[str, tuple[int, ...]],
    tower: Collection[str],
    load: Callable[[Path], Any],
    unload: Callable[[Any], Any],
    logps: Callable[[Any, Any], np.ndarray],
    least: float,
) -> None:
    """Raise EngineError unless random weights move log-probabilities of the prompt, part by part.

    Args:
        like: folder of the published adapter; shapes: its tensors; tower: those outside the language model.
        load, unload: put an adapter's folder into the engine, and take it out. logps: f32[n] of (prompt, adapter or
            None). least: by how much they must move, in nats.
    """
    base = logps(prompt, None)
    if not np.isfinite(base).all():
        raise EngineError(
            "the engine computes log-probabilities that are not finite, without any adapter",
            remedy="choose rollout.dtype=float32 or bfloat16, or another model",
        )

    def moved(silent: Collection[str]) -> float:
        with tempfile.TemporaryDirectory(prefix=".probe-", dir=like) as folder:  # lives no longer than the version does
            write_probe_adapter(Path(folder), like, shapes, silent)
            adapter = load(Path(folder))
            try:
                found = logps(prompt, adapter)
            finally:
                unload(adapter)
        # weights so large may overflow: the adapter was applied for certain then
        return float(np.abs(found - base).max()) if np.isfinite(found).all() else np.inf

    noise = moved(shapes.keys())
    for part, silent in (("language model", set(tower)), ("tower of images", shapes.keys() - tower)):
        if len(silent) == len(shapes):
            continue
        far = moved(silent)
        if not far > max(least, TIMES_NOISE * noise):
            raise EngineError(
                f"adapter not applied: one with large random weights on the {part} moved log-probabilities by "
                f"{far:.1e} only (one whose weights are 0: {noise:.1e})",
                remedy="this model's layers take no adapter in this vLLM; set rollout.weights=merged",
            )
