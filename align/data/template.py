"""Chat templates: Jinja in a sandbox, with the same environment as transformers' so that renders are the same.

`{% generation %} ... {% endgeneration %}` marks what the assistant generates; a render returns those spans.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from datetime import datetime
from functools import cached_property
from typing import Any

import jinja2
import jinja2.ext
import jinja2.meta
from jinja2 import nodes
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from align.data.records import RowError
from align.errors import ModelError

Span = tuple[int, int]

_GENERATION_TAG = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


class _Tracker:
    """Characters yielded so far, and the spans of generation blocks, of the render in progress."""

    def __init__(self) -> None:
        self.length = 0
        self.spans: list[Span] = []


_render: ContextVar[_Tracker | None] = ContextVar("align_template_render", default=None)


class _Generation(jinja2.ext.Extension):
    """The `generation` tag. A block's start is what was yielded before it, as in transformers' AssistantTracker."""

    tags = frozenset({"generation"})  # type: ignore[assignment]  # Jinja only asks for membership

    def parse(self, parser: Parser) -> nodes.Node:
        lineno = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(lineno)

    def _mark(self, caller: Callable[[], str]) -> str:
        text = caller()
        tracker = _render.get()
        if tracker is not None:
            tracker.spans.append((tracker.length, tracker.length + len(text)))
        return text


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


class ChatTemplate:
    """A compiled template with its fixed variables.

    Args:
        source: Jinja text. variables: special tokens and `template_args`. where: shown in errors.
    Raises ModelError where the template does not compile.
    """

    def __init__(self, source: str, variables: Mapping[str, Any] | None = None, *, where: str = "chat template"):
        self.source = source
        self.variables = dict(variables or {})
        self.where = where
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateError as e:
            raise ModelError(
                f"the chat template does not compile: {e}",
                where=where,
                remedy="correct the template, or name another with `model.chat_template`",
            ) from e

    @property
    def has_generation(self) -> bool:
        """Whether the template marks what the assistant generates."""
        return _GENERATION_TAG.search(self.source) is not None

    @cached_property
    def variables_read(self) -> frozenset[str]:
        """Names that the template takes from its caller: `tools`, `enable_thinking`, `documents`..."""
        return frozenset(jinja2.meta.find_undeclared_variables(self._tree))

    @cached_property
    def keys_read(self) -> frozenset[str]:
        """Every attribute and text constant of the template: a key of a message that is not among them is never
        rendered."""
        tree = self._tree
        attributes = {node.attr for node in tree.find_all(nodes.Getattr)}
        return frozenset(attributes | {n.value for n in tree.find_all(nodes.Const) if isinstance(n.value, str)})

    @cached_property
    def _tree(self) -> nodes.Template:
        return _environment().parse(self.source)

    @property
    def reads_clock(self) -> bool:
        """Whether renders can differ from day to day."""
        return "strftime_now" in self.source

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        arguments: Mapping[str, Any] | None = None,
    ) -> tuple[str, list[Span]]:
        """The text of these messages, and the character spans [start, end) inside generation blocks.

        arguments: variables of this render, which go before the template's own.
        Raises RowError with the template's own words where it refuses the messages.
        """
        tracker = _Tracker()
        token = _render.set(tracker)
        blocks: list[str] = []
        try:
            for block in self._template.generate(
                **{
                    "messages": messages,
                    "tools": list(tools) if tools else None,
                    "documents": None,
                    "add_generation_prompt": add_generation_prompt,
                    **self.variables,
                    **(arguments or {}),
                }
            ):
                blocks.append(block)
                tracker.length += len(block)
        except (
            jinja2.TemplateError,
            TypeError,
            KeyError,
            IndexError,
            AttributeError,
            ValueError,
            ArithmeticError,
        ) as e:
            # Templates fail on rows they were not written for in whatever way Jinja's Python does.
            raise RowError(f"the chat template refuses these messages: {e}") from e
        finally:
            _render.reset(token)
        return "".join(blocks), tracker.spans
