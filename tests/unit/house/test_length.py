"""A file is one thing to read, and so is a function: none is longer than a reader takes in at once."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
LINES_OF_A_FILE, LINES_OF_A_FUNCTION = 350, 60
"""What is longer holds two things: give one of them a name and a file, do not cut it where it happens to be full."""


def too_long(text: str) -> list[str]:
    """What is too long in a file: "file" and the names of functions, methods included, each with its lines."""
    lines = len(text.splitlines())
    found = [f"file: {lines} lines"] if lines > LINES_OF_A_FILE else []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            lines = node.end_lineno - node.lineno + 1
            found += [f"{node.name}: {lines} lines"] if lines > LINES_OF_A_FUNCTION else []
    return found


@pytest.mark.parametrize("room", ["align", "rewards", "rollout"])
def test_no_file_and_no_function_is_longer_than_can_be_read_at_once(room: str) -> None:
    files = sorted((ROOT / room).rglob("*.py"))
    assert len(files) > 10
    found = {str(file.relative_to(ROOT)): too_long(file.read_text(encoding="utf-8")) for file in files}
    assert {name: long for name, long in found.items() if long} == {}


def test_one_line_more_is_found_in_files_functions_and_methods() -> None:
    body = "\n".join(["        pass"] * (LINES_OF_A_FUNCTION - 1))
    method = f"class A:\n    async def most(self):\n{body}\n"
    assert too_long(method) == []
    assert too_long(f"{method}        pass\n") == ["most: 61 lines"]
    assert too_long("a = 1\n" * LINES_OF_A_FILE) == []
    assert too_long("a = 1\n" * (LINES_OF_A_FILE + 1)) == ["file: 351 lines"]
