"""Records to text: rendered (`align.data.turns`), and cut where a scored part begins or ends. `align.data.encode` makes
token ids of it.

Plain text takes no template. A medium is one placeholder token in the text. No text of a row may hold a token that the
model takes for a medium.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from align.data.lost import left_out
from align.data.media.shown import Shown, Written
from align.data.openings import begun_in, continued, opened
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
from align.data.tokenizer import ChatTokenizer
from align.data.turns import Given, media_count, not_a_prefix, rendered, renderer, scored_turns


@dataclass(frozen=True, slots=True)
class Piece:
    """Text that is tokenised alone; scored or not."""

    text: str
    scored: bool


@dataclass(frozen=True, slots=True)
class Draft:
    """A record as text. plain: no template wrote it, so BOS is added before the trunk and EOS behind completions.
    media: per segment, trunk first, what its placeholders stand for, in order. left_out: what the row says and the
    template does not render, one entry each time."""

    trunk: tuple[Piece, ...]
    branches: tuple[tuple[Piece, ...], ...] = ()
    plain: bool = False
    media: tuple[tuple[Shown, ...], ...] = ()
    left_out: tuple[str, ...] = ()


class Marks(Protocol):
    """`align.data.media.library.Library`, as far as texts are concerned."""

    @property
    def reserved(self) -> Sequence[str]:
        """Tokens that the model takes for media."""
        ...


def draft(record: Record, tokenizer: ChatTokenizer, shown: Sequence[Shown] = (), marks: Marks | None = None) -> Draft:
    """The text of a record, cut into pieces.

    shown: its media (`media_of`) in order. marks: of a model that takes media. Raises RowError where the template does
    not allow it, or a text holds a token that means a medium.
    """
    if marks is not None:
        _refuse_marks(record, tokenizer, marks)
    given = Given(record.tools, record.arguments)
    if isinstance(record.prompt, str):
        unused = ["tool schemas (`tools`)"] if given.tools else []
        unused += [f"template argument {name!r}" for name in given.arguments]
        return replace(_plain_draft(record), left_out=tuple(unused))
    if isinstance(record, Prompt | Labelled):
        render = renderer(tokenizer, given, shown)
        opens = isinstance(record, Prompt)
        text = opened(render, *begun_in(record.prompt)) if opens else render(record.prompt, False)
        lost = left_out(tokenizer, record.prompt, given, text.text)
        return Draft((Piece(text.text, False),), media=(text.media(),), left_out=tuple(lost))
    if isinstance(record, Conversation):
        return _conversation(record, tokenizer, given, shown)
    prompt, begun = _begun(record)
    sides, lost = list[Written](), list[str]()
    for completion, own in _completions(record, shown):
        messages = prompt + continued(begun, completion)
        side = scored_turns(tokenizer, messages, len(prompt), given, own)
        lost += left_out(tokenizer, messages, given, side.text, len(prompt) if sides else 0)
        sides.append(side)
    if isinstance(record, Pair) and context_differs(record):
        start = sides[0].text[: _fork(tokenizer, record, sides[0], sides[1])]
    else:
        start = opened(renderer(tokenizer, given, shown), prompt, begun).text
        for side in sides:
            if not side.text.startswith(start):
                one, other = "the prompt with generation prompt", "the whole conversation"
                raise not_a_prefix(tokenizer, start, side.text, one, other)
    trunk = sides[0].media(0, len(start))
    branches = tuple(_cut(side.text, side.spans, len(start)) for side in sides)
    media = (trunk, *(side.media(len(start)) for side in sides))
    return Draft((Piece(start, False),), branches, media=media, left_out=tuple(lost))


def _conversation(record: Conversation, tokenizer: ChatTokenizer, given: Given, shown: Sequence[Shown]) -> Draft:
    prompt, begun = _begun(record)
    messages = prompt + continued(begun, _messages(record.completion))
    whole = scored_turns(tokenizer, messages, len(prompt), given, shown)
    lost = left_out(tokenizer, messages, given, whole.text)
    spans = whole.spans
    if begun is not None:
        start = opened(renderer(tokenizer, given, shown), prompt, begun).text
        if not whole.text.startswith(start):
            one, other = "the prompt with the answer that it begins", "the whole conversation"
            raise not_a_prefix(tokenizer, start, whole.text, one, other)
        spans = [(max(begin, len(start)), end) for begin, end in spans if end > len(start)]
    return Draft(_cut(whole.text, spans, 0), media=(whole.media(),), left_out=tuple(lost))


def _begun(record: Conversation | Pair | Unpaired) -> tuple[tuple[Message, ...], Message | None]:
    """The prompt's messages, and the answer that it begins where the completion goes on with the assistant."""
    prompt = _messages(record.prompt)
    completion = _messages(record.chosen if isinstance(record, Pair) else record.completion)
    goes_on = bool(completion) and completion[0].role == "assistant"
    return begun_in(prompt) if goes_on else (prompt, None)


def _completions(record: Pair | Unpaired, shown: Sequence[Shown]) -> list[tuple[tuple[Message, ...], Sequence[Shown]]]:
    """Each completion, and the media of prompt and completion together."""
    fields = ("chosen", "rejected") if isinstance(record, Pair) else ("completion",)
    at = media_count(_messages(record.prompt))
    prompt = list(shown[:at])
    out: list[tuple[tuple[Message, ...], Sequence[Shown]]] = []
    for name in fields:
        completion = _messages(getattr(record, name))
        count = media_count(completion)
        out.append((completion, [*prompt, *shown[at : at + count]]))
        at += count
    return out


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
        count = media_count(prompt)
        given = Given(record.tools, record.arguments)
        head = rendered(tokenizer, prompt, False, given, [s for _, s in one.places[:count]]).text
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


def _plain_draft(record: Record) -> Draft:
    prompt = Piece(_plain(record.prompt), False)
    if isinstance(record, Prompt | Labelled):
        return Draft((prompt,), plain=True)
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
