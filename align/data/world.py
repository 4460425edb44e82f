"""Prompts of a stage with environments: they begin episodes, and the tools of an episode are its environment's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from align.data.records import Prompt, Record, RowError
from align.recipe.environment import CHOICE, Environment

Schema = Mapping[str, Any]


@dataclass(frozen=True)
class Offer:
    """What an environment offers to a prompt. tools: their schemas, as OpenAI writes them. written: whether the chat
    template is given them; else episodes write them into the prompt as text."""

    tools: tuple[Schema, ...] = ()
    written: bool = True


@dataclass(frozen=True)
class Offered:
    """What a stage's environments offer to its prompts. names: of the environments, None of one without a name."""

    names: tuple[str | None, ...]
    offers: tuple[Offer, ...]

    @staticmethod
    def of(worlds: Sequence[Environment], descriptions: Sequence[Mapping[str, Any]]) -> Offered | None:
        """By what the recipe says of them, and they of themselves (`align.episodes.describe`); None where there are
        none."""
        if not worlds:
            return None
        offers = [
            Offer(tuple(said["tools"]), rules.tools_in == "template")
            for rules, said in zip(worlds, descriptions, strict=True)
        ]
        return Offered(tuple(rules.as_ for rules in worlds), tuple(offers))

    def to(self, row: Mapping[str, Any]) -> Offer:
        """What the row's environment offers it. Raises RowError where it chooses none that there is."""
        return self.offers[chosen(row, self.names)]


def chosen(row: Mapping[str, Any], names: Sequence[str | None]) -> int:
    """The number of the environment, of those with these names, that a row chooses by its column `environment`.

    Of one that has no name the column says nothing: it is the row's own, as any other. One that has a name is chosen by
    rows without the column, too. Raises RowError where the row chooses none that there is.
    """
    given = row.get(CHOICE)
    if names == (None,) or (given is None and len(names) == 1):
        return 0
    known = ", ".join(repr(name) for name in names)
    if given is None:
        raise RowError(f"the row chooses none of the stage's environments: give it a column `{CHOICE}`, one of {known}")
    if not isinstance(given, str) or given not in names:
        raise RowError(f"the row's `{CHOICE}` is {given!r}, and the stage has {known}")
    return list(names).index(given)


def with_tools(record: Record, offered: Offered | None, row: Mapping[str, Any]) -> Record:
    """The record with its environment's tools for the template; itself where the stage has no environments (None).

    Raises RowError where the prompt has no turns, the row chooses no environment that there is, or names other tools,
    which nobody would answer.
    """
    if offered is None or not isinstance(record, Prompt):
        return record
    if isinstance(record.prompt, str):
        raise RowError(
            "a prompt of plain text has no turns, and an episode goes on with turns: write it as messages, "
            '[{"role": "user", "content": ...}]'
        )
    offer = offered.to(row)
    _require_same(record.tools, offer.tools)
    return replace(record, tools=offer.tools if offer.written else ())


def _require_same(own: tuple[Schema, ...], offered: tuple[Schema, ...]) -> None:
    """Raises RowError where a row's tools are not those of its environment."""
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
