"""Lists of messages, whoever wrote them: role/content (OpenAI, TRL, slime), from/value (ShareGPT, LLaMA-Factory),
role/parts (Gemini), {human, assistant} (ms-swift), items without a role (OpenAI's Responses).

Every key of a message is read, given to the chat template (`Message.more`), or named in `Message.unread`. What calls a
tool, in whatever role, key or part, becomes `tool_calls` of an assistant turn; what a tool answered becomes a `tool`
turn; thoughts become `reasoning_content`, which is rendered under the name that the template reads. Calls in turns of
their own belong to one turn of the assistant, with the text before them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from align.data.formats.base import checked, content_of, is_list_of, joined, optional_text
from align.data.formats.flags import FLAGS, learnt
from align.data.formats.tools import calls_in_text, calls_of, result_text
from align.data.records import Content, MediaPart, Message, RowError
from align.data.values import kind_of

_ROLES = {
    "human": "user", "user": "user",
    "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant", "bot": "assistant",
    "model": "assistant", "assistant": "assistant", "ai": "assistant",
    "system": "system", "developer": "developer",
    "tool": "tool", "function": "tool", "observation": "tool", "ipython": "tool", "tool_response": "tool",
    "tool_result": "tool", "tool_output": "tool", "function_response": "tool", "function_result": "tool",
    "function_output": "tool", "function_call_output": "tool", "code_interpreter": "tool", "tool_responses": "tool",
}  # fmt: skip
_CALLS = frozenset({"function_call", "tool_call", "tool_calls", "function_calls", "functioncall"})
"""Roles of turns that are nothing but calls."""
_CONTENTS = ("content", "value", "parts", "output")
_THOUGHTS = ("reasoning_content", "reasoning", "thinking", "thought", "thoughts")
_RESULT_IDS = ("tool_call_id", "tool_use_id", "call_id", "toolUseId", "toolCallId")
_PART_KEYS = frozenset({
    "type", "text", "path", "url", "base64", "bytes", "data", "format", "image", "image_url", "input_image", "video",
    "video_url", "audio", "audio_url", "input_audio",
})  # fmt: skip
_RESULT_WRAPPERS = ("toolResult", "functionResponse", "function_response")
_ASKED_AND_ANSWERED = (
    ("human", "assistant"), ("human", "gpt"), ("human", "bot"), ("user", "assistant"), ("user", "bot"),
    ("query", "response"), ("question", "answer"), ("prompt", "response"), ("instruction", "output"),
    ("instruction", "response"), ("input", "output"), ("tool", "assistant"), ("tool", "response"),
)  # fmt: skip
"""Keys of items that are a question and its answer: ms-swift's, xtuner's."""
_SHOWN = ("image", "image_url", "input_image", "video", "video_url", "audio", "audio_url", "input_audio")


def read_messages(value: Any, column: str = "messages") -> tuple[Message, ...]:
    """Messages of a list. Raises RowError."""
    if not isinstance(value, list | tuple):
        raise RowError(f"`{column}` must be a list of messages, got {kind_of(value)}")
    messages: list[Message] = []
    for item in value:
        for message, is_call in _read(item, column):
            last = messages[-1] if messages else None
            if is_call and last is not None and last.role == "assistant":
                if last.scored != message.scored:
                    raise RowError(
                        f"message {len(messages) - 1} of `{column}` and the call behind it are one turn, and one of "
                        "them alone is to be learnt; mark both alike"
                    )
                messages[-1] = _one_turn(last, message)
            else:
                messages.append(message)
    return checked(messages)


def _one_turn(text: Message, call: Message) -> Message:
    """A turn of the assistant, and the calls that follow it."""
    calls = [*text.extra.get("tool_calls", ()), *call.extra["tool_calls"]]
    content = joined([*_parts(text.content), *_parts(call.content)])
    extra = {**text.extra, **call.extra, "tool_calls": calls}
    more = {**text.more, **call.more}
    return replace(text, content=content, extra=extra, more=more, unread=text.unread + call.unread)


def _parts(content: Content) -> Iterable[str | MediaPart]:
    return (content,) if isinstance(content, str) else content


def _read(item: Any, column: str) -> list[tuple[Message, bool]]:
    """(message, whether it is nothing but calls) of one item."""
    if not isinstance(item, dict):
        raise RowError(f"a message of `{column}` must be an object, got {str(item)[:60]}")
    item = {name: value for name, value in item.items() if value is not None or name in _CONTENTS}
    role_key = next((name for name in ("role", "from", "type") if isinstance(item.get(name), str)), None)
    if role_key is None:
        pair = _question_and_answer(item)
        if pair is None:
            raise RowError(f"a message of `{column}` has no role: {str(item)[:60]}")
        return [(message, False) for message in pair]
    said = item[role_key].lower().replace("-", "_").replace(" ", "_")
    keys = ("value", *_CONTENTS) if role_key == "from" else _CONTENTS
    content_key = next((name for name in keys if item.get(name) is not None), None)
    content_key = content_key or next((name for name in keys if name in item), None)
    said_type = role_key != "type" and item.get("type") in ("message", "text", *_SHOWN)
    if said_type and item["type"] in _SHOWN and content_key is not None and isinstance(item[content_key], str):
        part = {"type": item["type"], item["type"]: item[content_key]}
        item = {**item, content_key: [part]}  # a message that is a picture's path
    found = _Found(item, read={role_key, content_key or "", *(["type"] if said_type else [])})
    if said in _CALLS:
        if role_key == "type":  # OpenAI's Responses: the item is the call
            calls, unread = calls_of(item)
            return [(Message("assistant", "", {"tool_calls": calls}, unread=unread), True)]
        before, found.calls, found.unread = calls_in_text(item.get(content_key or ""))
        return [(found.message("assistant", before), True)]
    role = _ROLES.get(said, item[role_key])
    return [(message, False) for message in _messages(found, role, content_key, column)]


def _messages(found: _Found, role: str, content_key: str | None, column: str) -> list[Message]:
    """One message, and before it the results that stand in its content."""
    value = found.item[content_key] if content_key is not None else None
    if role == "tool":
        answers = [_result_part(part) for part in value if _is_result(part)] if isinstance(value, list) else []
        return answers or [found.message(role, _result(value))]
    content = content_of(_rest(value, found, role))
    if role == "assistant":
        found.read_calls()
    message = found.message(role, content)
    if content_key is None and not found.calls and message.more:
        raise RowError(f"a {role} message of `{column}` has no content; its keys: {', '.join(map(str, found.item))}")
    return [*found.results, *([message] if content or not found.results else [])]


def _result(value: Any) -> Content:
    """A tool's answer: content parts as such, anything else as text."""
    if isinstance(value, list) and value:
        try:
            return content_of(value)
        except RowError:
            return result_text(value)
    return result_text(value)


def _rest(value: Any, found: _Found, role: str) -> Any:
    """Content without the parts that are thoughts, calls or results, which go to `found`."""
    if not isinstance(value, list):
        return value
    parts = [{"type": "text", "text": part} if isinstance(part, str) else part for part in value]
    return [part for part in parts if not (isinstance(part, dict) and found.take(part, role))]


@dataclass
class _Found:
    """What a message holds beside its text. read: its keys that were read. told: text or media came already."""

    item: Mapping[str, Any]
    read: set[str]
    calls: list[dict[str, Any]] = field(default_factory=list)
    thoughts: list[str] = field(default_factory=list)
    results: list[Message] = field(default_factory=list)
    told: bool = False
    unread: tuple[str, ...] = ()

    def take(self, part: Mapping[str, Any], role: str) -> bool:
        """Whether a content part is none of the text: a thought, a call, a result. Raises RowError."""
        kind = str(part.get("type", "")).replace("-", "_")
        if kind in ("thinking", "reasoning") or (part.get("thought") is True and isinstance(part.get("text"), str)):
            text = next((part[k] for k in ("thinking", "text", "reasoning") if isinstance(part.get(k), str)), None)
            if text is None or self.calls or self.told:
                raise RowError(f"a content part of type {kind!r} without text, or behind what was thought out in it")
            self.thoughts.append(text)
            return True
        if kind in ("tool_use", "tool_call", "function_call") or any(k in part for k in ("functionCall", "toolUse")):
            if role != "assistant":
                raise RowError(f"a {role} message holds a tool call")
            calls, unread = calls_of(dict(part))
            self.calls += calls
            self._leave(unread)
            return True
        if _is_result(part):
            self.results.append(_result_part(part))
            return True
        if self.calls or (self.results and role != "user"):
            raise RowError("a message has text behind its tool calls; make it a turn of its own")
        self.told = True
        nested = [(f"{k}.{n}", v[n]) for k, v in part.items() if isinstance(v, dict) and k in _PART_KEYS for n in v]
        left = [k for k, v in (*part.items(), *nested) if k.rpartition(".")[2] not in _PART_KEYS and _filled(v)]
        self._leave(f"content part key {k!r}" for k in left)
        return False

    def read_calls(self) -> None:
        """Calls of the keys `tool_calls` and `function_call`; they may repeat those of the content. Raises RowError."""
        if _filled(self.item.get("code_interpreter_call")):  # xtuner's: code, of a tool that no schema declares
            raise RowError("a message runs code in `code_interpreter_call`: write it as a `tool_calls` of its tool")
        for name in ("tool_calls", "function_call"):
            if not _filled(self.item.get(name)):
                continue
            calls, unread = calls_of(self.item[name])
            if self.calls and [c["function"] for c in self.calls] != [c["function"] for c in calls]:
                raise RowError(f"a message calls other tools in `{name}` than in its content or other keys")
            self.calls = calls
            self._leave(unread)
            self.read.add(name)

    def _leave(self, what: Iterable[str]) -> None:
        self.unread = (*self.unread, *what)

    def _reasoning(self) -> str:
        """Thoughts under whichever name. Raises RowError where two names say different things."""
        given = {name: self.item[name] for name in _THOUGHTS if isinstance(self.item.get(name), str)}
        self.read |= set(given)
        texts = list(dict.fromkeys([*given.values(), *(["".join(self.thoughts)] if self.thoughts else [])]))
        texts = [text for text in texts if text]
        if len(texts) > 1:
            raise RowError(f"a message has different thoughts in {', '.join(given)} and its content; keep one of them")
        return texts[0] if texts else ""

    def message(self, role: str, content: Content) -> Message:
        """The message, and in `more` all of its keys that nothing read."""
        extra: dict[str, Any] = {}
        said = learnt(self.item)
        self.read |= FLAGS
        if role == "assistant":
            reasoning = self._reasoning()
            if reasoning and not _thought_in(content, reasoning):
                extra["reasoning_content"] = reasoning
            if self.calls:
                extra["tool_calls"] = self.calls
        elif said:
            self._leave([f"`{_flag(self.item)}` of a {role} turn (only the assistant's turns are learnt)"])
        if role == "tool" and (key := next((k for k in _RESULT_IDS if self.item.get(k)), None)):
            extra["tool_call_id"] = self.item[key]
            self.read.add(key)
        if self.item.get("name"):
            extra["name"] = self.item["name"]
            self.read.add("name")
        more = {str(k): v for k, v in self.item.items() if k not in self.read and _filled(v)}
        return Message(role, content, extra, scored=said is not False, more=more, unread=self.unread)


def _thought_in(content: Content, thoughts: str) -> bool:
    """Whether the content begins with these thoughts, which would be rendered twice. Raises RowError for others."""
    head, mark, _ = content.partition("</think>") if isinstance(content, str) else ("", "", "")
    same = bool(mark) and head.strip().removeprefix("<think>").strip() == thoughts.strip()
    if not same and mark and head.lstrip().startswith("<think>"):
        raise RowError(
            "a message has thoughts in its content, before `</think>`, and others beside it; keep one of them"
        )
    return same


def _flag(item: Mapping[str, Any]) -> str:
    return next(str(name) for name in item if name in FLAGS)


def _filled(value: Any) -> bool:
    return value is not None and (not isinstance(value, str | list | dict) or bool(value))


def _is_result(part: Any) -> bool:
    return isinstance(part, dict) and (
        str(part.get("type", "")).replace("-", "_") in ("tool_result", "function_response")
        or any(isinstance(part.get(k), dict) for k in _RESULT_WRAPPERS)
    )


def _result_part(part: Mapping[str, Any]) -> Message:
    """Anthropic's tool_result, Bedrock's toolResult, Gemini's functionResponse, Vercel's tool-result."""
    part = next((part[k] for k in _RESULT_WRAPPERS if isinstance(part.get(k), dict)), part)
    content_key = next((k for k in ("content", "response", "output", "result") if k in part), None)
    value = part[content_key] if content_key is not None else None
    id_key = next((k for k in (*_RESULT_IDS, "id") if part.get(k)), None)
    extra = {"tool_call_id": part[id_key]} if id_key is not None else {}
    name_key = next((k for k in ("name", "toolName", "tool_name") if part.get(k)), None)
    extra |= {"name": part[name_key]} if name_key is not None else {}
    read = {"type", name_key, content_key, id_key}
    unread = tuple(f"tool result key {k!r}" for k, v in part.items() if k not in read and _filled(v) and v is not False)
    return Message("tool", _result(value), extra, unread=unread)


def _question_and_answer(item: Mapping[str, Any]) -> tuple[Message, ...] | None:
    """ms-swift's {human, assistant} and xtuner's {system, input, output}: a question and its answer in one item."""
    found = (two for two in _ASKED_AND_ANSWERED if all(isinstance(item.get(key), str) for key in two))
    if (keys := next(found, None)) is None:
        return None
    question, answer = keys
    system = [Message("system", item["system"])] if isinstance(item.get("system"), str) and item["system"] else []
    asked = Message("tool" if question == "tool" else "user", item[question])
    answered = _Found(item, read={question, answer, "system"}).message("assistant", item[answer])
    return *system, asked, answered


def are_messages(value: Any) -> bool:
    """Whether a column holds messages with roles, or items that are a question and its answer."""
    return is_list_of(value, "role") or any(is_list_of(value, *keys) for keys in _ASKED_AND_ANSWERED)


# ------------------------------------------------------------------------------------------------- what stands before


def read_history(value: Any, words: str) -> tuple[Message, ...]:
    """Earlier turns: [question, answer] each, or an object of both, which may say that the answer is not learnt."""
    messages: list[Message] = []
    if value is not None and not isinstance(value, list | tuple):
        raise RowError(f"`history` must be a list of {words}")
    for item in value or ():
        if isinstance(item, dict) and (pair := _question_and_answer(item)):
            messages += pair
        elif isinstance(item, list | tuple) and len(item) == 2 and all(isinstance(x, str) for x in item):
            messages += [Message("user", item[0]), Message("assistant", item[1])]
        else:
            raise RowError(f"`history` must be a list of {words}")
    return tuple(messages)


def with_system(row: Mapping[str, Any], messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """Messages with the row's `system` column as their first turn. A system turn of their own goes before the column,
    as in LLaMA-Factory, axolotl and ms-swift; where the two differ the column is named as unread."""
    given = row.get("system")
    if isinstance(given, dict):  # Gemini's systemInstruction: {parts: [...]}
        [said] = read_messages([{**given, "role": "system"}], "system")
        given = said.text
    system = given if isinstance(given, str) else optional_text(row, "system")
    if not system:
        return messages
    if not messages or messages[0].role not in ("system", "developer"):
        return (Message("system", system), *messages)
    first = messages[0]
    if first.text.strip() == system.strip():
        return messages
    unread = (*first.unread, "column 'system' (beside a system turn that says something else)")
    return (replace(first, unread=unread), *messages[1:])
