"""Prompts of a stage with an environment: they begin episodes, and its tools are theirs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from align.data.records import Prompt, Record, RowError
from align.recipe.environment import Environment

Schema = Mapping[str, Any]


@dataclass(frozen=True)
class Offered:
    """What an environment offers to every prompt. tools: their schemas, as OpenAI writes them. written: whether the
    chat template is given them; else episodes write them into the prompt as text."""

    tools: tuple[Schema, ...] = ()
    written: bool = True

    @staticmethod
    def of(rules: Environment | None, description: Mapping[str, Any] | None) -> Offered | None:
        """By what the recipe says of it, and it of itself (`align.episodes.describe`); None where there is none."""
        if rules is None or description is None:
            return None
        return Offered(tuple(description["tools"]), rules.tools_in == "template")


def with_tools(record: Record, offered: Offered | None) -> Record:
    """The record with an environment's tools for the template; itself where the stage has no environment (None).

    Raises RowError where the prompt has no turns, or the row names other tools, which nobody would answer.
    """
    if offered is None or not isinstance(record, Prompt):
        return record
    if isinstance(record.prompt, str):
        raise RowError(
            "a prompt of plain text has no turns, and an episode goes on with turns: write it as messages, "
            '[{"role": "user", "content": ...}]'
        )
    _require_same(record.tools, offered.tools)
    return replace(record, tools=offered.tools if offered.written else ())


def _require_same(own: tuple[Schema, ...], offered: tuple[Schema, ...]) -> None:
    """Raises RowError where a row's tools are not those of the environment."""
    if not own:
        return
    theirs, known = ({_function(tool).get("name"): _function(tool) for tool in tools} for tools in (own, offered))
    remedy = "the environment's tools are what the model sees: take the row's `tools` out"
    if strange := [name for name in theirs if name not in known]:
        has = ", ".join(sorted(map(str, known))) or "no tools"
        raise RowError(
            f"the row names a tool {strange[0]!r}, and the stage's environment has {has}; {remedy}, or give the "
            "environment a method of that name"
        )
    if missing := [name for name in known if name not in theirs]:
        raise RowError(f"the row names {len(theirs)} tools, and the environment has {missing[0]!r} too; {remedy}")
    for name, tool in theirs.items():
        for part in ("description", "parameters"):
            if part in tool and tool[part] != known[name].get(part):
                raise RowError(f"the row's {part} of the tool {name!r} is not the environment's; {remedy}")


def _function(tool: Schema) -> Schema:
    found: Schema = tool.get("function", tool)
    return found
