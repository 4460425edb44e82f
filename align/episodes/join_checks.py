"""Whether a template's joins can be had: small conversations are joined before a run, and what they give is compared.

What is asked of the template: that it writes tools, calls and answers at all; that something ends a turn; and that what
stands behind a turn does not depend on what the turn says, since sampled tokens stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from align.data.records import RowError
from align.episodes.renders import Renders
from align.errors import Unsupported

Messages = list[dict[str, Any]]
Join = Callable[[Messages, Messages, int | None], list[int]]

_ASKED: dict[str, Any] = {"role": "user", "content": "the-question"}
_ANSWER = "the-tools-answer"
_IN_PROMPT = "write `tools_in: prompt`, which makes text of them, or name another template with `model.chat_template`"


def prove(renders: Renders, join: Join) -> int | None:
    """Prove the joins of a template; how many calls it takes in one turn at most, None where it takes any number.

    join: see `Joins.join`. Raises Unsupported with the template's place and what is wrong.
    """
    most = None
    if renders.schemas:
        _require_tools(renders)
        most = _most_calls(renders)
    for what, messages, added in _conversations(renders, most):
        _prove(renders, join, what, messages, added)
    return most


# ----------------------------------------------------------------------------------------------- tools at all


def _require_tools(renders: Renders) -> None:
    """That schemas, a call and its answer are rendered."""
    names = [str(s.get("function", s).get("name")) for s in renders.schemas]
    prompt = renders.prompt([_ASKED])
    if absent := [name for name in names if name not in prompt]:
        raise _unsupported(renders, f"does not write tools into the prompt ({', '.join(absent)} of its `tools`)")
    called = said("", 0, 1)
    try:
        text = renders.prompt([_ASKED, called])
        if "the-argument" not in text:
            raise _unsupported(renders, "does not write the calls of an assistant's message")
        text = renders.prompt([_ASKED, called, *answers(called)])
    except RowError as e:
        raise _unsupported(renders, f"takes no message of a tool: {e}") from e
    if f"{_ANSWER}-0" not in text:
        raise _unsupported(renders, "does not write the answers of tools")


def _most_calls(renders: Renders) -> int | None:
    called = said("", 0, 2)
    try:
        text = renders.prompt([_ASKED, called, *answers(called)])
    except RowError:
        return 1
    whole = all(word in text for word in ("the-argument-0", "the-argument-1", f"{_ANSWER}-0", f"{_ANSWER}-1"))
    return None if whole else 1


def takes_answers_alone(renders: Renders) -> bool:
    """Whether the template renders a tool's message behind an assistant's that calls none."""
    told = {"role": "tool", "tool_call_id": "call00000", "name": "find", "content": _ANSWER}
    try:
        return _ANSWER in renders.prompt([_ASKED, said("the-content", 0, 0), told])
    except RowError:
        return False


def said(content: str, first: int, count: int, thoughts: str = "") -> dict[str, Any]:
    """An assistant's message with that many calls, the first of them the conversation's `first`."""
    message: dict[str, Any] = {"role": "assistant", "content": content}
    if thoughts:
        message["reasoning_content"] = thoughts
    if count:
        message["tool_calls"] = [
            {
                "type": "function",
                "id": f"call{n:05d}",
                "function": {"name": "find", "arguments": {"of": f"the-argument-{n}"}},
            }
            for n in range(first, first + count)
        ]
    return message


def answers(message: Mapping[str, Any]) -> Messages:
    """What tools say to a message's calls."""
    return [
        {"role": "tool", "tool_call_id": call["id"], "name": "find", "content": f"{_ANSWER}-{int(call['id'][4:])}"}
        for call in message["tool_calls"]
    ]


# ----------------------------------------------------------------------------------------------- joins


def _conversations(renders: Renders, most: int | None) -> list[tuple[str, Messages, Messages]]:
    """(what it is, the conversation up to the assistant's message, what is added)."""
    again = {"role": "user", "content": "the-next-question"}
    one, two = said("", 0, 1), said("", 1, 1)
    out: list[tuple[str, Messages, Messages]] = [
        ("an answer and the user's next turn", [_ASKED, said("the-content", 0, 0)], [again])
    ]
    if renders.schemas:
        out += [
            ("a call and its answer", [_ASKED, one], answers(one)),
            ("text with a call and its answer", [_ASKED, said("the-content", 0, 1)], answers(one)),
            ("a second call and its answer", [_ASKED, one, *answers(one), two], answers(two)),
            (
                "an answer behind a call, and the user's next turn",
                [_ASKED, one, *answers(one), said("the-content", 1, 0)],
                [again],
            ),
        ]
        if most is None:
            both = said("", 0, 2)
            out.append(("two calls and their answers", [_ASKED, both], answers(both)))
    if renders.tokenizer.dialect.thoughts is not None:
        out += [(f"{what}, with thoughts", [*m[:-1], m[-1] | {"reasoning_content": "mused"}], a) for what, m, a in out]
    return out


def _prove(renders: Renders, join: Join, what: str, messages: Messages, added: Messages) -> None:
    try:
        tail = renders.behind(messages, added)
        joined = join(messages, added, None)
    except RowError as e:
        raise _unsupported(renders, f"cannot go on behind {what}: {e}") from e
    for one in added:
        if tail.count(one["content"]) != 1:
            raise _unsupported(renders, f"writes {one['content']!r} {tail.count(one['content'])} times behind {what}")
    ended = _ended(renders, tail)
    for other in (messages, *_others(messages)):
        if other[-1].get("tool_calls") and other[-1]["content"]:
            continue  # a template may write such a text behind the answers; it stays where it was sampled
        try:
            whole = renders.prompt([*other, *added])
        except RowError:  # a message of a kind that the template refuses, which no reply of its model need be
            continue
        if not whole.endswith(ended):
            differs = _apart(ended, whole[-len(ended) :])
            raise _unsupported(renders, f"writes something else behind {what} by what the assistant said: {differs}")
    text = renders.tokenizer.decode(joined, skip_special_tokens=False)
    if "".join(text.split()) != "".join(ended.split()):
        raise _unsupported(renders, f"is not encoded as it is written behind {what}: {_apart(ended, text)}")


def _others(messages: Messages) -> list[Messages]:
    """The conversation with other things said last: longer, of several lines, with thoughts within the text."""
    last = messages[-1]
    said = [last | {"content": "Other words.\n\nMany."}] if last["content"] else []
    return [[*messages[:-1], other] for other in (*said, last | {"reasoning_content": "Hm.\n\nOther thoughts."})]


def _ended(renders: Renders, tail: str) -> str:
    """From the end of the turn on."""
    found = renders.end_in(tail)
    return tail if found is None else tail[found.start() :]


def _apart(one: str, other: str) -> str:
    at = next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    start = max(0, at - 20)
    return f"{one[start : at + 40]!r} and {other[start : at + 40]!r}"


def _unsupported(renders: Renders, what: str) -> Unsupported:
    remedy = "name another template with `model.chat_template`"
    if renders.tools_in == "template" and renders.schemas:
        remedy = _IN_PROMPT
    return Unsupported(f"the chat template {what}", where=renders.tokenizer.require_template().where, remedy=remedy)
