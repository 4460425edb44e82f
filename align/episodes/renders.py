"""Renders of an episode's conversations, and what they write behind the last turn of the assistant."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Literal

from align.data.records import RowError
from align.data.tokenizer import ChatTokenizer
from align.episodes.guard import Change, changed
from align.episodes.spoken import Message, spoken, users_joined
from align.episodes.tools_as_text import as_text

ToolsIn = Literal["template", "prompt"]

_SENTINEL = "thelastthingsaid"
_SAID = "said"
_OF_CALLS = ("tool_calls", "tool_call_id", "name")  # keys of a message that a template may read for a later one


class Renders:
    """A tokenizer's template with tools; the arguments are those of `align.episodes.joins.Joins`."""

    def __init__(
        self,
        tokenizer: ChatTokenizer,
        schemas: Sequence[Mapping[str, Any]],
        arguments: Mapping[str, Any],
        tools_in: ToolsIn,
    ):
        self.tokenizer = tokenizer
        self.schemas = tuple(schemas)
        self.arguments = dict(arguments)
        self.tools_in = tools_in
        texts = sorted((self._text(i) for i in tokenizer.eos_ids), key=len, reverse=True)
        self._end = re.compile("|".join(map(re.escape, filter(None, texts))) or "(?!)")

    def _text(self, token_id: int) -> str:
        return self.tokenizer.decode([token_id], skip_special_tokens=False)

    def prompt(self, messages: Sequence[Message]) -> str:
        """The text of a conversation, with tools and generation prompt; messages of the user that follow each other are
        one turn where the template wants turns to alternate. Raises RowError where it is refused."""
        try:
            return self._prompt(messages)
        except RowError:
            joined = users_joined(messages)
            if len(joined) == len(messages):
                raise
            return self._prompt(joined)

    def _prompt(self, messages: Sequence[Message]) -> str:
        if self.tools_in == "prompt":
            return self._rendered(as_text(messages, self.schemas, self._system))
        return self._rendered(messages, self.schemas)

    def _rendered(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> str:
        said = spoken(self.tokenizer, messages)
        return self.tokenizer.render_spans(said, True, tools, self.arguments)[0]

    @cached_property
    def _system(self) -> bool:
        """Whether the template renders a system message, and before the first turn, which stays where it is."""
        asked = {"role": "user", "content": "the-question"}
        said = [{"role": "system", "content": "the-instruction"}, asked, {"role": "assistant", "content": "ok"}, asked]
        try:
            return "the-instruction" in self._rendered(said).partition("the-question")[0]
        except RowError:
            return False

    # ------------------------------------------------------------------------------------------- behind a turn

    def behind(self, messages: Sequence[Message], added: Sequence[Message], change: Change = str) -> str:
        """What is written behind the last assistant's words, from what closes them on, with generation prompt.

        Args:
            messages: up to and with the last assistant's. added: those that follow.
            change: of texts that are not the engine's own: those of `added`, and names and ids of calls.
        Raises RowError where the template refuses the messages or leaves out the assistant's.
        """
        sentinel = _SENTINEL
        while any(sentinel in text for text in texts_of([*messages, *added])):
            sentinel += "7"  # no "x", with which `Guard.harmless` makes new words
        before = [_named(m, change) for m in messages[:-1]]
        last = self._with_sentinel(_named(messages[-1], change), sentinel)
        follow = [changed(m, change) for m in added]
        try:
            whole = self.prompt([*before, last, *follow])
        except RowError:  # some take no call with both text and thoughts (gpt-oss); neither is what is asked for
            bare = [_calls_alone(m) for m in (*before, last)]
            if bare == [*before, last]:
                raise
            whole = self.prompt([*bare, *follow])
        if sentinel not in whole:
            raise RowError("the chat template leaves out the last turn of the assistant")
        return whole.rpartition(sentinel)[2]

    def _with_sentinel(self, message: Message, sentinel: str) -> dict[str, Any]:
        """The assistant's message with a sentinel for the last thing that the template writes of it."""
        out: dict[str, Any] = {"role": "assistant", "content": sentinel}
        if message.get("reasoning_content"):
            out["reasoning_content"] = _SAID
        calls = message.get("tool_calls")
        if calls and self.tools_in == "template":
            out["content"] = ""  # some write it behind the answers (Gemma 4), where it was not sampled
            texts = [_SAID] * (len(calls) - 1) + [sentinel]
            out["tool_calls"] = [
                {**call, "function": {**call["function"], "arguments": {"of": text}}}
                for call, text in zip(calls, texts, strict=True)
            ]
        return out

    # ------------------------------------------------------------------------------------------- ends

    def end_in(self, tail: str) -> re.Match[str] | None:
        """The first token in a text that ends a turn."""
        return self._end.search(tail)

    def join_in(self, tail: str, sampled_end: int | None) -> tuple[re.Match[str], bool]:
        """(the end in what stands behind a turn with which its join begins, whether it belongs to the join).

        sampled_end: see `Joins.join`. Raises RowError where nothing there ends a turn.
        """
        found = self._end.search(tail)
        if found is None:
            raise RowError("the chat template writes no token that ends a turn behind one of the assistant's")
        if sampled_end is None:
            return found, True
        one: re.Match[str] | None = found
        while one is not None:  # several may stand side by side
            if one[0] == self._text(sampled_end):
                return one, False
            one = self._end.match(tail, one.end())
        return found, found[0] in self._headers

    @cached_property
    def _headers(self) -> frozenset[str]:
        """Ends of turns that begin the next: they cannot be left out."""
        ends = self.tokenizer.ends
        user = self._rendered([{"role": "user", "content": "the-question"}]).partition("the-question")[0]
        found = set(self._end.findall(user)) if ends.text.appended else set[str]()
        return frozenset(found | ({ends.call.token} if ends.call.appended and ends.call != ends.text else set()))


def _named(message: Message, change: Change) -> dict[str, Any]:
    """A message with names and ids of calls changed, and its other texts as they are."""
    return {k: changed(v, change) if k in _OF_CALLS else v for k, v in message.items()}


def _calls_alone(message: dict[str, Any]) -> dict[str, Any]:
    """An assistant's message that calls, without what it says and thinks."""
    if not message.get("tool_calls"):
        return message
    return {k: "" if k == "content" else v for k, v in message.items() if k != "reasoning_content"}


def texts_of(value: Any) -> list[str]:
    """Every text within a message or messages."""
    if isinstance(value, str):
        return [value]
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return [text for item in items for text in texts_of(item)]
