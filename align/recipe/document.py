"""YAML to plain values that remember their lines.

YAML 1.1, which PyYAML speaks, reads `no` as false, `1e-4` as text, `010` as eight, `1:30` as ninety and `2024-01-01`
as a date. A recipe means none of these, so scalars are read by the core schema of YAML 1.2 (section 10.3.2): only
`true` and `false` are booleans, and `1e-4` is a number. Nothing but maps, lists and scalars can be made from a file.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from align.errors import RecipeError

MOST_NODES = 50_000  # values of a recipe, aliases written out
DEEPEST = 50
MOST_CHARACTERS = 4 << 20
Path_ = tuple[str | int, ...]

_SCALARS = [
    ("tag:yaml.org,2002:bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("tag:yaml.org,2002:null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("tag:yaml.org,2002:int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    (
        "tag:yaml.org,2002:float",
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+.0123456789",
    ),
    ("tag:yaml.org,2002:merge", r"<<", "<"),
]
_PATTERNS = {tag: re.compile(pattern) for tag, pattern, _ in _SCALARS} | {"tag:yaml.org,2002:str": re.compile("(?s).*")}
_CONTAINERS: dict[type[yaml.Node], str] = {
    yaml.MappingNode: "tag:yaml.org,2002:map",
    yaml.SequenceNode: "tag:yaml.org,2002:seq",
}


def _fits_its_tag(node: yaml.Node) -> bool:
    """Whether the tag is of the core schema and right for the node: `!!int abc` and `!secret x` are not."""
    if isinstance(node, yaml.ScalarNode):
        pattern = _PATTERNS.get(node.tag)
        return pattern is not None and pattern.fullmatch(node.value) is not None
    return node.tag == _CONTAINERS[type(node)]


def _use_core_schema(cls: type[yaml.resolver.Resolver]) -> None:
    cls.yaml_implicit_resolvers = {}
    for tag, pattern, first in _SCALARS:
        cls.add_implicit_resolver(tag, re.compile(f"^(?:{pattern})$"), list(first))


class _Loader(yaml.SafeLoader):
    """Only `get_single_node` is used; values are made by `_Builder`, which keeps the lines."""


class CoreDumper(yaml.SafeDumper):
    """Quotes exactly the text that the loader above would not read as text."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_use_core_schema(_Loader)
_use_core_schema(CoreDumper)


@dataclass(frozen=True)
class Problem:
    """One thing that the user must change: where, what, and what to do."""

    what: str
    where: str | None = None
    remedy: str | None = None
    unsupported: bool = False


@dataclass
class Document:
    """A parsed recipe. `data`: plain dicts, lists and scalars. `lines`: 1-based line of every key and list item, by
    path. `bases`: the folder that relative paths below a path refer to, longest prefix first (see `base_of`).
    `sources`: for parts that an override set, its text, shown in place of a line."""

    name: str
    data: dict[str, Any]
    folder: Path
    lines: dict[Path_, int] = field(default_factory=dict)
    bases: dict[Path_, Path] = field(default_factory=dict)
    sources: dict[Path_, str] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def where(self, path: Path_) -> str:
        """`file:line` of the nearest thing that has a line, or the override that set it."""
        for length in range(len(path), -1, -1):
            head = path[:length]
            if head in self.sources:
                return f"override `{self.sources[head]}`"
            if head in self.lines:
                return f"{self.name}:{self.lines[head]}"
        return self.name

    def called(self, path: Path_) -> str:
        """The dotted name of a path, stages by their ids, as an override would address it."""
        steps = [str(step) for step in path]
        if len(path) > 1 and path[0] == "stages" and isinstance(path[1], int):
            stages = self.data.get("stages")
            stage = stages[path[1]] if isinstance(stages, list) and path[1] < len(stages) else None
            steps[1] = str(stage.get("id", path[1])) if isinstance(stage, dict) else steps[1]
        return ".".join(steps)

    def place(self, dotted: str) -> str:
        """Where a dotted key such as `stages.grpo.rollout.max_tokens` stands, as far down as the file has it."""
        path: Path_ = ()
        value: Any = self.data
        for step in dotted.split("."):
            here: str | int = int(step) if step.isdecimal() and len(step) < 10 else step
            if path == ("stages",) and isinstance(value, list):
                ids = [stage.get("id") if isinstance(stage, dict) else None for stage in value]
                here = ids.index(step) if step in ids else here
            if here not in (range(len(value)) if isinstance(value, list) else value if isinstance(value, dict) else ()):
                break
            path, value = (*path, here), value[here]
        return self.where(path) if path else self.name

    def base_of(self, path: Path_) -> Path:
        for length in range(len(path), -1, -1):
            if path[:length] in self.bases:
                return self.bases[path[:length]]
        return self.folder


class UnusableValue(yaml.YAMLError):
    """The value of an override is YAML, and nothing that a recipe can use."""

    def __init__(self, problem: Problem):
        super().__init__(problem.what)
        self.remedy = problem.remedy


class _Builder:
    """Nodes to values. Duplicate keys are collected as problems that name both lines.

    Raises RecipeError where aliases or nesting make more of a few lines than any recipe has.
    """

    def __init__(self, document: Document):
        self.document = document
        self.nodes = self.depth = 0

    def build(self, node: yaml.Node, path: Path_) -> Any:
        self.document.lines.setdefault(path, node.start_mark.line + 1)
        self.nodes += 1
        self.depth += 1
        if self.nodes > MOST_NODES or self.depth > DEEPEST:
            many = f"its aliases (`*name`) make more than {MOST_NODES} values of it"
            what = many if self.nodes > MOST_NODES else f"it is nested more than {DEEPEST} levels deep"
            place = f"{self.document.name}:{node.start_mark.line + 1}"
            raise RecipeError(what, where=place, remedy="write out what the recipe needs")
        value = self._value(node, path)
        self.depth -= 1
        return value

    def _value(self, node: yaml.Node, path: Path_) -> Any:
        if not _fits_its_tag(node):
            what = f"the tag `{node.tag}` is not used in recipes, or not for this value"
            self._problem(what, node.start_mark.line + 1, "write a plain value, list or map")
            return None
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path)
        if isinstance(node, yaml.SequenceNode):
            return [self.build(child, (*path, i)) for i, child in enumerate(node.value)]
        return self._scalar(node, path)

    def _mapping(self, node: yaml.MappingNode, path: Path_) -> dict[str, Any]:
        values: dict[str, Any] = {}
        merged: list[yaml.Node] = []
        seen: dict[str, int] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if key_node.tag == "tag:yaml.org,2002:merge":
                merged += value_node.value if isinstance(value_node, yaml.SequenceNode) else [value_node]
                continue
            key = str(key_node.value) if isinstance(key_node, yaml.ScalarNode) else None
            if key is not None and (said := _unusable_text(key)):
                self._problem(f"a key with {said}", line)
            elif key is None:
                self._problem("a key must be a word, not a list or a map", line)
            elif key in seen:
                self._problem(
                    f"key `{key}` stands twice, first at line {seen[key]}",
                    line,
                    "keep one: a second would win silently",
                )
            else:
                seen[key] = line
                self.document.lines[(*path, key)] = line
                values[key] = self.build(value_node, (*path, key))
        for source in merged:
            if not isinstance(source, yaml.MappingNode):
                self._problem("`<<` needs a map, or a list of maps", source.start_mark.line + 1)
                continue
            values = {**(self.build(source, path) or {}), **values}
        return values

    def _scalar(self, node: yaml.Node, path: Path_) -> Any:
        text, tag = node.value, node.tag.removeprefix("tag:yaml.org,2002:")
        line = node.start_mark.line + 1
        if tag == "str":
            if said := _unusable_text(text):
                called = f"`{_key(path)}`" if path else "the value"
                self._problem(f"{called} has {said}", line, "take it out")
            return _UNUSABLE.sub("", text)
        if tag == "bool":
            return text.lower() == "true"
        if tag == "null":
            return None
        if tag == "int" and len(text) <= _MOST_DIGITS:
            return int(text, 0) if text[:2] in ("0o", "0x") else int(text)
        value = float(re.sub(r"\.(inf|nan)", r"\1", text.lower())) if tag == "float" else math.inf
        if not math.isfinite(value):
            shown = text if len(text) <= 40 else f"{text[:20]}... ({len(text)} digits)"
            where = f"`{_key(path)}`: " if path else ""
            self._problem(f"{where}{shown} is no number that a run can use", line, "write a finite number")
            return 1
        return value

    def _problem(self, what: str, line: int, remedy: str | None = None) -> None:
        self.document.problems.append(Problem(what, f"{self.document.name}:{line}", remedy))


_MOST_DIGITS = 100


def _key(path: Path_) -> str:
    """The key that a value stands at, with its place in a list."""
    names = [i for i, step in enumerate(path) if isinstance(step, str)]
    return ".".join(str(step) for step in path[names[-1] if names else 0 :])


_UNUSABLE = re.compile("[\0\ud800-\udfff]")


def _unusable_text(text: str) -> str | None:
    """What in a text no file name and no message can hold."""
    found = _UNUSABLE.search(text)
    if found is None:
        return None
    return "a NUL character in it" if found[0] == "\0" else "half a character in it (a lone surrogate)"


def _too_deep(text: str) -> bool:
    """Whether brackets are opened in brackets beyond any recipe: PyYAML takes minutes for what it then refuses."""
    depth = 0
    for bracket in re.finditer(r"[\[\]{}]", text):
        depth = depth + 1 if bracket[0] in "[{" else max(0, depth - 1)
        if depth > 4 * DEEPEST:
            return True
    return False


def parse(text: str, name: str, folder: Path) -> Document:
    """Parse one YAML document.

    Raises RecipeError where the text is no YAML, or no map; duplicate keys are left in `problems`.
    """
    if len(text) > MOST_CHARACTERS:
        raise RecipeError(f"{len(text)} characters; a recipe has at most {MOST_CHARACTERS}", where=name)
    if _too_deep(text):
        raise RecipeError("brackets are nested too deeply", where=name, remedy="close every `[` and `{`")
    try:
        loader = _Loader(text)  # reads the first characters, and refuses those that YAML does not allow
    except yaml.YAMLError as error:
        raise RecipeError(f"not valid YAML: {_one_line(error)}", where=name) from None
    try:
        node = loader.get_single_node()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{name}:{mark.line + 1}" if mark else name
        raise RecipeError(f"not valid YAML: {_yaml_words(error)}", where=place, remedy=_yaml_remedy(error)) from None
    except yaml.YAMLError as error:
        raise RecipeError(f"not valid YAML: {_one_line(error)}", where=name) from None
    except RecursionError:
        raise RecipeError("nested too deeply", where=name) from None
    finally:
        loader.dispose()
    if node is None:
        raise RecipeError("the recipe is empty", where=name, remedy="it needs at least name, model and stages")
    if not isinstance(node, yaml.MappingNode):
        place = f"{name}:{node.start_mark.line + 1}"
        raise RecipeError("a recipe is a map of keys (name, model, stages, ...)", where=place)
    document = Document(name, {}, folder)
    built = _Builder(document).build(node, ())
    document.data = built if isinstance(built, dict) else {}  # a map with the tag of something else is a problem, noted
    return document


def parse_value(text: str) -> Any:
    """The value of an override, by the same rules. Raises yaml.YAMLError where it is no YAML, or no value."""
    if _too_deep(text):
        raise UnusableValue(Problem("brackets are nested too deeply", remedy="close every `[` and `{`"))
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
    except RecursionError:
        raise UnusableValue(Problem("it is nested too deeply")) from None
    finally:
        loader.dispose()
    if node is None:
        return None
    document = Document("override", {}, Path())
    try:
        value = _Builder(document).build(node, ())
    except RecipeError as error:
        raise UnusableValue(Problem(error.what, remedy=error.remedy)) from None
    if document.problems:
        raise UnusableValue(document.problems[0])
    return value


def dump(value: Any) -> str:
    """YAML that `parse` reads back as the same value."""
    return yaml.dump(value, Dumper=CoreDumper, sort_keys=False, allow_unicode=True, width=120, default_flow_style=False)


def _one_line(error: yaml.YAMLError) -> str:
    return " ".join(str(error).split())


def _yaml_words(error: yaml.MarkedYAMLError) -> str:
    return "; ".join(part for part in (error.context, error.problem) if part)


def _yaml_remedy(error: yaml.MarkedYAMLError) -> str | None:
    problem = error.problem or ""
    if "\\t" in problem or "'\\t'" in problem:
        return "indent with spaces, not tabs"
    if "mapping values are not allowed" in problem:
        return "put text that contains `: ` in quotes, and check the indentation"
    if "undefined alias" in problem or "expected alphabetic" in problem:
        return "put text that begins with `*` or `&` in quotes"
    return None
