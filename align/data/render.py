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

A medium is one placeholder token in the text that is tokenised, and all of its own tokens in the ids. No text of a row
may hold a token that the model takes for a medium.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Protocol

import numpy as np

from align.data.encoded import Encoded, Tokens
from align.data.media.shown import Shown, Written, written
from align.data.records import (
    Conversation,
    Labelled,
    Message,
    Pair,
    Prompt,
    Record,
    RowError,
    Text,
    Unpaired,
    context_differs,
    texts,
)
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
    """A record as text. plain: no template wrote it, so BOS is added before the trunk and EOS behind completions.
    media: per segment, trunk first, what its placeholders stand for, in order."""

    trunk: tuple[Piece, ...]
    branches: tuple[tuple[Piece, ...], ...] = ()
    plain: bool = False
    media: tuple[tuple[Shown, ...], ...] = ()


class Marks(Protocol):
    """`align.data.media.library.Library`, as far as texts are concerned."""

    @property
    def reserved(self) -> Sequence[str]:
        """Tokens that the model takes for media."""
        ...


# ------------------------------------------------------------------------------------------------- records to text


def draft(record: Record, tokenizer: ChatTokenizer, shown: Sequence[Shown] = (), marks: Marks | None = None) -> Draft:
    """The text of a record, cut into pieces.

    shown: its media (`media_of`) in order. marks: of a model that takes media. Raises RowError where the template does
    not allow it, or a text holds a token that means a medium.
    """
    if marks is not None:
        _refuse_marks(record, tokenizer, marks)
    if isinstance(record, Prompt | Labelled):
        if isinstance(record.prompt, str):
            return Draft((Piece(record.prompt, False),), plain=True)
        whole_text = _render(tokenizer, record.prompt, isinstance(record, Prompt), record.tools, shown)
        return Draft((Piece(whole_text.text, False),), media=(whole_text.media(),))
    if isinstance(record.prompt, str):
        return _plain_draft(record)
    prompt = _messages(record.prompt)
    if isinstance(record, Conversation):
        messages = prompt + _messages(record.completion)
        whole = _scored(tokenizer, messages, len(prompt), record.tools, shown)
        return Draft(_cut(whole.text, whole.spans, 0), media=(whole.media(),))
    sides = [
        _scored(tokenizer, prompt + _messages(c), len(prompt), record.tools, own)
        for c, own in _completions(record, shown)
    ]
    if isinstance(record, Pair) and context_differs(record):
        start = sides[0].text[: _fork(tokenizer, record, sides[0], sides[1])]
    else:
        start = _render(tokenizer, prompt, True, record.tools, shown).text
        for side in sides:
            if not side.text.startswith(start):
                one, other = "the prompt with generation prompt", "the whole conversation"
                raise _not_a_prefix(tokenizer, start, side.text, one, other)
    trunk = sides[0].media(0, len(start))
    branches = tuple(_cut(side.text, side.spans, len(start)) for side in sides)
    return Draft((Piece(start, False),), branches, media=(trunk, *(side.media(len(start)) for side in sides)))


def _completions(record: Pair | Unpaired, shown: Sequence[Shown]) -> list[tuple[tuple[Message, ...], Sequence[Shown]]]:
    """Each completion, and the media of prompt and completion together."""
    fields = ("chosen", "rejected") if isinstance(record, Pair) else ("completion",)
    at = _media_count(_messages(record.prompt))
    prompt = list(shown[:at])
    out: list[tuple[tuple[Message, ...], Sequence[Shown]]] = []
    for name in fields:
        completion = _messages(getattr(record, name))
        count = _media_count(completion)
        out.append((completion, [*prompt, *shown[at : at + count]]))
        at += count
    return out


def _media_count(messages: Iterable[Message]) -> int:
    return sum(len(m.media) for m in messages)


def _fork(tokenizer: ChatTokenizer, record: Pair, one: Written, other: Written) -> int:
    """The character where two sides that show something different part: the first medium that differs, or else the
    first message that does (without a message before it: the line in it)."""
    for (at, a), (place, b) in zip(one.places, other.places, strict=False):
        if at != place or one.text[:at] != other.text[:at]:
            break
        if a.key != b.key:
            if not at:
                break
            return at
    prompt = _messages(record.prompt)
    if prompt:
        count = _media_count(prompt)
        head = _render(tokenizer, prompt, False, record.tools, [s for _, s in one.places[:count]]).text
        if one.text.startswith(head) and other.text.startswith(head):
            return len(head)
    alike = next((i for i, (x, y) in enumerate(zip(one.text, other.text, strict=False)) if x != y), 0)
    end = one.text.rfind("\n", 0, alike) + 1
    if not end:
        raise RowError("chosen and rejected have no beginning in common, and nothing predicts their first token")
    return end


def _refuse_marks(record: Record, tokenizer: ChatTokenizer, marks: Marks) -> None:
    """Text that the tokenizer would turn into a medium's token: the model would look for an image there."""
    for name, text in texts(record):
        for part in [text] if isinstance(text, str) else [m.text for m in text]:
            if not any(start in part for start in tokenizer.special_starts):
                continue
            found = next((token for token in marks.reserved if token in part), None)
            if found is not None:
                raise RowError(
                    f"the {name} holds the text {found!r}, which the model takes for media; "
                    "write it differently, or as a content part or a tag with its column"
                )


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


def _dicts(messages: Iterable[Message], tokenizer: ChatTokenizer) -> list[dict[str, Any]]:
    dicts = [m.as_dict() for m in messages]
    if tokenizer.needs_parts:
        for one in dicts:
            if isinstance(one["content"], str) and one["content"]:
                one["content"] = [{"type": "text", "text": one["content"]}]
    return dicts


def _render(
    tokenizer: ChatTokenizer, messages: tuple[Message, ...], generation: bool, tools: Any, shown: Sequence[Shown] = ()
) -> Written:
    """The render of messages whose media are the first of `shown`."""
    text, spans = tokenizer.render_spans(_dicts(messages, tokenizer), generation, tools)
    return written(text, spans, shown[: _media_count(messages)])


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


def _scored(
    tokenizer: ChatTokenizer, messages: tuple[Message, ...], first: int, tools: Any, shown: Sequence[Shown]
) -> Written:
    """The render of `messages` with the spans of its scored turns: assistant, from message `first` on."""
    whole = _render(tokenizer, messages, False, tools, shown)
    if tokenizer.require_template().has_generation:
        spans = _marked_spans(tokenizer, messages, first, whole.spans)
    else:
        spans = _incremental_spans(tokenizer, messages, first, tools, whole.text, shown)
    return Written(whole.text, spans, whole.places)


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
    tokenizer: ChatTokenizer,
    messages: tuple[Message, ...],
    first: int,
    tools: Any,
    text: str,
    shown: Sequence[Shown],
) -> list[Span]:
    spans: list[Span] = []
    for k, message in enumerate(messages):
        if message.role != "assistant" or not message.scored or k < first:
            continue
        before = _render(tokenizer, messages[:k], True, tools, shown).text
        upto = text
        if k + 1 < len(messages):
            upto = _render(tokenizer, messages[: k + 1], False, tools, shown).text
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


def _with_media(segments: list[Tokens], media: Sequence[Sequence[Shown]], tokenizer: ChatTokenizer) -> list[Tokens]:
    """Segments with all tokens of their media in the place of the placeholders. No token of a medium is scored."""
    if not any(media):
        return segments
    return [_expanded(s, shown, tokenizer) if shown else s for s, shown in zip(segments, media, strict=True)]


def _expanded(tokens: Tokens, shown: Sequence[Shown], tokenizer: ChatTokenizer) -> Tokens:
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
