"""What is appended to sampled ids, so that the next turn can be sampled.

The next prompt is the ids before it, exactly as they were sampled, and a join: what the template's render of the whole
conversation writes behind a sentinel that stands in the last assistant message, from the end of that turn on. The
render before the sentinel need not be what was sampled: templates drop thoughts, write JSON anew, and rewrite ends.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from align.data.encode import expanded
from align.data.encoded import Tokens
from align.data.media.shown import Shown, written
from align.data.records import RowError
from align.data.tokenizer import ChatTokenizer
from align.episodes.calls.scan import ends_in_thoughts
from align.episodes.guard import Change, Guard, changed
from align.episodes.join_checks import prove, takes_answers_alone
from align.episodes.renders import Renders, ToolsIn, texts_of
from align.episodes.spoken import Message
from align.protocols.trees import Medium

_LOOKED_AT = 32  # ids at a prompt's end


class Joins:
    """The joins of one tokenizer's template, and the prompts that episodes begin with.

    Args:
        tokenizer: with the template.
        schemas: of the tools, as OpenAI writes them.
        arguments: variables of every render (a row's `enable_thinking`).
        tools_in: whether the template writes tools, or they are text of the prompt (`align.episodes.tools_as_text`).
    Attribute most_calls: that one turn may make under the template, None: any number. `prove` finds it out.
    """

    def __init__(
        self,
        tokenizer: ChatTokenizer,
        schemas: Sequence[Mapping[str, Any]] = (),
        *,
        arguments: Mapping[str, Any] | None = None,
        tools_in: ToolsIn = "template",
    ):
        self.tokenizer = tokenizer
        self.most_calls: int | None = None
        self._renders = Renders(tokenizer, schemas, arguments or {}, tools_in)
        self._guard = Guard(tokenizer)

    def prove(self) -> None:
        """Join small conversations, with and without tools and thoughts. Raises Unsupported where the template cannot
        be used: with its place, and what it does otherwise than it must."""
        self.most_calls = prove(self._renders, self.join)

    @cached_property
    def takes_answers_alone(self) -> bool:
        """Whether a message of a tool may follow an assistant's that makes no (valid) call; else a user's must."""
        return takes_answers_alone(self._renders)

    def opening(
        self,
        messages: Sequence[Message],
        added: Sequence[Message] = (),
        *,
        trusted: int | None = None,
        shown: Sequence[Shown] = (),
    ) -> list[int]:
        """Ids of a prompt, with generation prompt; of its media one placeholder each (`placed` puts them in).

        Args:
            messages: the row's, or a whole conversation. added: an environment's, which follow.
                A user's text that follows a user's is part of that turn where the template wants turns to alternate.
            trusted: how many of `messages` are the row's own (None: all). Text of those that follow them, but for the
                assistant's, becomes no added token, as that of `added`.
            shown: the media of all these messages, in order.
        Raises RowError where the template refuses the messages.
        """
        own = len(messages) if trusted is None else trusted
        whole = [*messages, *added]
        free = [n < own or (n < len(messages) and m["role"] == "assistant") for n, m in enumerate(whole)]

        def text(change: Change) -> str:
            return self._renders.prompt([m if f else changed(m, change) for m, f in zip(whole, free, strict=True)])

        return self._ids(lambda change: written(text(change), [], shown).text, whole)

    def text(self, messages: Sequence[Message]) -> str:
        """What the template writes of a conversation, with generation prompt. Raises RowError where it is refused."""
        return self._renders.prompt(messages)

    def text_behind(self, messages: Sequence[Message], added: Sequence[Message]) -> str:
        """The text of a join, with the end that the template writes there, whatever was sampled. Raises RowError as
        `join` does."""
        tail = self._renders.behind(messages, added)
        return tail[self._renders.join_in(tail, None)[0].start() :]

    def join(
        self,
        messages: Sequence[Message],
        added: Sequence[Message],
        sampled_end: int | None,
        shown: Sequence[Shown] = (),
    ) -> list[int]:
        """Ids that are appended to a sampled turn, with the generation prompt of the next.

        Args:
            messages: the conversation up to and with the last assistant's message.
            added: what follows: tools' answers and users' turns. Its text becomes no added token.
            sampled_end: the turn's last id where it ends a turn. It stays and is not repeated: one that the template
                does not write there (Llama's <|eom_id|> for <|eot_id|>) stands for the template's own. Where the next
                header is what ends a turn (GLM), a header that was sampled and is not the one that follows stays too,
                and the right one follows it. None: a limit or a stop text ended the turn; the template's end is put
                first.
            shown: the media of `added`, in order; as for `opening`.
        Raises RowError where the template refuses the messages, writes no end behind the turn, or writes not each of
        the media once.
        """
        if not messages or messages[-1]["role"] != "assistant" or not added:
            raise RowError("a join stands between an assistant's message and what is added to it")
        begins = [("", False)]

        def text(change: Change) -> str:
            tail = self._renders.behind(messages, added, change)
            found, kept = self._renders.join_in(tail, sampled_end)
            begins.append((found[0], kept))
            # from an end on, so that no text before it changes its ids
            return written(tail[found.start() :], [], shown).text

        ids = self._ids(text, [*messages, *added])
        end, kept = begins[-1]
        if kept:
            return ids
        if ids[:1] != [self.tokenizer.token_id(end)]:
            raise RowError(f"the end {end!r} is no token of its own where the template writes it")
        return ids[1:]

    def placed(self, ids: Sequence[int], shown: Sequence[Shown]) -> tuple[list[int], tuple[Medium, ...]]:
        """(ids with all tokens of the media in place of their placeholders, what stands where in them)."""
        if not shown:
            return list(ids), ()
        tokens = expanded(Tokens(np.array(ids, np.int64), np.zeros(len(ids), bool)), shown, self.tokenizer)
        whole: list[int] = tokens.ids.tolist()
        return whole, tokens.media

    def in_thoughts(self, ids: Sequence[int]) -> bool:
        """Whether a prompt's ids i64[n] end within thoughts that the template has begun: what `CallFormat.parse` asks.
        It may differ from turn to turn (DeepSeek begins none behind a tool's answer)."""
        return ends_in_thoughts(self.tokenizer.decode(ids[-_LOOKED_AT:], skip_special_tokens=False))

    def _ids(self, text: Callable[[Change], str], messages: Sequence[Message]) -> list[int]:
        """Ids of a text that is made with texts of environments changed. Raises RowError where these form a token with
        what the template writes around them, however they are cut."""
        mark = self._guard.mark_for(texts_of(messages))
        allowed = self._guard.counts(self.tokenizer.encode(text(self._guard.harmless), add_special_tokens=False))
        for change in (self._guard.marked(mark), self._guard.cut_up(mark)):
            ids = self._guard.encode(text(change), mark)
            if self._guard.counts(ids) <= allowed:
                return ids
        raise RowError("an environment's text forms a control token with what the chat template writes around it")
