"""What the reward `reward_model` judges, as rows of the trainer have it: it is rendered as they are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from align.data.formats.arguments import arguments_of
from align.data.formats.base import tools_of
from align.data.records import MediaPart, Message, RowError, Unpaired
from rewards.api import Sample


def record_of(sample: Sample) -> Unpaired:
    """Prompt and completion of a sample, with what its row gives the chat template. Raises RowError for media that no
    file shows, or that are no images."""
    turns = [dict(message) for message in sample.messages]
    if len(turns) == 1 and turns[0]["role"] == "text":
        return Unpaired(turns[0]["content"], sample.completion, True)
    prompt = tuple(Message(turn.pop("role"), _content(turn.pop("content")), turn) for turn in turns)
    answer = (Message("assistant", sample.completion),)
    return Unpaired(prompt, answer, True, tools_of(sample.row), arguments=arguments_of(sample.row))


def _content(content: Any) -> str | tuple[str | MediaPart, ...]:
    if not isinstance(content, list):
        return str(content or "")
    return tuple(part["text"] if part["type"] == "text" else _medium(part) for part in content)


def _medium(part: Mapping[str, str]) -> MediaPart:
    if part["type"] != "image" or "path" not in part:
        raise RowError(f"a reward model that sees reads images from files; the prompt has {dict(part)}")
    return MediaPart("image", part["path"])
