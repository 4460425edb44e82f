"""Prompts of a stage with an environment: its tools are the row's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from align.data.records import Prompt, Record, RowError


def with_tools(record: Record, tools: Sequence[Mapping[str, Any]]) -> Record:
    """The record with an environment's tools (schemas as OpenAI writes them) for the template; itself where there are
    none. Raises RowError where the row names others, which nobody would answer."""
    if not tools or not isinstance(record, Prompt):
        return record
    if isinstance(record.prompt, str):
        raise RowError("a prompt of plain text has no turns: tools need messages, which a chat template writes")
    known = {tool["function"]["name"] for tool in tools}
    strange = [name for tool in record.tools if (name := tool.get("function", {}).get("name")) not in known]
    if strange:
        raise RowError(
            f"the row names a tool {strange[0]!r}, and the stage's environment has {', '.join(sorted(known))}; "
            "take the row's `tools` out, or give the environment a method of that name"
        )
    return replace(record, tools=tuple(tools))
