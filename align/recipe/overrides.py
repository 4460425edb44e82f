"""Overrides of the command line: `stages.grpo.rollout.workers=2`, `stages.grpo.rewards.helpful.timeout_s=5`, `seed=3`.

A stage is addressed by its id and a reward by its name; values are YAML. An override is written into the parsed
document before it is validated, so a wrong key is answered exactly as in a file, with the override as its place.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from align.recipe.document import Document, Path_, Problem, UnusableValue, parse_value
from align.recipe.grammar import keys_of, stage_models
from align.recipe.schema import Recipe

_SHORTHAND = {"data": "path", "loss": "name", "train_on": "path", "rewards": "use"}  # text or map; one or a list


class _Wrong(Exception):
    """An override that cannot be placed; carries the remedy."""

    def __init__(self, what: str, remedy: str | None = None):
        super().__init__(what)
        self.remedy = remedy


def apply(document: Document, overrides: Sequence[str], cwd: Path) -> None:
    """Write overrides into the document; what cannot be placed becomes a problem of the document."""
    for text in overrides:
        try:
            _apply_one(document, text, cwd)
        except _Wrong as wrong:
            document.problems.append(Problem(str(wrong), f"override `{shortened(text)}`", wrong.remedy))


def shortened(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:197]}..."


def _apply_one(document: Document, text: str, cwd: Path) -> None:
    key, equals, value_text = text.partition("=")
    key = key.strip().removeprefix("--")
    if not equals or not key or any(not step for step in key.split(".")):
        raise _Wrong("an override is key=value", "for example stages.grpo.rollout.workers=2, or name=second-try")
    try:
        value = parse_value(value_text)
    except UnusableValue as error:
        raise _Wrong(str(error), error.remedy) from None
    except yaml.YAMLError as error:
        said = error.problem if isinstance(error, yaml.MarkedYAMLError) else error
        raise _Wrong(f"the value is not valid YAML: {said}", "put it in quotes") from None
    first, stages = key.partition(".")[0], document.data.get("stages")
    if first not in keys_of(Recipe) and isinstance(stages, list) and first in _names(stages, ("stages",)):
        raise _Wrong(f"`{first}` is a stage", f"write stages.{shortened(text)}")
    node, path = _walk(document, key.split("."), text)
    last: str | int = key.split(".")[-1]
    if isinstance(node, list):
        last = _index_in(node, str(last), path)
    node[last] = value
    _forget_lines(document, (*path, last))
    document.sources[(*path, last)] = shortened(text)
    document.bases[(*path, last)] = cwd


def _walk(document: Document, steps: Sequence[str], text: str) -> tuple[Any, Path_]:
    """The container that holds the last step, made where it is missing."""
    node: Any = document.data
    path: Path_ = ()
    for step in steps[:-1]:
        here: Any = _index_in(node, step, path) if isinstance(node, list) else step
        child = node[here] if isinstance(node, list) else node.get(here)
        if here == "rewards" and isinstance(child, str | dict):  # one reward, written without a list
            child = node[here] = [child]
        if not isinstance(child, dict | list):
            child = _opened(child, node, here, path)
            if here not in node:
                document.sources[(*path, here)] = shortened(text)
            node[here] = child
        node, path = child, (*path, here)
    if isinstance(node, list) and len(node) == 1 and not _addressed(node, steps[-1], path):
        node, path = _single(node, path)
    return node, path


def _opened(child: Any, parent: Any, key: str | int, path: Path_) -> Any:
    """A map in place of nothing, or of the text that stands for a map with one key."""
    name = str(key) if isinstance(key, str) else str(path[-1]) if path else ""
    if isinstance(child, str) and name in _SHORTHAND:
        return {_SHORTHAND[name]: child}
    if child is None:
        stage = stage_models().get(str(parent.get("kind"))) if isinstance(parent, dict) else None
        usual = stage.model_fields.get("loss") if stage is not None and name == "loss" else None
        return {"name": usual.default[0].name} if usual is not None else {}
    raise _Wrong(f"`{'.'.join(map(str, (*path, key)))}` is {child!r}, not a map: nothing can be set below it")


def _single(node: list[Any], path: Path_) -> tuple[Any, Path_]:
    """A list of one data source or loss may be addressed as if it were that one."""
    if str(path[-1]) not in ("data", "loss", "train_on"):
        return node, path
    if isinstance(node[0], str):
        node[0] = {_SHORTHAND[str(path[-1])]: node[0]}
    return node[0], (*path, 0)


def _addressed(node: list[Any], step: str, path: Path_) -> bool:
    return step.isdigit() or step in _names(node, path)


def _names(node: list[Any], path: Path_) -> list[str]:
    """How the items of a list are called: stages by id, rewards and losses by name."""
    name: Callable[[Any], str] = _NAMERS.get(str(path[-1]) if path else "", lambda item: "")
    return [name(item) for item in node]


def _reward_name(item: Any) -> str:
    use = item if isinstance(item, str) else str(item.get("as") or item.get("use", ""))
    return use.rpartition(":")[2].rpartition(".")[2]


_NAMERS: dict[str, Callable[[Any], str]] = {
    "stages": lambda item: str(item.get("id", "")) if isinstance(item, dict) else "",
    "rewards": _reward_name,
    "loss": lambda item: str(item.get("name", "")) if isinstance(item, dict) else str(item),
}


def _index_in(node: list[Any], step: str, path: Path_) -> int:
    names = _names(node, path)
    if names.count(step) == 1:
        return names.index(step)
    place = ".".join(map(str, path))
    valid = ", ".join(n for n in names if n) or ", ".join(str(i) for i in range(len(node))) or "none"
    if names.count(step) > 1:
        remedy = "ids of stages must differ" if place == "stages" else "tell them apart with `as:`"
        raise _Wrong(f"`{place}` has {names.count(step)} entries named {step!r}", remedy)
    if step.isdecimal() and len(step) < 10 and int(step) < len(node):
        return int(step)
    near = difflib.get_close_matches(step, names, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise _Wrong(f"`{place}` has no {shortened(step)!r}", f"{hint}valid: {valid}")


def _forget_lines(document: Document, path: Path_) -> None:
    for old in [p for p in document.lines if p[: len(path)] == path]:
        del document.lines[old]
