"""What a model's config.json alone says of how its sequences can be computed; the probe at load has the last word."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

# kinds of layers that carry a state from token to token, as `layer_types` names them
STATEFUL_LAYERS = ("linear_attention", "conv", "mamba", "mamba2", "recurrent", "hybrid", "hybrid_mamba")
# architectures that have such layers whatever their config.json says
STATEFUL_MODELS = (
    "bamba", "falcon_h1", "falcon_mamba", "jamba", "kimi_linear", "lfm2", "lfm2_moe", "mamba", "mamba2", "olmo_hybrid",
    "qwen3_next", "recurrent_gemma", "rwkv", "xlstm", "zamba", "zamba2",
)  # fmt: skip
BY_LENGTH = ("dynamic", "longrope", "su")  # rope types whose frequencies depend on how long a row is


def layout_notes(config: Mapping[str, Any], longest: int) -> list[str]:
    """Notes on a stage whose longest sequence has `longest` tokens: what will make it slower than packed trees are."""
    text: Mapping[str, Any] = config.get("text_config") or config
    notes = []
    kind = str(text.get("model_type") or config.get("model_type"))
    listed = text.get("layer_types") or text.get("layers_block_type") or text.get("block_types") or ()
    layers = sorted({str(one) for one in listed} & set(STATEFUL_LAYERS))
    if layers or kind in STATEFUL_MODELS:
        which = f"layers of kind {', '.join(layers)}" if layers else f"layers of {kind}"
        notes.append(f"note: {which} carry a state: each sequence gets a row of its own, shared prompts are repeated")
    for rope_type, limit in _by_length(text):
        if longest > limit:
            notes.append(
                f"note: beyond {limit} tokens rotary frequencies of rope type {rope_type} depend on the row's length; "
                f"a batch with so long a sequence (the longest has up to {longest}) is computed one sequence at a time"
            )
    return notes


def _by_length(text: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """(rope type, tokens from which on the length matters) of each such setting."""
    given = text.get("rope_parameters") or text.get("rope_scaling") or {}
    nested = [one for one in given.values() if isinstance(one, Mapping)]
    for rope in [given, *nested]:
        rope_type = str(rope.get("rope_type") or rope.get("type"))
        limit = rope.get("original_max_position_embeddings") or text.get("original_max_position_embeddings")
        limit = limit or text.get("max_position_embeddings")
        if rope_type in BY_LENGTH and isinstance(limit, int):
            yield rope_type, limit
