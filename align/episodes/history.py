"""Whether a conversation still reads as it was sampled: what `history: template` asks before each turn.

Templates write earlier turns anew as a conversation grows: thoughts are dropped before the user's last question (Qwen
3, GLM), or as soon as a turn is over (DeepSeek R1). Whoever serves the model sends it that render, and not what it
sampled. A turn that the template writes otherwise and that says the same (its JSON has other spaces) stands as it was
sampled.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from align.episodes.calls import Reply
from align.episodes.joins import Joins
from align.episodes.spoken import Message


class _Turn(NamedTuple):
    """raw: as it was sampled, with special tokens, without its end. thinking: whether its prompt had begun thoughts.
    behind: the text that was joined to it, from the template's end of the turn on."""

    raw: str
    thinking: bool
    behind: str


class History:
    """One episode's. read: what a turn's text says; see `CallFormat.parse`."""

    def __init__(self, joins: Joins, read: Callable[[str, bool], Reply]):
        self._joins, self._read = joins, read
        self._begun = ""
        self._turns: list[_Turn] = []

    def begin(self, messages: Sequence[Message]) -> None:
        """The prompt that the sequence begins with."""
        self._begun, self._turns = self._joins.text(messages), []

    def stands(self, messages: Sequence[Message], added: Sequence[Message], raw: str, thinking: bool) -> bool:
        """Whether the template writes what was sampled in this sequence, and the joins between, in front of the next
        turn. Where it does not, a sequence is taken to begin with what it writes.

        Args:
            messages: up to and with the turn that was sampled last. added: what follows it.
            raw, thinking: of that turn, as `_Turn` has them.
        Raises RowError where the template refuses the messages.
        """
        whole = self._joins.text([*messages, *added])
        self._turns.append(_Turn(raw, thinking, self._joins.text_behind(messages, added)))
        if self._same(whole):
            return True
        self._begun, self._turns = whole, []
        return False

    def _same(self, whole: str) -> bool:
        if not whole.startswith(self._begun):
            return False
        at = len(self._begun)
        for turn in self._turns:
            if not whole.startswith(turn.raw + turn.behind, at):
                end = whole.find(turn.behind, at)
                if end < 0 or not _alike(self._read(whole[at:end], turn.thinking), self._read(turn.raw, turn.thinking)):
                    return False
            else:
                end = at + len(turn.raw)
            at = end + len(turn.behind)
        return at == len(whole)


def _alike(one: Reply, other: Reply) -> bool:
    """Whether two replies are the same message. White space around a text says nothing, nor do empty thoughts."""
    return _said(one) == _said(other)


def _said(reply: Reply) -> tuple[object, ...]:
    calls = [(call.name, call.arguments) for call in reply.calls]
    return reply.content.strip(), (reply.thoughts or "").strip(), calls, reply.invalid
