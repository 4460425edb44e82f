"""What a model's forward takes for a batch of prompts, with or without media, padded on the left."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from align.errors import Unsupported
from align.model.backbone import takes_media
from align.model.media.features import MediaFeatures, Placed
from align.model.media.placeholders import MRope, slots_of, type_ids
from align.protocols.trees import Medium, Segment, Tree

Prompt = tuple[np.ndarray, Sequence[Medium]]
"""Token ids i64[n] with all tokens of the media, and the media."""


class PromptInputs(NamedTuple):
    """mask i64[B, L]: 1 where a token stands, prompts end in the last column. next_position i64[B]: of the token
    that follows each prompt. tensors: the forward's arguments, `attention_mask` and `position_ids` among them."""

    mask: Tensor
    next_position: Tensor
    tensors: dict[str, Any]


def prompt_inputs(model: Any, prompts: Sequence[Prompt], device: str) -> PromptInputs:
    """Arguments for the whole model (with its head). Features of media are computed here, by the model as it is now.

    Raises:
        Unsupported: there are media, and the model takes none. DataError: the media store has lost a file.
    """
    ids, mask = _left_padded([tokens for tokens, _ in prompts])
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    if any(media for _, media in prompts):
        if not takes_media(model):
            raise Unsupported(
                f"{type(model).__name__} takes no images",
                where="model.path",
                remedy="choose a vision-language model, or leave these rows out",
            )
        extra = _media_inputs(model, prompts, ids.shape[1], device)
        if hasattr(model.base_model, "get_rope_index"):
            positions = _rope_positions(model, prompts, ids.shape[1])
    else:
        extra = {}
    ahead = positions.amax(-1) + 1
    tensors = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    moved = {name: tensor.to(device) for name, tensor in tensors.items()}
    return PromptInputs(
        moved["attention_mask"], (ahead.amax(0) if ahead.dim() > 1 else ahead).to(device), moved | extra
    )


def _media_inputs(model: Any, prompts: Sequence[Prompt], longest: int, device: str) -> dict[str, Any]:
    """Features of the media in the order of their tokens, and the types of all tokens where the model asks for them."""
    types = torch.zeros(len(prompts), longest, dtype=torch.int64)
    placed: list[Placed] = []
    for row, (tokens, media) in enumerate(prompts):
        at = [medium.start for medium in media]
        own = type_ids(model.config, tokens, media, at)
        types[row, longest - len(tokens) :] = torch.from_numpy(own)
        placed += [Placed(medium, slots) for medium, slots in zip(media, slots_of(own, media, at), strict=True)]
    known = inspect.signature(model.forward).parameters
    named = {name: types.to(device) for name in ("token_type_ids", "mm_token_type_ids") if name in known}
    features = MediaFeatures(model, 0)  # nothing is kept: the next version may have another tower
    return named | {"mm_encoder_outputs": features.outputs(placed, torch.device(device))}


def _rope_positions(model: Any, prompts: Sequence[Prompt], longest: int) -> Tensor:
    """i64[3, B, L], 0 where nothing stands."""
    place = MRope(model)
    positions = torch.zeros(3, len(prompts), longest, dtype=torch.int64)
    for row, (tokens, media) in enumerate(prompts):
        trunk, _ = place(Tree(row, Segment(tokens, np.zeros(len(tokens), dtype=bool), media=tuple(media))))
        positions[:, row, longest - len(tokens) :] = torch.from_numpy(trunk)
    return positions


def _left_padded(prompts: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask i64[B, L]; every prompt ends in the last column."""
    longest = max(len(ids) for ids in prompts)
    ids, mask = torch.zeros(len(prompts), longest, dtype=torch.int64), torch.zeros(len(prompts), longest).long()
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.as_tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    return ids, mask
