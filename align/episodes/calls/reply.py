"""A turn of the assistant as it was read from its text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call of one tool. name: as the model wrote it, known or not; arguments: JSON values by name; id: as the model
    wrote it, None where the format has none or it is none that a template takes."""

    name: str
    arguments: dict[str, Any]
    id: str | None = None


@dataclass(frozen=True, slots=True)
class Reply:
    """What a turn says. content: outside of thoughts and calls; thoughts: None where there are none; calls: in their
    order; invalid: for each thing that looks like a call and is none, what is wrong with it. The text of an invalid
    call stays in `content`."""

    content: str
    thoughts: str | None = None
    calls: tuple[ToolCall, ...] = ()
    invalid: tuple[str, ...] = ()

    def message(self, calls_before: int = 0) -> dict[str, Any]:
        """The assistant's message as OpenAI writes it, with arguments as objects.

        Args:
            calls_before: calls of the conversation's earlier turns. Ids that the model does not write are counted on
                from there, and have the nine characters that Mistral's templates ask for.
        """
        message: dict[str, Any] = {"role": "assistant", "content": self.content}
        if self.thoughts is not None:
            message["reasoning_content"] = self.thoughts
        if self.calls:
            message["tool_calls"] = [
                {
                    "type": "function",
                    "id": call.id or f"call{calls_before + n:05d}",
                    "function": {"name": call.name, "arguments": call.arguments},
                }
                for n, call in enumerate(self.calls)
            ]
        return message


class CallFormat(Protocol):
    """How a family of models writes calls. name: under which a recipe chooses it."""

    @property
    def name(self) -> str: ...

    def parse(self, text: str, thinking: bool | None = None) -> Reply:
        """What a turn says. Never raises, and takes time in proportion to the text.

        Args:
            text: ids decoded with special tokens, without those that end the turn.
            thinking: whether the prompt has begun the thoughts already; None: as the template's own generation prompt.
        """
        ...
