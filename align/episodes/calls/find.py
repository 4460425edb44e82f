"""The format in which a chat template writes calls, found out by rendering some."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from align.data.records import RowError
from align.data.tokenizer import ChatTokenizer
from align.episodes.calls import deepseek, gemma, hermes, lists, llama, mistral, pythonic, xml
from align.episodes.calls.reply import CallFormat, ToolCall
from align.episodes.calls.scan import Format, ends_in_thoughts
from align.episodes.spoken import spoken
from align.errors import Unsupported

FORMATS: Mapping[str, Format] = {
    one.name: one
    for one in (
        hermes.FORMAT, mistral.FORMAT, deepseek.FORMAT, xml.CODER, xml.GLM, lists.PHI, lists.GRANITE, gemma.FORMAT,
        llama.FORMAT, pythonic.FORMAT,
    )
}  # fmt: skip
"""In the order in which they are tried."""

_TOOL = "probe_tool"
_CITIES = ("Köln \"am\" <Rhein> & 'drum' \\ herum", "Köln am Rhein")
"""The second for templates that put quotes around a text and leave those in it."""
_SCHEMA = {
    "type": "function",
    "function": {
        "name": _TOOL,
        "description": "A tool of no use.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "a name"},
                "days": {"type": "integer", "description": "a number"},
                "units": {"type": "array", "items": {"type": "string"}, "description": "a list"},
            },
            "required": ["city"],
        },
    },
}
_SECOND = ToolCall(_TOOL, {"city": "Bonn", "units": ["a", "b"]})
_Turn = tuple[str, Sequence[ToolCall]]
_ASKED = {"role": "user", "content": "the-question"}


def find_format(
    tokenizer: ChatTokenizer, schemas: Sequence[Mapping[str, Any]] = (), name: str | None = None
) -> CallFormat:
    """The format in which the tokenizer's template writes calls: the one whose `parse` gives back what was rendered.

    Args:
        schemas: of the tools, as OpenAI writes them; formats whose values are texts read their types from these.
        name: the format's, where the template is not asked.
    Raises Unsupported where no format reads what the template writes, or none has that name.
    """
    thinking = begins_thoughts(tokenizer)
    if name is not None and name not in FORMATS:
        raise Unsupported(f"no format of tool calls is called {name!r}", remedy=f"one of {', '.join(FORMATS)}")
    turns, readers = _readers(tokenizer)
    if name is not None:
        _require_reader(name, turns, readers)
        return FORMATS[name].of(schemas, thinking)
    if readers:
        return FORMATS[readers[0]].of(schemas, thinking)
    wrote = f"writes a call as {turns[0][0][:300]!r}" if turns else "writes no tool calls"
    raise Unsupported(
        f"the chat template {wrote}, which is none of the formats that are known ({', '.join(FORMATS)})",
        where=tokenizer.require_template().where,
        remedy="name the format of its calls (`environment.parser`), or write tools into the prompt: "
        "`environment.tools_in: prompt`",
    )


def _require_reader(name: str, turns: Sequence[_Turn], readers: Sequence[str]) -> None:
    """Raises Unsupported where the format of this name finds none of the calls that the template writes. Where no
    format gives back all that was rendered, one that finds the calls is taken at the recipe's word."""
    if name in readers or not turns:
        return
    own = FORMATS[name].of([_SCHEMA])
    if not readers and all([c.name for c in own.parse(text, False).calls] == [_TOOL] * len(cs) for text, cs in turns):
        return
    which = f"as {readers[0]} reads them, and {name} does not" if readers else f"in which {name} finds none"
    leave = f"leave `parser` out, which finds {readers[0]}" if readers else "use `environment.tools_in: prompt`"
    raise Unsupported(
        f"the chat template writes calls {which}: {turns[0][0][:300]!r}",
        where="environment.parser",
        remedy=f"{leave}, or give a template (`model.chat_template`) that writes {name}",
    )


def _readers(tokenizer: ChatTokenizer) -> tuple[list[_Turn], list[str]]:
    """Turns with calls as the template writes them, and the names of all formats that give back what was rendered."""
    turns: list[_Turn] = []
    for city in _CITIES:
        first = ToolCall(_TOOL, {"city": city, "days": 3})
        turns = [turn for more in ((), (_SECOND,)) if (turn := _turn(tokenizer, (first, *more))) is not None]
        found = [
            name for name, one in FORMATS.items() if turns and all(_reads(one.of([_SCHEMA]), *turn) for turn in turns)
        ]
        if found:
            return turns, found
    return turns, []


def begins_thoughts(tokenizer: ChatTokenizer, arguments: Mapping[str, Any] | None = None) -> bool:
    """Whether the template's generation prompt begins the model's thoughts. arguments: variables of the render."""
    try:
        text, _ = tokenizer.render_spans(spoken(tokenizer, [_ASKED]), True, None, arguments)
    except RowError:
        return False
    return ends_in_thoughts(text)


def _reads(one: Format, text: str, calls: Sequence[ToolCall]) -> bool:
    reply = one.parse(text, False)
    found = [(call.name, call.arguments) for call in reply.calls]
    return found == [(c.name, c.arguments) for c in calls] and not reply.invalid and not reply.content.strip()


def _turn(tokenizer: ChatTokenizer, calls: Sequence[ToolCall]) -> _Turn | None:
    """(what the template writes for a turn of these calls, the calls); None where it writes none of them."""
    wanted = [
        {"type": "function", "id": f"call{n:05d}", "function": {"name": c.name, "arguments": c.arguments}}
        for n, c in enumerate(calls)
    ]
    said = {"role": "assistant", "content": "", "tool_calls": wanted}
    try:
        whole = tokenizer.render(spoken(tokenizer, [_ASKED, said]), False, [_SCHEMA])
        before = tokenizer.render(spoken(tokenizer, [_ASKED]), True, [_SCHEMA])
    except RowError:
        return None
    begin = _alike(tokenizer, before, whole)
    if _TOOL not in whole[begin:]:
        return None
    end = max(whole.find(text, whole.rfind(_TOOL)) for text in ("Bonn" if len(calls) > 1 else "Rhein", _TOOL))
    ends = [at for token in _ends(tokenizer) if (at := whole.find(token, max(end, begin))) >= 0]
    return whole[begin : min(ends, default=len(whole))], calls


def _ends(tokenizer: ChatTokenizer) -> set[str]:
    return {tokenizer.decode([i], skip_special_tokens=False) for i in tokenizer.eos_ids}


def _alike(tokenizer: ChatTokenizer, before: str, whole: str) -> int:
    """Where a turn begins behind what both have in common, with no token in two."""
    at = next((n for n, (a, b) in enumerate(zip(before, whole, strict=False)) if a != b), min(len(before), len(whole)))
    if at == len(before):
        return at
    line = whole.rfind("\n", 0, at) + 1
    return max(
        [
            line,
            *(
                where + len(t)
                for t in tokenizer.added
                if (where := whole.rfind(t, 0, at)) >= 0 and where + len(t) <= at
            ),
        ]
    )
