"""Messages as text with the spans of the turns that are scored; the only file that knows what a chat template does.

What is scored: assistant turns only, from the header's end to the end-of-turn token inclusive (`align.data.ends`, which
also puts one behind a last answer that has none); a newline that the template writes behind that token is not. With
generation markers in the template they decide; without, the render of
the messages before a turn, with generation prompt, is where the turn begins, and must be a prefix of what follows.
Of pairs and of rows with a separate prompt, assistant turns in the prompt are context and not scored.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from align.data.ends import End
from align.data.media.shown import Shown, Written, written
from align.data.openings import Render, before_turn
from align.data.records import Message, RowError
from align.data.template import Span
from align.data.templates import NAMED
from align.data.tokenizer import ChatTokenizer

_TEMPLATE_REMEDY = (
    "name a training template with generation markers by `model.chat_template` "
    f"(a file, or one of ours: {', '.join(sorted(NAMED))})"
)

_MOST_RENDERED = 1 << 30  # characters, in all renders of a row


def _dicts(messages: Iterable[Message], tokenizer: ChatTokenizer) -> list[dict[str, Any]]:
    dicts = [tokenizer.dialect.spoken(m.as_dict()) for m in messages]
    if tokenizer.needs_parts:
        for one in dicts:
            if isinstance(one["content"], str) and one["content"]:
                one["content"] = [{"type": "text", "text": one["content"]}]
    return dicts


class Given(NamedTuple):
    """What a record gives the template beside its messages: tool schemas, and variables."""

    tools: Sequence[Mapping[str, Any]] = ()
    arguments: Mapping[str, Any] = {}


def rendered(
    tokenizer: ChatTokenizer, messages: tuple[Message, ...], generation: bool, given: Given, shown: Sequence[Shown] = ()
) -> Written:
    """The render of messages whose media are the first of `shown`."""
    text, spans = tokenizer.render_spans(_dicts(messages, tokenizer), generation, given.tools, given.arguments)
    return written(text, spans, shown[: media_count(messages)])


def media_count(messages: Iterable[Message]) -> int:
    """How many media stand in these messages."""
    return sum(len(m.media) for m in messages)


def scored_turns(
    tokenizer: ChatTokenizer, messages: tuple[Message, ...], first: int, given: Given, shown: Sequence[Shown]
) -> Written:
    """The render of `messages` with the spans of its scored turns: assistant, from message `first` on."""
    try:
        whole = rendered(tokenizer, messages, False, given, shown)
    except RowError as e:
        if not messages or messages[0].role != "assistant":
            raise
        raise RowError(f"turn 0 is the assistant's, with no message before it: {e}") from e
    if tokenizer.require_template().has_generation:
        spans = _marked_spans(tokenizer, messages, first, whole.spans)
    else:
        spans = _incremental_spans(tokenizer, messages, first, given, whole.text, shown)
        return Written(*_ended(tokenizer, messages, whole.text, spans), whole.places)
    return Written(whole.text, spans, whole.places)


def _ended(
    tokenizer: ChatTokenizer, messages: tuple[Message, ...], text: str, spans: list[Span]
) -> tuple[str, list[Span]]:
    """With the end that the template does not write behind a conversation's last answer, where that is scored."""
    end = _end(tokenizer, messages[-1])
    if not end.appended or messages[-1].role != "assistant" or not spans or spans[-1][1] != len(text):
        return text, spans
    text += end.token
    return text, [*spans[:-1], (spans[-1][0], len(text))]


def _end(tokenizer: ChatTokenizer, message: Message) -> End:
    return tokenizer.ends.call if message.extra.get("tool_calls") else tokenizer.ends.text


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
    given: Given,
    text: str,
    shown: Sequence[Shown],
) -> list[Span]:
    spans: list[Span] = []
    render = renderer(tokenizer, given, shown)
    _refuse_too_many(sum(m.role == "assistant" and m.scored for m in messages[first:]), text)
    for k, message in enumerate(messages):
        if message.role != "assistant" or not message.scored or k < first:
            continue
        before = before_turn(render, messages, k)
        upto = text
        if k + 1 < len(messages):
            upto = render(messages[: k + 1], False).text
        if not upto.startswith(before):
            raise not_a_prefix(tokenizer, before, upto, f"what comes before turn {k}", f"the same with turn {k}")
        own = _end(tokenizer, message)
        end = own.of(upto)
        if not text.startswith(upto[:end]):
            raise not_a_prefix(tokenizer, upto, text, f"the messages up to turn {k}", "the whole conversation")
        if own.appended and text.startswith(own.token, end):  # it ends the turn wherever another message follows
            end += len(own.token)
        spans.append((len(before), end))
    return spans


def renderer(tokenizer: ChatTokenizer, given: Given, shown: Sequence[Shown]) -> Render:
    """`rendered` of any of a row's messages."""
    return lambda messages, generation: rendered(tokenizer, messages, generation, given, shown)


def _refuse_too_many(turns: int, text: str) -> None:
    """Each turn is rendered again with all before it: of many long ones no row is worth the time."""
    if turns * len(text) > _MOST_RENDERED:
        raise RowError(
            f"{turns} scored turns in {len(text)} characters: without generation markers, each is rendered again with "
            f"all before it; {_TEMPLATE_REMEDY}, or cut the conversation"
        )


def not_a_prefix(tokenizer: ChatTokenizer, shorter: str, longer: str, one: str, other: str) -> RowError:
    """The error where `shorter` (called `one`) should begin `longer` (called `other`), with the token that differs."""
    a, b = tokenizer.encode_batch([shorter, longer])
    n = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    theirs = tokenizer.token(b[n]) if n < len(b) else "nothing"
    ours = tokenizer.token(a[n]) if n < len(a) else "nothing"
    template = tokenizer.require_template()
    thinks = "enable_thinking" in template.variables_read and template.variables.get("enable_thinking") is not False
    plain = "set `model.template_args: {enable_thinking: false}` where answers have no thoughts, or " if thinks else ""
    return RowError(
        f"the chat template renders {one} differently within {other}: token {n} is {ours} in the one and {theirs} "
        f"in the other, so the turn's tokens are undefined; {plain}{_TEMPLATE_REMEDY}"
    )
