"""What `code` runs: the program in a completion, and the tests in a row."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from rewards.api import Sample
from rewards.sandbox import Calls

Take = Literal["auto", "last", "first", "text", "continue"]
Cases = list[tuple[str, str]]  # standard input, expected output

COLUMNS = ("test", "test_list", "input_output", "tests", "test_cases")
_FENCE = re.compile(r"^[ \t]*```[ \t]*([\w+.#-]*)[^\n]*\n(.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE)
_PYTHON = ("", "python", "python3", "py", "py3")


def program(sample: Sample, take: Take) -> str | None:
    """The source to run; None where the completion has no block and one was asked for.

    Where the row has an entry point and a prompt in Python (HumanEval), the prompt comes first: whole where the
    completion goes on with it, as the helpers and imports that it defines where the completion is a function itself.
    """
    text = sample.completion
    blocks = [body for language, body in _FENCE.findall(text) if language.lower() in _PYTHON]
    if take in ("last", "first") and not blocks:
        return None
    if take == "text" or (take == "continue" and not blocks) or not blocks:
        found = text
    else:
        found = blocks[0 if take == "first" else -1]
    before = prompt_of(sample)
    if not before:
        return found
    entry = sample.row.get("entry_point")
    whole = take != "continue" and re.search(rf"^(?:async\s+)?(?:def|class)\s+{re.escape(str(entry))}\b", found, re.M)
    return f"{before.rstrip()}\n\n\n{found}" if whole else before + found


def prompt_of(sample: Sample) -> str:
    """The row's prompt where it is the beginning of a program, else nothing."""
    prompt, entry = sample.row.get("prompt"), sample.row.get("entry_point")
    if not isinstance(prompt, str) or not isinstance(entry, str) or not _compiles(prompt):
        return ""
    return prompt


def _compiles(source: str) -> bool:
    try:
        ast.parse(source)
    except (SyntaxError, ValueError):
        return False
    return True


def judged_by(sample: Sample, column: str | None, fraction: bool) -> Calls | Cases:
    """The row's tests: calls with assertions, or cases of input and output. KeyError names the row's columns."""
    row = sample.row
    name = next((n for n in ((column,) if column else COLUMNS) if row.get(n) is not None), None)
    if name is None:
        wanted = f"a column {column!r}" if column else f"one of {', '.join(COLUMNS)}"
        raise KeyError(f"the row needs {wanted} with its tests; it has: {', '.join(row) or 'none'}")
    value = row[name]
    if isinstance(value, str) and value.lstrip()[:1] in ("{", "["):
        value = _from_json(value)
    if isinstance(value, str):
        return _calls(sample, [value], fraction)
    if isinstance(value, Mapping):
        return _cases(value, name)
    if isinstance(value, Sequence) and value and all(isinstance(v, str) for v in value):
        return _calls(sample, list(value), fraction)
    if isinstance(value, Sequence) and value and all(isinstance(v, Mapping) and "input" in v for v in value):
        outputs = [v.get("output", v.get("expected_output")) for v in value]
        return _cases({"inputs": [v["input"] for v in value], "outputs": outputs}, name)
    raise ValueError(
        f"column {name!r} holds {str(value)[:80]!r}: tests are a text with assertions, a list of such texts, "
        "{inputs: [...], outputs: [...]}, or a list of {input, output}"
    )


def _from_json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:  # a test that begins with a list
        return text


def _calls(sample: Sample, tests: list[str], fraction: bool) -> Calls:
    """HumanEval's `check(candidate)` is called with the entry point; MBPP's assertions name what they call."""
    row = sample.row
    entry = row.get("entry_point") if isinstance(row.get("entry_point"), str) else None
    has_check = any(re.search(r"^def check\(", t, re.M) for t in tests)
    if has_check and not entry:
        raise ValueError("the tests define check(candidate), and the row has no `entry_point` to check")
    if has_check:
        tests = ["\n".join([*tests, f"check({entry})"])]
    imports = row.get("test_imports") or []
    setup = [prompt_of(sample), *(imports if isinstance(imports, list | tuple) else [imports])]
    setup.append(row.get("test_setup_code") or "")
    return Calls(tests, "\n".join(map(str, setup)), entry, fraction)


def _cases(value: Mapping[str, Any], name: str) -> Cases:
    if value.get("fn_name"):
        raise ValueError(f"column {name!r} tests a function (fn_name): only programs that read and print are run so")
    inputs, outputs = value.get("inputs"), value.get("outputs")
    if not isinstance(inputs, Sequence) or not isinstance(outputs, Sequence) or not inputs:
        raise ValueError(
            f"column {name!r} needs `inputs` and `outputs`, two lists; it has: {', '.join(map(str, value))}"
        )
    if len(inputs) != len(outputs):
        raise ValueError(f"column {name!r} has {len(inputs)} inputs and {len(outputs)} outputs")
    if any(out is None for out in outputs):
        raise ValueError(f"column {name!r} has an input without an output")
    return [(_lines(i), _lines(o)) for i, o in zip(inputs, outputs, strict=True)]


def _lines(text: Any) -> str:
    return "\n".join(map(str, text)) if isinstance(text, list | tuple) else str(text)


def same_output(printed: str, expected: str) -> bool:
    """Line by line, white space at the ends of lines and of the text aside."""
    return _normal(printed) == _normal(expected)


def _normal(text: str) -> list[str]:
    return [line.rstrip() for line in text.strip().splitlines()]
