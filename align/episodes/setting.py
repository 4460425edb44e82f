"""What all episodes of an environment have in common, proved before the first."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from align.data.tokenizer import ChatTokenizer
from align.episodes.calls import FORMATS, CallFormat, begins_thoughts, find_format
from align.episodes.images import Images
from align.episodes.joins import Joins
from align.episodes.spec import WorldSpec
from align.errors import Unsupported
from align.recipe.environment import WRITTEN_AS, Environment


@dataclass(frozen=True)
class Setting:
    """schemas: of the tools, as OpenAI writes them. has: which of reset, respond, reward, done, state and close the
    environment defines. context: tokens that the engine holds at most. format: how calls are read; None where there are
    no tools. images: that it shows; None where the model sees none."""

    rules: Environment
    tokenizer: ChatTokenizer
    joins: Joins
    format: CallFormat | None
    schemas: tuple[Mapping[str, Any], ...]
    has: Mapping[str, bool]
    context: int
    images: Images | None = None
    others: dict[str, Joins] = field(default_factory=dict)

    def joins_of(self, arguments: Mapping[str, Any]) -> Joins:
        """The joins of prompts whose rows give the chat template these variables; proved when they are first asked for.

        Raises Unsupported where the template cannot be continued with them."""
        if not arguments:
            return self.joins
        key = json.dumps(arguments, sort_keys=True, default=str)
        if key not in self.others:
            made = Joins(self.tokenizer, self.schemas, arguments=arguments, tools_in=self.rules.tools_in)
            made.prove()
            self.others[key] = made
        return self.others[key]

    def schema(self, tool: str) -> Mapping[str, Any] | None:
        """A tool's; None where there is no such tool."""
        return next((s for s in self.schemas if s["function"]["name"] == tool), None)


def setting_of(
    rules: Environment,
    tokenizer: ChatTokenizer,
    description: Mapping[str, Any],
    context: int,
    images: Images | None = None,
) -> Setting:
    """Raises Unsupported where the chat template cannot be continued turn by turn, or calls cannot be read."""
    schemas = tuple(description["tools"])
    joins = Joins(tokenizer, schemas, tools_in=rules.tools_in)
    joins.prove()
    form: CallFormat | None = None
    if not schemas and rules.parser is not None:
        raise Unsupported(
            f"{description['name']} has no tools: no call is ever read, and `parser` has no effect",
            where="environment.parser",
            remedy="leave it out, or give the class public methods, which are its tools",
        )
    if schemas and rules.tools_in == "prompt":  # the prompt asks for calls in this format, whatever the template writes
        form = FORMATS[WRITTEN_AS].of(schemas, begins_thoughts(tokenizer))
    elif schemas:
        form = find_format(tokenizer, schemas, rules.parser)
    return Setting(rules, tokenizer, joins, form, schemas, description["has"], context, images)


def schema_tokens(world: WorldSpec, tokenizer: ChatTokenizer) -> int:
    """Tokens that tools add to every prompt beyond what its template was given: as text of it (`tools_in: prompt`)."""
    tools = tuple(world.description["tools"])
    if world.rules.tools_in != "prompt" or not tools:
        return 0
    asked = [{"role": "user", "content": "?"}]
    whole = Joins(tokenizer, tools, tools_in="prompt").opening(asked)
    return len(whole) - len(tokenizer.chat_ids(asked, True))
