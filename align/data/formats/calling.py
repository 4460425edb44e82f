"""Public data of function calls whose calls stand outside of messages.

query, tools, answers     xLAM, APIGen: `answers` are the calls, as JSON text
system, chat              Glaive: one text of `USER: ... ASSISTANT: ... FUNCTION RESPONSE: ...`, each behind a blank
                          line, and behind an assistant's `<|endoftext|>`; the functions stand in the system text,
                          calls behind `<functioncall>`

A speaker's mark in another place is refused: it may begin a turn, or be quoted in one.
"""

from __future__ import annotations

import re
from typing import Any

from align.data.formats.base import Layout, Row, tools_of, weight_of
from align.data.formats.messages import with_system
from align.data.formats.tools import ARGUMENTS, calls_of, result_text, schemas_of
from align.data.records import Conversation, Kind, Message, Prompt, RowError, prompt_from
from align.data.values import BadValue, Json

# ------------------------------------------------------------------------------------------------- xLAM


def _query(row: Row) -> tuple[Message, ...]:
    if not isinstance(row["query"], str):
        raise RowError("`query` must be text")
    return with_system(row, (Message("user", row["query"]),))


def _called(row: Row) -> Conversation:
    calls, unread = calls_of(row["answers"])
    if not calls:
        raise RowError("`answers` holds no call: there is nothing to learn")
    answer = Message("assistant", "", {"tool_calls": calls}, unread=unread)
    return Conversation((), (*_query(row), answer), tools_of(row), weight_of(row))


def _to_call(row: Row) -> Prompt:
    return prompt_from(_query(row), result_text(row["answers"]), tools_of(row))


def _are_calls(row: Row) -> bool:
    found = row["answers"]
    try:
        found = Json().loads(found) if isinstance(found, str) else found
    except BadValue:
        return False
    offered = _offered(row)
    return isinstance(found, list) and all(
        isinstance(one, dict) and "name" in one and (one["name"] in offered or not ARGUMENTS.isdisjoint(one))
        for one in found
    )


def _offered(row: Row) -> set[str]:
    """The names of the row's tools; none where they cannot be read."""
    try:
        return {str(tool.get("function", {}).get("name")) for tool in tools_of(row)}
    except RowError:
        return set()


# ------------------------------------------------------------------------------------------------- Glaive


_SPEAKER = re.compile(r"(?:^\s*|\n[ \t]*\n\s*)(USER|ASSISTANT|FUNCTION RESPONSE):")
_WITHIN = re.compile(r"(?:^|\s|>)(USER|ASSISTANT|FUNCTION RESPONSE|SYSTEM):|</?s>")
_ROLES = {"USER": "user", "ASSISTANT": "assistant", "FUNCTION RESPONSE": "tool"}
_CALL = re.compile(
    r"""\{\s*"name"\s*:\s*"([^"]+)"\s*(?:,\s*"arguments"\s*:\s*(?:'(.*)'|(.*?))\s*)?\}\s*(?:</functioncall>)?""", re.S
)
_END = "<|endoftext|>"
_SYSTEM = "SYSTEM:"
_OFFER = "Use them if required -"


def _chat(row: Row) -> tuple[Message, ...]:
    parts = _SPEAKER.split(row["chat"])
    if parts[0].strip():
        raise RowError("`chat` must begin with `USER:` or `ASSISTANT:`")
    for who, said in zip(parts[1:-2:2], parts[2:-2:2], strict=True):
        if who == "ASSISTANT" and not said.rstrip().endswith(_END):
            raise RowError(
                f"a turn of the assistant in `chat` does not end with {_END}, as Glaive's do: what follows may be "
                "quoted in it; write such rows as `messages`"
            )
    turns = [_turn(_ROLES[who], said) for who, said in zip(parts[1::2], parts[2::2], strict=True)]
    return with_system({"system": _parted(row)[0]}, tuple(turns))


def _turn(role: str, said: str) -> Message:
    if (inside := _WITHIN.search(said)) is not None:
        raise RowError(
            f"a turn of `chat` holds {inside[0].strip()!r}: each turn must stand behind a blank line, as Glaive's do, "
            "and a mark within one may begin another; write such rows as `messages`"
        )
    said = said.replace(_END, "").strip()
    before, mark, call = said.partition("<functioncall>")
    if role != "assistant" or not mark:
        return Message(role, said)
    found = _CALL.fullmatch(call.strip())
    if found is None:
        raise RowError(f"what stands behind `<functioncall>` is no call: {call.strip()[:60]!r}")
    arguments = (found[2] or "").replace("\\'", "'") or found[3] or "{}"
    calls, _ = calls_of({"name": found[1], "arguments": arguments})
    return Message(role, before.strip(), {"tool_calls": calls})


def _parted(row: Row) -> tuple[str, tuple[Any, ...]]:
    """(system text, tool schemas) of a system text that ends with functions, one JSON object after the other."""
    given = row.get("system") or ""
    if not isinstance(given, str):
        raise RowError("`system` must be text")
    text, offered, rest = given.removeprefix(_SYSTEM).strip().partition(_OFFER)
    if not offered:
        return text, ()
    functions, position, json = list[Any](), 0, Json()
    while rest[position:].strip():
        position += len(rest[position:]) - len(rest[position:].lstrip())
        try:
            one, position = json.decode(rest, position)
        except BadValue as error:
            raise RowError(f"the functions in `system` cannot be read: {error}") from error
        functions.append(one)
    return f"{text.strip()} {offered.removesuffix(' -')}.", schemas_of(functions, "system")


def _glaive(row: Row) -> Conversation:
    return Conversation((), _chat(row), (*_parted(row)[1], *tools_of(row)), weight_of(row))


def _glaive_prompt(row: Row) -> Prompt:
    return prompt_from(_chat(row), (), (*_parted(row)[1], *tools_of(row)))


def _is_chat(row: Row) -> bool:
    return isinstance(row["chat"], str) and row["chat"].lstrip().startswith(("USER:", "ASSISTANT:"))


def _xlam_layout(kind: Kind, read: Any) -> Layout:
    required, optional = frozenset({"query", "tools", "answers"}), frozenset({"system"})
    return Layout("xlam", ("xlam",), kind, required, read, optional, fits=_are_calls, verbatim=True)


def _glaive_layout(kind: Kind, read: Any) -> Layout:
    required, optional = frozenset({"chat"}), frozenset({"system"})
    return Layout("glaive", ("glaive",), kind, required, read, optional, fits=_is_chat, verbatim=True)


LAYOUTS = (
    _xlam_layout("conversation", _called),
    _xlam_layout("prompt", _to_call),
    _glaive_layout("conversation", _glaive),
    _glaive_layout("prompt", _glaive_prompt),
)
