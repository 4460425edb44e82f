"""Marks of media that were sampled: a policy may write an image's token as it may write any other.

For an engine such a token is a word. transformers' forward takes every token with a mark's id for a place of a feature,
and finds more places than features. So the forward is given another id in its place, one that the row does not have,
and the embedding gives the mark's own vector for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from align.model.media.placeholders import TYPES, placeholder


def mark_ids(config: Any) -> list[int]:
    """The tokens that stand for media, as the configuration names them; none for a model of text."""
    found = set()
    for kind in TYPES:
        try:
            found.add(placeholder(config, kind))
        except AttributeError:
            continue
    return sorted(found)


@contextmanager
def words_for_marks(model: Any, token_ids: Tensor, in_media: Tensor, unlike: Sequence[int] = ()) -> Iterator[Tensor]:
    """The token ids to compute with inside the context, where marks outside media are words.

    Args:
        token_ids: i64[...]; in_media: bool[...], True for every token of a medium. unlike: further ids that stand in
            what is computed (padding).
    """
    marks = mark_ids(model.config)
    stray = torch.isin(token_ids, torch.tensor(marks, device=token_ids.device)) & ~in_media
    if not bool(stray.any()):
        yield token_ids
        return
    embedding = model.get_input_embeddings()
    taken = set(token_ids.unique().tolist()) | set(marks) | set(unlike)
    free = (n for n in range(embedding.num_embeddings) if n not in taken)
    words = {mark: next(free) for mark in marks}
    changed = token_ids
    for mark, word in words.items():
        changed = torch.where(stray & (token_ids == mark), word, changed)

    def own_vector(module: Any, given: tuple[Tensor, ...], output: Tensor) -> Tensor:
        [ids] = given
        meant = ids
        for mark, word in words.items():
            meant = torch.where(ids == word, mark, meant)
        return output if torch.equal(meant, ids) else module.forward(meant)  # not a call: hooks have run

    # first of its hooks: those of a strategy that spreads weights put them away
    handle = embedding.register_forward_hook(own_vector, prepend=True)
    try:
        yield changed
    finally:
        handle.remove()
