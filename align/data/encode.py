"""Text of records (`align.data.render`) to token ids and masks.

Each piece is tokenised on its own and the ids are concatenated, so that a prompt's ids are what an engine is given and
the completion's ids could have been sampled after them; a merge across the boundary cannot happen. (Where a tokenizer
marks the start of its input with a space, a piece cannot be tokenised alone: then the whole is, and each beginning must
be its prefix.)

Plain text is prompt + completion + EOS, with the BOS that the tokenizer adds, once. A medium's placeholder becomes all
of its own tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import numpy as np

from align.data.encoded import Encoded, Tokens
from align.data.media.shown import Shown
from align.data.records import RowError
from align.data.render import Draft, Piece
from align.data.tokenizer import ChatTokenizer
from align.errors import ModelError


def encode(drafts: Sequence[Draft], tokenizer: ChatTokenizer) -> list[Encoded | RowError]:
    """Token ids of many drafts, in one call of the tokenizer. A row that cannot be encoded is its RowError."""
    if tokenizer.marks_start:
        return _encode_whole(drafts, tokenizer)
    texts = [p.text for d in drafts for pieces in (d.trunk, *d.branches) for p in pieces]
    ids = iter(tokenizer.encode_batch(texts))
    out: list[Encoded | RowError] = []
    for d in drafts:
        segments = [[(next(ids), p.scored) for p in pieces] for pieces in (d.trunk, *d.branches)]
        out.append(_assemble(d, segments, tokenizer))
    return out


def _assemble(d: Draft, segments: list[list[tuple[list[int], bool]]], tokenizer: ChatTokenizer) -> Encoded | RowError:
    if d.plain:
        try:
            _add_bos_eos(segments, tokenizer)
        except RowError as e:
            return e
    try:
        trunk, *branches = _with_media([_tokens(s) for s in segments], d.media, tokenizer)
    except RowError as e:
        return e
    if len(trunk):
        trunk.mask[0] = False  # nothing predicts a sequence's first token
    elif branches:
        return RowError("the prompt has no tokens, and the tokenizer adds no BOS: nothing predicts the completion")
    return Encoded(trunk, branches)


def _add_bos_eos(segments: list[list[tuple[list[int], bool]]], tokenizer: ChatTokenizer) -> None:
    """BOS before the prompt where the tokenizer adds one, EOS behind each completion; neither twice."""
    prefix = list(tokenizer.text_prefix)
    first = next((ids for ids, _ in segments[0] if ids), [])  # of a `text` that a template wrote, in its scored part
    if prefix and first[: len(prefix)] != prefix:
        segments[0].insert(0, (prefix, False))
    if not any(scored for segment in segments for _, scored in segment):
        return
    if tokenizer.eos_id is None:
        raise ModelError(
            "the tokenizer names no eos_token, and plain-text completions end with one",
            where=tokenizer.folder,
            remedy="set eos_token in tokenizer_config.json",
        )
    for segment in segments[1:] or segments:
        ids, scored = segment[-1]
        if not ids:
            raise RowError("the completion has no tokens")
        if ids[-1] != tokenizer.eos_id:
            segment[-1] = ([*ids, tokenizer.eos_id], scored)


def _tokens(pieces: list[tuple[list[int], bool]]) -> Tokens:
    ids = np.array([i for part, _ in pieces for i in part], np.int64)
    mask = np.zeros(len(ids), bool)
    end = 0
    for part, scored in pieces:
        start, end = end, end + len(part)
        mask[start:end] = scored
    return Tokens(ids, mask)


def _with_media(segments: list[Tokens], media: Sequence[Sequence[Shown]], tokenizer: ChatTokenizer) -> list[Tokens]:
    """Segments with all tokens of their media in the place of the placeholders. No token of a medium is scored."""
    if not any(media):
        return segments
    return [expanded(s, shown, tokenizer) if shown else s for s, shown in zip(segments, media, strict=True)]


def expanded(tokens: Tokens, shown: Sequence[Shown], tokenizer: ChatTokenizer) -> Tokens:
    """With all tokens of each medium in the place of its placeholder. Raises RowError where there are more or fewer."""
    wanted = [tokenizer.token_id(s.placeholder) for s in shown]
    places = np.flatnonzero(np.isin(tokens.ids, wanted))
    if [int(i) for i in tokens.ids[places]] != wanted:
        raise RowError(
            f"{len(places)} placeholder tokens for {len(shown)} media: the template or a tool call writes others"
        )
    ids, mask, media = list[np.ndarray](), list[np.ndarray](), []
    last, length = 0, 0
    for place, medium in zip(places, shown, strict=True):
        ids += [tokens.ids[last:place], medium.token_ids]
        mask += [tokens.mask[last:place], np.zeros(len(medium.token_ids), bool)]
        media.append(medium.medium(length + int(place) - last))
        length += int(place) - last + len(medium.token_ids)
        last = int(place) + 1
    return Tokens(np.concatenate([*ids, tokens.ids[last:]]), np.concatenate([*mask, tokens.mask[last:]]), tuple(media))


def _encode_whole(drafts: Sequence[Draft], tokenizer: ChatTokenizer) -> list[Encoded | RowError]:
    """For tokenizers that mark the start of their input: every beginning must be a token prefix of the next."""
    texts = [text for d in drafts for beginnings in _beginnings(d) for text in beginnings]
    ids = iter(tokenizer.encode_batch(texts))
    out: list[Encoded | RowError] = []
    for d in drafts:
        encoded = [[next(ids) for _ in beginnings] for beginnings in _beginnings(d)]
        try:
            segments, head = [], list[int]()
            for pieces, wholes in zip((d.trunk, *d.branches), encoded, strict=True):
                segments.append(_differences(pieces, head, wholes, tokenizer))
                head = encoded[0][-1]
            out.append(_assemble(d, segments, tokenizer))
        except RowError as e:
            out.append(e)
    return out


def _beginnings(d: Draft) -> list[list[str]]:
    """Per segment, the text from the record's start up to the end of each piece."""
    trunk = list(accumulate(p.text for p in d.trunk))
    return [trunk, *([trunk[-1] + text for text in accumulate(p.text for p in b)] for b in d.branches)]


def _differences(
    pieces: Sequence[Piece], head: list[int], wholes: list[list[int]], tokenizer: ChatTokenizer
) -> list[tuple[list[int], bool]]:
    parts = []
    for piece, whole in zip(pieces, wholes, strict=True):
        if whole[: len(head)] != head:
            n = next((i for i, (x, y) in enumerate(zip(head, whole, strict=False)) if x != y), len(whole))
            after = tokenizer.token(whole[n]) if n < len(whole) else "nothing"
            raise RowError(
                f"token {n}, {tokenizer.token(head[n])}, becomes {after} when the completion follows, so the prompt's "
                "tokens are undefined; begin or end the completion differently (a space or newline often does it)"
            )
        parts.append((whole[len(head) :], piece.scored))
        head = whole
    return parts
