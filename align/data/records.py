"""What a data row becomes: frozen records, one class per kind, and the checks that every record must pass.

A prompt or a completion is either messages (rendered by the chat template) or plain text (no template: its tokens,
as they stand). A message's content is text, or text and media in the order in which the model reads them. The kind of
stage decides which record a row is read as:

    conversation  sft             Conversation
    pair          preference      Pair
    unpaired      kto             Unpaired
    prompt        online          Prompt
    labelled      classify        Labelled
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

Kind = Literal["conversation", "pair", "unpaired", "prompt", "labelled"]
KINDS: tuple[Kind, ...] = ("conversation", "pair", "unpaired", "prompt", "labelled")

ROLES = frozenset({"system", "developer", "user", "assistant", "tool", "function"})


class RowError(Exception):
    """One row cannot be used. The message is the reason alone; the caller knows file and line."""


MediaKind = Literal["image", "video", "audio"]


@dataclass(frozen=True, slots=True)
class MediaPart:
    """An image, a video or a sound as its row names it.

    source: a path, a data URI, an address, bytes, a {bytes, path} struct, or (a video) a list of frames; None where
    the row's media column is to fill it.
    """

    kind: MediaKind
    source: Any = None


Content = str | tuple[str | MediaPart, ...]


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation.

    content: the text ("" where an assistant turn only calls tools), or parts of which at least one is a medium.
    extra: what templates may read beside it: tool_calls, tool_call_id, name, reasoning_content. scored: False for an
    assistant turn that is not to be learnt (`weight: 0`, `loss: false`), which stays in the context but not in the
    loss. more: the row's other keys, which a template of one's own may read; two messages do not differ in them.
    unread: what its row says of it and nothing reads, for the report.
    """

    role: str
    content: Content
    extra: Mapping[str, Any] = field(default_factory=dict)
    scored: bool = True
    more: Mapping[str, Any] = field(default_factory=dict, compare=False)
    unread: tuple[str, ...] = field(default=(), compare=False)

    def as_dict(self, describe: Callable[[MediaPart], Mapping[str, Any]] | None = None) -> dict[str, Any]:
        """The mapping a chat template reads; with `describe`, what a reward reads of each medium in place of its kind
        alone."""
        content: Any = self.content
        if not isinstance(content, str):
            content = [
                {"type": "text", "text": part} if isinstance(part, str) else _described(part, describe)
                for part in content
            ]
        return {**self.more, "role": self.role, "content": content, **self.extra}

    @property
    def text(self) -> str:
        """The content without its media."""
        if isinstance(self.content, str):
            return self.content
        return "".join(part for part in self.content if isinstance(part, str))

    @property
    def answer(self) -> str:
        """The text, and the calls of a turn that calls tools as JSON behind it: {"name", "arguments"}, or a list."""
        calls = [call["function"] for call in self.extra.get("tool_calls", ())]
        if not calls:
            return self.text
        written = json.dumps(calls[0] if len(calls) == 1 else calls, ensure_ascii=False)
        return f"{self.text}\n{written}" if self.text else written

    @property
    def media(self) -> tuple[MediaPart, ...]:
        return () if isinstance(self.content, str) else tuple(p for p in self.content if isinstance(p, MediaPart))

    @property
    def is_empty(self) -> bool:
        return not self.text.strip() and not self.media and not self.extra.get("tool_calls")


def _described(part: MediaPart, describe: Callable[[MediaPart], Mapping[str, Any]] | None) -> dict[str, Any]:
    return {"type": part.kind} if describe is None else dict(describe(part))


Text = tuple[Message, ...] | str  # messages, or plain text that no template touches


@dataclass(frozen=True, slots=True)
class Conversation:
    """A prompt that is not scored and a completion whose assistant turns are. A list of messages is all completion.

    tools: JSON schemas for the template. weight: this sequence's weight in the loss. arguments: variables of the chat
    template that the row sets; every kind of record has these three.
    """

    prompt: Text
    completion: Text
    tools: tuple[Mapping[str, Any], ...] = ()
    weight: float = 1.0
    arguments: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Pair:
    """One prompt and two completions, the first preferred. Only assistant turns of the completions are scored.

    implicit: chosen and rejected are whole texts, whose prompt is their common beginning (`align.data.beginnings`);
    `prompt` then holds what comes before that.
    """

    prompt: Text
    chosen: Text
    rejected: Text
    tools: tuple[Mapping[str, Any], ...] = ()
    weight: float = 1.0
    arguments: Mapping[str, Any] = field(default_factory=dict)
    implicit: bool = False


@dataclass(frozen=True, slots=True)
class Unpaired:
    """One prompt, one completion, and whether the completion is desirable."""

    prompt: Text
    completion: Text
    desirable: bool
    tools: tuple[Mapping[str, Any], ...] = ()
    weight: float = 1.0
    arguments: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a completion is sampled for. reference_answer: the final assistant turn that was taken off, if any."""

    prompt: Text
    reference_answer: str | None = None
    tools: tuple[Mapping[str, Any], ...] = ()
    weight: float = 1.0
    arguments: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Labelled:
    """A text or conversation, and what its row says it is (None: nobody said). No token of it is scored."""

    prompt: Text
    label: Any = None
    tools: tuple[Mapping[str, Any], ...] = ()
    weight: float = 1.0
    arguments: Mapping[str, Any] = field(default_factory=dict)


Record = Conversation | Pair | Unpaired | Prompt | Labelled
RECORDS: Mapping[Kind, type[Record]] = {
    "conversation": Conversation,
    "pair": Pair,
    "unpaired": Unpaired,
    "prompt": Prompt,
    "labelled": Labelled,
}

_TEXTS = ("prompt", "completion", "chosen", "rejected")
_INSTRUCTING = ("system", "developer")
_BEGUN = ("prefix", "partial")  # of a last turn that is to be gone on with: Mistral's, DeepSeek's; Kimi's, Qwen's


def texts(record: Record) -> Iterator[tuple[str, Text]]:
    """(field, value) of the record's prompt and completions, in the order in which they are read."""
    for name in _TEXTS:
        if hasattr(record, name):
            yield name, getattr(record, name)


def messages_of(record: Record) -> Iterator[Message]:
    """Every message of the record; none of one that is plain text."""
    for _, text in texts(record):
        if not isinstance(text, str):
            yield from text


def media_of(record: Record) -> tuple[MediaPart, ...]:
    """Every medium of the record: the prompt's, then those of each completion, chosen first."""
    return tuple(part for message in messages_of(record) for part in message.media)


def with_texts(record: Record, **changed: Text) -> Record:
    return replace(record, **changed)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------- checks


def check(record: Record) -> None:
    """Raise RowError where the record could not be trained on, whatever its layout was."""
    if isinstance(record, Conversation):
        _check_prompt(record.prompt, may_be_empty=True)
        _check_completion(record.completion, "the completion")
        if record.prompt and not isinstance(record.completion, str) and record.completion[0].role in _INSTRUCTING:
            raise RowError(
                f"the completion starts with a {record.completion[0].role} turn behind a prompt; a row is a prompt and "
                "what follows it, or whole `messages`"
            )
    elif isinstance(record, Pair):
        differs = context_differs(record)
        _check_prompt(record.prompt, may_be_empty=differs or record.implicit)
        for name in ("chosen", "rejected"):
            completion = getattr(record, name)
            _check_completion(completion, name)
            if not differs:
                _check_answer(completion, name)
        if _plain(record.chosen) == _plain(record.rejected):
            raise RowError("chosen and rejected are the same")
    elif isinstance(record, Unpaired):
        _check_prompt(record.prompt)
        _check_completion(record.completion, "the completion")
        _check_answer(record.completion, "the completion")
    else:
        _check_prompt(record.prompt)


def context_differs(record: Pair) -> bool:
    """Whether the sides differ in what the user showed: both then begin with a user's turn, one at least with media."""
    sides = (record.chosen, record.rejected)
    first = [side[0] for side in sides if not isinstance(side, str) and side]
    return len(first) == 2 and all(m.role != "assistant" for m in first) and any(m.media for m in first)


def _check_prompt(prompt: Text, *, may_be_empty: bool = False) -> None:
    if isinstance(prompt, str):
        if not prompt and not may_be_empty:
            raise RowError("the prompt is empty")
        return
    if not prompt and not may_be_empty:
        raise RowError("the prompt has no message")
    if prompt and all(m.is_empty for m in prompt):
        raise RowError("every message of the prompt is empty")


def _check_completion(completion: Text, name: str) -> None:
    if isinstance(completion, str):
        if not completion.strip():
            raise RowError(f"{name} is empty")
        return
    turns = [m for m in completion if m.role == "assistant"]
    if not turns:
        raise RowError(f"no assistant turn in {name}" if completion else f"{name} has no message")
    scored = [m for m in turns if m.scored]
    if not scored:
        raise RowError(f"every assistant turn of {name} is marked as not to be learnt: nothing is left to score")
    if any(m.is_empty for m in scored):
        raise RowError(f"an assistant turn of {name} is empty" if len(turns) > 1 else f"{name} is empty")


def _check_answer(completion: Text, name: str) -> None:
    """A completion that follows a generation prompt starts with the assistant's turn."""
    if not isinstance(completion, str) and completion[0].role != "assistant":
        raise RowError(f"{name} starts with a {completion[0].role} turn; it must continue the prompt as the assistant")


def _plain(text: Text) -> Any:
    return text if isinstance(text, str) else [(m.role, m.content, dict(m.extra)) for m in text]


# ------------------------------------------------------------------------------------------------- helpers of formats


def assistant(text: str) -> tuple[Message, ...]:
    return (Message("assistant", text),)


def prompt_from(messages: Text, completion: Text = (), tools: tuple[Mapping[str, Any], ...] = ()) -> Prompt:
    """A Prompt from a prompt and what may follow it: a final assistant turn becomes the reference answer, unless it
    says that it is begun (`prefix: true`, `partial: true`): then it is gone on with.

    Raises RowError where an assistant turn was all there was.
    """
    if isinstance(messages, str):
        text = completion if isinstance(completion, str) else "".join(m.answer for m in completion)
        return Prompt(messages, text or None, tools)
    if isinstance(completion, str):
        completion = assistant(completion) if completion else ()
    turns = messages + completion
    answer: str | None = None
    if turns and turns[-1].role == "assistant" and any(turns[-1].more.get(key) is True for key in _BEGUN):
        more = {key: value for key, value in turns[-1].more.items() if key not in _BEGUN}
        return Prompt((*turns[:-1], replace(turns[-1], more=more)), None, tools)
    if turns and turns[-1].role == "assistant":
        answer, turns = turns[-1].answer, turns[:-1]
        if not turns:
            raise RowError("an assistant turn alone is no prompt")
    return Prompt(turns, answer, tools)


def known_roles(messages: Iterable[Message]) -> None:
    for message in messages:
        if message.role not in ROLES:
            raise RowError(f"unknown role {message.role!r} (known: {', '.join(sorted(ROLES))})")
