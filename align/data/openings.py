"""Where an assistant's turn begins, where no prompt stands before it: a greeting that opens a conversation, and an
answer that the prompt has begun already.

The render of what comes before a turn, with generation prompt, is where it usually begins. Nothing comes before a
greeting, and templates that read their first message cannot render nothing; what they write before the turn is found
by rendering the turn itself with two other texts. An answer that is begun in the prompt (its last message is the
assistant's, and the completion goes on) is one turn, as in TRL's continue_final_message.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from align.data.media.shown import Written
from align.data.records import Message, RowError

Messages = tuple[Message, ...]
Render = Callable[[Messages, bool], Written]  # (messages, with generation prompt)

_ONE, _OTHER = "alpha", "beta"  # begin with different letters


def before_turn(render: Render, messages: Messages, k: int) -> str:
    """The text before turn k, the assistant's: header included. Raises RowError."""
    if k:
        try:
            return render(messages[:k], True).text
        except RowError as refused:
            try:
                return _header(render, messages[:k])
            except RowError:
                raise refused from None
    try:
        return _header(render, ())
    except RowError as e:
        raise RowError(f"turn 0 is the assistant's, with no message before it: {e}") from e


def _header(render: Render, before: Messages) -> str:
    """What the template writes between `before` and an assistant's content, up to its generation prompt's end."""
    header = _common(render, before, "")
    asked = render((Message("user", _ONE),), True).text
    told = render((Message("user", _ONE),), False).text
    prompt = asked.removeprefix(told) if asked.startswith(told) else ""
    at = header.rfind(prompt) if prompt else -1
    return header[: at + len(prompt)] if at >= 0 else header


def _common(render: Render, before: Messages, begun: str) -> str:
    texts = [render((*before, Message("assistant", begun + word)), False).text for word in (_ONE, _OTHER)]
    if texts[0] == texts[1]:
        raise RowError(f"the chat template leaves out turn {len(before)}, the assistant's")
    pairs = enumerate(zip(*texts, strict=False))
    return texts[0][: next((i for i, (one, other) in pairs if one != other), min(map(len, texts)))]


# ------------------------------------------------------------------------------------------------- answers begun


def begun_in(prompt: Messages) -> tuple[Messages, Message | None]:
    """(what comes before it, the assistant's answer that the prompt has begun), or (the prompt, None).

    A turn that calls tools is finished. Raises RowError for one that shows media.
    """
    if not prompt or prompt[-1].role != "assistant" or prompt[-1].extra.get("tool_calls"):
        return prompt, None
    if prompt[-1].media:
        raise RowError("the prompt ends with an assistant turn that shows media; an answer is begun with text")
    return prompt[:-1], prompt[-1]


def continued(begun: Message | None, completion: Messages) -> Messages:
    """A completion whose first turn goes on with what was begun, as whole turns."""
    if begun is None:
        return completion
    first = completion[0]
    if first.media:
        raise RowError("the prompt ends with an assistant turn, and what goes on with it shows media")
    whole = replace(first, content=begun.text + first.text, extra={**begun.extra, **first.extra})
    return (whole, *completion[1:])


def opened(render: Render, before: Messages, begun: Message | None) -> Written:
    """A prompt as a completion goes on from it: with generation prompt, or with the answer as far as it is begun."""
    if begun is None or not begun.text:
        return render(before, True)
    text = _common(render, before, begun.text)
    if not text.endswith(begun.text):
        raise RowError(
            f"the prompt ends with an assistant turn ({begun.text[:40]!r}), which the completion goes on with, and "
            "the chat template does not write it as it stands"
        )
    whole = render((*before, Message("assistant", begun.text + _ONE)), False)
    return Written(text, [], tuple((at, shown) for at, shown in whole.places if at < len(text)))
