"""Records to token ids and masks; the only file that knows what a chat template does to a conversation.

A record is rendered to text, and the text is cut where a scored part begins or ends. Each piece is tokenised on its
own and the ids are concatenated, so that a prompt's ids are what an engine is given and the completion's ids could
have been sampled after them; a merge across the boundary cannot happen. (Where a tokenizer marks the start of its
input with a space, a piece cannot be tokenised alone: then the whole is, and each beginning must be its prefix.)

What is scored: assistant turns only, from the header's end to the end-of-turn token inclusive; a newline that the
template writes behind that token is not. With generation markers in the template they decide; without, the render of
the messages before a turn, with generation prompt, is where the turn begins, and must be a prefix of what follows.
Of pairs and of rows with a separate prompt, assistant turns in the prompt are context and not scored.

Plain text takes no template: prompt + completion + EOS, with the BOS that the tokenizer adds, once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import numpy as np

from align.data.records import Conversation, Labelled, Message, Pair, Prompt, Record, RowError, Text, Unpaired
from align.data.template import Span
from align.data.templates import NAMED
from align.data.tokenizer import ChatTokenizer
from align.errors import ModelError

_TEMPLATE_REMEDY = (
    "name a training template with generation markers by `model.chat_template` "
    f"(a file, or one of ours: {', '.join(sorted(NAMED))})"
)


@dataclass(frozen=True, slots=True)
class Piece:
    """Text that is tokenised alone; scored or not."""

    text: str
    scored: bool


@dataclass(frozen=True, slots=True)
class Draft:
    """A record as text. plain: no template wrote it, so BOS is added before the trunk and EOS behind completions."""

    trunk: tuple[Piece, ...]
    branches: tuple[tuple[Piece, ...], ...] = ()
    plain: bool = False


@dataclass(slots=True)
class Tokens:
    """ids i64[n], mask bool[n] (scored) of one segment."""

    ids: np.ndarray
    mask: np.ndarray

    def __len__(self) -> int:
        return int(self.ids.shape[0])


@dataclass(slots=True)
class Encoded:
    """A record as token ids: its trunk and its branches."""

    trunk: Tokens
    branches: list[Tokens] = field(default_factory=list)

    @property
    def length(self) -> int:
        """Tokens of the longest sequence."""
        return len(self.trunk) + max((len(b) for b in self.branches), default=0)

    @property
    def scored(self) -> int:
        return int(self.trunk.mask.sum() + sum(b.mask.sum() for b in self.branches))


# ------------------------------------------------------------------------------------------------- records to text


def draft(record: Record, tokenizer: ChatTokenizer) -> Draft:
    """The text of a record, cut into pieces. Raises RowError where the template does not allow it."""
    if isinstance(record, Prompt | Labelled):
        if isinstance(record.prompt, str):
            return Draft((Piece(record.prompt, False),), plain=True)
        text = tokenizer.render(_dicts(record.prompt), isinstance(record, Prompt), record.tools)
        return Draft((Piece(text, False),))
    if isinstance(record.prompt, str):
        return _plain_draft(record)
    tools = record.tools
    if isinstance(record, Conversation):
        return Draft(_conversation_pieces(tokenizer, record))
    prompt = _messages(record.prompt)
    start = tokenizer.render(_dicts(prompt), True, tools)
    completions = (record.chosen, record.rejected) if isinstance(record, Pair) else (record.completion,)
    branches = tuple(_branch_pieces(tokenizer, prompt, _messages(c), start, tools) for c in completions)
    return Draft((Piece(start, False),), branches)


def _plain_draft(record: Conversation | Pair | Unpaired) -> Draft:
    prompt = Piece(_plain(record.prompt), False)
    if isinstance(record, Conversation):
        return Draft((prompt, Piece(_plain(record.completion), True)), plain=True)
    completions = (record.chosen, record.rejected) if isinstance(record, Pair) else (record.completion,)
    return Draft((prompt,), tuple((Piece(_plain(c), True),) for c in completions), plain=True)


def _plain(text: Text) -> str:
    assert isinstance(text, str), "formats give prompt and completion alike: both text or both messages"
    return text


def _messages(text: Text) -> tuple[Message, ...]:
    assert not isinstance(text, str), "formats give prompt and completion alike: both text or both messages"
    return text


def _dicts(messages: Iterable[Message]) -> list[dict[str, Any]]:
    return [m.as_dict() for m in messages]


def _conversation_pieces(tokenizer: ChatTokenizer, record: Conversation) -> tuple[Piece, ...]:
    prompt = _messages(record.prompt)
    messages = prompt + _messages(record.completion)
    text, spans = scored_spans(tokenizer, messages, len(prompt), record.tools)
    return _cut(text, spans, 0)


def _branch_pieces(
    tokenizer: ChatTokenizer, prompt: tuple[Message, ...], completion: tuple[Message, ...], start: str, tools: Any
) -> tuple[Piece, ...]:
    text, spans = scored_spans(tokenizer, prompt + completion, len(prompt), tools)
    if not text.startswith(start):
        raise _not_a_prefix(tokenizer, start, text, "the prompt with generation prompt", "the whole conversation")
    return _cut(text, spans, len(start))


def _cut(text: str, spans: Sequence[Span], start: int) -> tuple[Piece, ...]:
    """Pieces of text[start:], cut at the spans."""
    pieces: list[Piece] = []
    for begin, end in spans:
        begin = max(begin, start)
        if begin > start:
            pieces.append(Piece(text[start:begin], False))
        if end > begin:
            pieces.append(Piece(text[begin:end], True))
            start = end
    if start < len(text):
        pieces.append(Piece(text[start:], False))
    return tuple(pieces)


def scored_spans(
    tokenizer: ChatTokenizer, messages: tuple[Message, ...], first: int, tools: Any = ()
) -> tuple[str, list[Span]]:
    """The render of `messages` and the character spans of its scored turns: assistant, from message `first` on."""
    text, marked = tokenizer.render_spans(_dicts(messages), False, tools)
    if tokenizer.require_template().has_generation:
        return text, _marked_spans(tokenizer, messages, first, marked)
    return text, _incremental_spans(tokenizer, messages, first, tools, text)


def _marked_spans(
    tokenizer: ChatTokenizer, messages: tuple[Message, ...], first: int, marked: list[Span]
) -> list[Span]:
    turns = [i for i, m in enumerate(messages) if m.role == "assistant"]
    if all(i >= first and messages[i].scored for i in turns):
        return marked
    if len(marked) != len(turns):
        raise RowError(
            f"the template marks {len(marked)} generation blocks for {len(turns)} assistant turns; "
            "it is unclear which of them are not to be scored"
        )
    return [span for i, span in zip(turns, marked, strict=True) if i >= first and messages[i].scored]


def _incremental_spans(
    tokenizer: ChatTokenizer, messages: tuple[Message, ...], first: int, tools: Any, text: str
) -> list[Span]:
    dicts = _dicts(messages)
    spans: list[Span] = []
    for k, message in enumerate(messages):
        if message.role != "assistant" or not message.scored or k < first:
            continue
        before = tokenizer.render(dicts[:k], True, tools)
        upto = text if k + 1 == len(messages) else tokenizer.render(dicts[: k + 1], False, tools)
        if not upto.startswith(before):
            raise _not_a_prefix(tokenizer, before, upto, f"what comes before turn {k}", f"the same with turn {k}")
        end = _end_of_turn(tokenizer, upto)
        if not text.startswith(upto[:end]):
            raise _not_a_prefix(tokenizer, upto, text, f"the messages up to turn {k}", "the whole conversation")
        spans.append((len(before), end))
    return spans


def _end_of_turn(tokenizer: ChatTokenizer, text: str) -> int:
    """Where the turn that ends `text` ends: behind its end-of-turn token, before what the template adds to it."""
    scored, rest = tokenizer.turn_ending
    return len(text) - len(rest) if text.endswith(scored + rest) else len(text)


def _not_a_prefix(tokenizer: ChatTokenizer, shorter: str, longer: str, one: str, other: str) -> RowError:
    a, b = tokenizer.encode_batch([shorter, longer])
    n = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    theirs = tokenizer.token(b[n]) if n < len(b) else "nothing"
    ours = tokenizer.token(a[n]) if n < len(a) else "nothing"
    return RowError(
        f"the chat template renders {one} differently within {other}: token {n} is {ours} in the one and {theirs} "
        f"in the other, so the turn's tokens are undefined; {_TEMPLATE_REMEDY}"
    )


# ------------------------------------------------------------------------------------------------- text to ids


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
    trunk, *branches = (_tokens(s) for s in segments)
    if len(trunk):
        trunk.mask[0] = False  # nothing predicts a sequence's first token
    elif branches:
        return RowError("the prompt has no tokens, and the tokenizer adds no BOS: nothing predicts the completion")
    return Encoded(trunk, branches)


def _add_bos_eos(segments: list[list[tuple[list[int], bool]]], tokenizer: ChatTokenizer) -> None:
    """BOS before the prompt where the tokenizer adds one, EOS behind each completion; neither twice."""
    prefix = list(tokenizer.text_prefix)
    first = segments[0][0][0]
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
    ids = np.fromiter((i for part, _ in pieces for i in part), np.int64)
    mask = np.repeat([scored for _, scored in pieces] or [False], [len(part) for part, _ in pieces] or [0])
    return Tokens(ids, mask.astype(bool))


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


# ------------------------------------------------------------------------------------------------- lengths


def fit(
    encoded: Encoded, max_length: int | None, truncate: str, bos_id: int | None, *, scored: bool = True
) -> tuple[Encoded, bool]:
    """(the record within max_length, whether it was cut).

    truncate "error" refuses; "right" keeps the beginning, of a pair the whole prompt; "left" keeps the end, of a pair
    the whole completions, and a leading BOS. Raises RowError where that leaves nothing to score (`scored`: something
    must be).
    """
    if max_length is None or encoded.length <= max_length:
        return encoded, False
    if truncate == "error":
        raise RowError(f"{encoded.length} tokens, more than max_length {max_length} (`truncate: right` or `left` cuts)")
    if not encoded.branches:
        cut = Encoded(_cut_tokens(encoded.trunk, max_length, truncate, bos_id))
    elif truncate == "right":
        room = max_length - len(encoded.trunk)
        if room < 1:
            raise RowError(f"the prompt alone has {len(encoded.trunk)} tokens, max_length is {max_length}")
        cut = Encoded(encoded.trunk, [Tokens(b.ids[:room], b.mask[:room]) for b in encoded.branches])
    else:
        room = max_length - max(len(b) for b in encoded.branches)
        if room < 1:
            raise RowError(f"a completion alone has {max_length - room} tokens, max_length is {max_length}")
        cut = Encoded(_cut_tokens(encoded.trunk, room, truncate, bos_id), encoded.branches)
    if scored and not all(part.mask.any() for part in cut.branches or [cut.trunk]):
        raise RowError(f"{encoded.length} tokens; cut to max_length {max_length} nothing is left to score")
    return cut, True


def _cut_tokens(tokens: Tokens, n: int, side: str, bos_id: int | None) -> Tokens:
    if side == "right":
        return Tokens(tokens.ids[:n], tokens.mask[:n])
    ids, mask = tokens.ids[-n:].copy(), tokens.mask[-n:].copy()
    if bos_id is not None and tokens.ids[0] == bos_id:
        ids[0] = bos_id
    mask[0] = False
    return Tokens(ids, mask)
