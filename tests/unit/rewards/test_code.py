"""The reward `code`: which program and which tests it runs, what it scores, and what it does when it cannot."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rewards import PluginError, Sample
from rewards.builtins._programs import judged_by, program, same_output
from rewards.builtins.code import code
from rewards.find import load
from rewards.plugin import PluginSpec
from rewards.pool import PoolResult, RewardPool
from tests.unit.rewards import humaneval

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="code runs on Linux only")

MBPP = {
    "test_list": ["assert add(1, 2) == 3", "assert add(0, 0) == 0", "assert add(-1, 1) == 0"],
    "code": "def add(a, b): return a + b",
}
ECHO = {"input_output": {"inputs": ["1 2\n", "3 4\n"], "outputs": ["3\n", "7"]}}
GOOD = "def add(a, b): return a + b"


@pytest.fixture(scope="module")
def pools() -> Iterator[dict[str, RewardPool]]:
    made: dict[str, RewardPool] = {}
    yield made
    for pool in made.values():
        pool.close()


@pytest.fixture
def score(pools: dict[str, RewardPool]) -> Any:
    """A function of (samples, arguments); a pool for each set of arguments, kept for the file."""

    def run(samples: list[Sample], **args: Any) -> PoolResult:
        pool = pools.setdefault(
            str(args),
            RewardPool([PluginSpec("code", args=args, options={"retries": 0, "max_error_rate": 1.0})], Path("/"), 0),
        )
        return pool.score_sync(samples)

    return run


def column(result: PoolResult) -> list[float | None]:
    return [row[0] for row in result.scores]


TWO = "First:\n```python\ndef add(a, b): return a\n```\nBetter:\n```py\ndef add(a, b): return a + b\n```\nDone."


def test_the_program_is_the_last_block_the_first_or_the_whole_text() -> None:
    assert program(Sample(TWO), "auto") == program(Sample(TWO), "last") == "def add(a, b): return a + b\n"
    assert program(Sample(TWO), "first") == "def add(a, b): return a\n"
    assert program(Sample(GOOD), "auto") == program(Sample(GOOD), "text") == GOOD
    assert program(Sample(GOOD), "last") is None and program(Sample("```json\n{}\n```"), "first") is None
    assert program(Sample("```python\ncut off"), "auto") == "cut off"


PROMPT = 'import math\n\ndef half(x):\n    return x / 2\n\ndef area(r):\n    """of a circle"""\n'


def test_a_completion_goes_on_with_the_prompt_or_comes_after_its_helpers() -> None:
    row = {"prompt": PROMPT, "entry_point": "area"}
    body = "    return math.pi * r ** 2\n"
    assert program(Sample(body, row=row), "auto") == program(Sample(body, row=row), "continue") == PROMPT + body
    whole = "def area(r):\n    return math.pi * half(2 * r) ** 2"
    assert program(Sample(f"```python\n{whole}\n```", row=row), "auto") == f"{PROMPT.rstrip()}\n\n\n{whole}\n"
    prose = {"prompt": "Write a function that adds.", "entry_point": "add"}
    assert program(Sample(GOOD, row=prose), "auto") == GOOD


def test_tests_are_found_in_the_row_in_each_of_their_layouts() -> None:
    found = judged_by(
        Sample("", row={**MBPP, "test_setup_code": "import math", "test_imports": ["import re"]}), None, False
    )
    assert found.tests == MBPP["test_list"] and found.setup == "\nimport re\nimport math" and found.entry is None
    row = {"prompt": PROMPT, "entry_point": "area", "test": "def check(candidate):\n    assert candidate(0) == 0"}
    found = judged_by(Sample("", row=row), None, False)
    assert found.tests[0].endswith("check(area)") and found.setup.startswith(PROMPT) and found.entry == "area"
    cases = [("1 2\n", "3\n"), ("3 4\n", "7")]
    assert judged_by(Sample("", row=ECHO), None, False) == cases
    assert (
        judged_by(
            Sample("", row={"input_output": '{"inputs": ["1 2\\n", "3 4\\n"], "outputs": ["3\\n", "7"]}'}), None, False
        )
        == cases
    )
    assert judged_by(Sample("", row={"t": [{"input": i, "output": o} for i, o in cases]}), "t", False) == cases


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "?"}, "it has: question"),
        ({"tests": 5}, "holds '5'"),
        ({"input_output": {"fn_name": "f", "inputs": [1], "outputs": [1]}}, "tests a function"),
        ({"input_output": {"inputs": ["1"], "outputs": []}}, "1 inputs and 0 outputs"),
        ({"input_output": {"stdin": "1"}}, "needs `inputs` and `outputs`"),
        ({"test": "def check(candidate):\n    assert candidate(1, 2) == 3"}, "no `entry_point`"),
        ({"test_list": ["assert add("]}, "no Python"),
        ({"test_list": ["add(1, 2)"]}, "no assertion"),
        ({"test_list": ["assert add(1, 2) == 3"], "test_setup_code": "import nothing_such"}, "nothing_such"),
    ],
)
def test_a_row_whose_tests_cannot_run_is_an_error_and_not_a_zero(score: Any, row: dict[str, Any], message: str) -> None:
    result = score([Sample(GOOD, row=row), Sample(GOOD, row=MBPP)])
    assert column(result) == [None, 1.0]
    assert message in result.failures[0].message


def test_all_or_the_fraction_and_what_failed(score: Any) -> None:
    samples = [
        Sample(text, row=MBPP) for text in (GOOD, "def add(a, b): return 0", "def add(a, b):", "def sub(): 1", TWO)
    ]
    result = score(samples)
    assert column(result) == [1.0, 0.0, 0.0, 0.0, 1.0]
    told = [info["code"] for info in result.infos]
    assert told[0] == {"passed": 3, "total": 3}
    assert told[1]["cause"] == "failed" and "assert add(1, 2) == 3" in told[1]["detail"]
    assert told[2]["cause"] == "broken" and "IndentationError" in told[2]["detail"]
    assert "NameError" in told[3]["detail"]
    assert column(score(samples, score="fraction")) == pytest.approx([1.0, 2 / 3, 0.0, 0.0, 1.0])
    assert column(score(samples, take="last")) == [0.0, 0.0, 0.0, 0.0, 1.0]


def test_a_program_is_judged_by_what_it_prints(score: Any) -> None:
    texts = [
        "print(sum(map(int, input().split())))",
        "print(3)",
        "import sys\nprint(3)\nsys.exit(1)",
        "x = input()\nprint('3 ')\nprint()",
    ]
    samples = [Sample(t, row=ECHO) for t in texts]
    assert column(score(samples)) == [1.0, 0.0, 0.0, 0.0]
    result = score(samples, score="fraction")
    assert column(result) == [1.0, 0.5, 0.0, 0.5]
    assert result.infos[1]["code"]["detail"] == "case 2: printed '3\\n', expected '7'"
    assert same_output("a \nb\n\n", "a\nb") and not same_output("a b", "a\nb")


@pytest.mark.parametrize(
    "text",
    [
        "def add(a, b):\n    while True: pass",
        "import time\ntime.sleep(99)",
        "import os\nos._exit(0)",
        "x = bytearray(10 * 2**30)",
        "import ctypes\nctypes.string_at(0)",
        "while True: print('x' * 9999)",
    ],
)
def test_a_program_that_hangs_or_crashes_scores_zero_and_its_neighbours_do_not(score: Any, text: str) -> None:
    started = time.monotonic()
    result = score(
        [Sample(GOOD, row=MBPP), Sample(text, row=MBPP), Sample(text, row=ECHO), Sample(GOOD, row=MBPP)], seconds=1
    )
    assert column(result) == [1.0, 0.0, 0.0, 1.0] and result.failures == ()
    assert time.monotonic() - started < 12


def test_impossible_arguments_are_refused() -> None:
    for args in ({"seconds": 0}, {"memory_mb": 1}, {"take": "middle"}, {"language": "rust"}, {"score": "some"}):
        with pytest.raises(PluginError):
            load(PluginSpec("code", args=args), "/")


def test_a_call_that_would_end_before_its_solution_says_what_to_set(score: Any) -> None:
    result = score([Sample(GOOD, row=MBPP)], seconds=100)
    assert column(result) == [None] and "set timeout_s to at least" in result.failures[0].message


def test_the_gold_answer_of_a_row() -> None:
    gold = code.__reward__.gold
    assert gold({"prompt": "def f():\n", "canonical_solution": "    return 1\n"}) == "def f():\n    return 1\n"
    assert gold(MBPP) == GOOD and gold({"question": "?"}) is None


# ------------------------------------------------------------------------------------------------ real data


@pytest.mark.slow
@pytest.mark.realdata
def test_all_164_canonical_solutions_pass_as_gold_and_some_as_a_completion_and_as_a_block(
    shared_data: Path, score: Any
) -> None:
    rows = humaneval.rows(shared_data)
    gold = code.__reward__.gold
    some = rows[::8]
    pairs = [(row, gold(row)) for row in rows]
    pairs += [(row, row["canonical_solution"]) for row in some]
    pairs += [(row, f"So:\n```python\n{row['prompt']}{row['canonical_solution']}\n```\nDone.") for row in some]
    result = score([Sample(text, row=row) for row, text in pairs])
    found = zip(pairs, result.infos, result.scores, strict=True)
    failed = [(row["task_id"], text[-200:], info) for (row, text), info, s in found if s != [1.0]]
    assert len(rows) == 164 and not failed and not result.failures, (failed[:3], result.failures[:3])
