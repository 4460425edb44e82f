"""The reward `code` tells HumanEval's solutions from the same solutions with one systematic fault.

A fault that passes is in `SURVIVORS`, with the arguments on which it answers differently, which the published tests do
not try; or with the reason why it never does.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from rewards import Sample
from rewards.plugin import PluginSpec
from rewards.pool import RewardPool
from rewards.sandbox import Limits, Sandbox
from tests.unit.rewards import humaneval

SURVIVORS: dict[tuple[int, str], tuple[Any, ...] | str] = {
    (24, "last range - 1"): (2,),
    (25, "last integer - 1"): "what is left above the square root is one prime, which is added anyway",
    (25, "first comparison"): "what is left above the square root is one prime, which is added anyway",
    (31, "first integer + 1"): (2,),
    (31, "first comparison"): (2,),
    (32, "first integer + 1"): ([1.2, 0.8],),
    (32, "first comparison"): ([2.625, -2.375, -1.25, 1.0],),
    (35, "first integer + 1"): ([5],),
    (35, "last integer - 1"): "a maximum may start from any element",
    (35, "first comparison"): "an equal element is as good a maximum",
    (39, "first integer + 1"): "the sequence starts one further on, before its first prime, and n is at least 1",
    (40, "first integer + 1"): ([1, -1, 0],),
    (43, "first integer + 1"): ([1, -1],),
    (43, "last range - 1"): ([1, -1],),
    (46, "first comparison"): (4,),
    (48, "last range - 1"): "the last character was compared with the first",
    (59, "first integer + 1"): (1,),
    (59, "first comparison"): (4,),
    (59, "last range - 1"): (4,),
    (68, "first integer + 1"): ([2],),
    (75, "last integer - 1"): "100 is no prime",
    (75, "last range - 1"): "100 is no prime",
    (82, "last range - 1"): "n - 1 divides n for n = 2 alone, where both ranges are empty",
    (94, "first integer + 1"): ([4],),
    (95, "first integer + 1"): ({"a": 1},),
    (95, "last integer - 1"): "an empty dict leaves the state at `start`, which is no either",
    (96, "last range - 1"): "n - 1 divides n for n = 2 alone, where both ranges are empty",
    (99, "first integer + 1"): ("2.50",),
    (99, "last integer - 1"): ("2.0",),
    (107, "last integer - 1"): "only an odd number that is no palindrome gets there besides",
    (108, "first integer + 1"): "twice the first digit has the same sign",
    (108, "first comparison"): "minus 0 is 0",
    (109, "last range - 1"): "the last of two permutations is equal where all others are",
    (111, "last integer - 1"): "where the largest count is 0 no count equals it",
    (111, "first comparison"): "where the largest count is 0 no count equals it",
    (116, "first integer + 1"): ([1, -1],),
    (116, "last integer - 1"): "a b is no 1",
    (118, "last range - 1"): ("abb",),
    (124, "last integer - 1"): ("11-00-2000",),
    (126, "last range - 1"): ([1, 3, 2],),
    (127, "first integer + 1"): "2 and 3 are found to be primes by division too",
    (127, "last integer - 1"): ((0, 4), (0, 4)),
    (127, "first comparison"): ((0, 4), (0, 4)),
    (127, "last range - 1"): "n - 1 divides n for n = 2 alone, where both ranges are empty",
    (128, "first comparison"): "it is asked only where no number is 0",
    (129, "first integer + 1"): "every grid holds a 1, whose neighbours replace the value",
    (134, "last integer - 1"): ("z",),
    (135, "first integer + 1"): ([2, 1],),
    (143, "last range - 1"): "n - 1 divides n for n = 2 alone, where both ranges are empty",
    (145, "first comparison"): "minus 0 is 0",
    (146, "first comparison"): "10 ends in an even digit",
    (147, "first integer + 1"): "three times one more is 0 modulo 3",
    (148, "first comparison"): "equal planets were answered before",
    (150, "last range - 1"): "n - 1 divides n for n = 2 alone, where both ranges are empty",
    (151, "first comparison"): "0 is not odd",
    (154, "first integer + 1"): "the slice at the further place is too short to be equal",
    (154, "last integer - 1"): ("a", ""),
    (154, "last range - 1"): ("a", ""),
    (159, "first comparison"): "where both are equal, both branches are",
}


@pytest.mark.slow
@pytest.mark.realdata
def test_faults_are_found_but_for_those_that_no_test_of_the_data_could_find(shared_data: Path) -> None:
    rows = humaneval.rows(shared_data)
    faulty = [(row, kind, source) for row in rows for kind, source in humaneval.mutants(row)]
    spec = PluginSpec("code", args={"take": "text", "seconds": 1}, options={"on_error": "fail"})
    with RewardPool([spec], Path("/"), 0) as pool:
        result = pool.score_sync([Sample(source, row=row) for row, _, source in faulty])
    passed = [(row, kind, source) for (row, kind, source), s in zip(faulty, result.scores, strict=True) if s != [0.0]]
    print(f"{len(faulty) - len(passed)} of {len(faulty)} faults are found")
    assert len(faulty) == 740
    assert {(int(row["task_id"].split("/")[1]), kind) for row, kind, _ in passed} == set(SURVIVORS)
    asyncio.run(_answers_differ(passed))


async def _answers_differ(passed: list[tuple[dict[str, Any], str, str]]) -> None:
    """On the arguments of SURVIVORS, where there are any."""
    async with Sandbox() as sandbox:
        for row, kind, source in passed:
            arguments = SURVIVORS[int(row["task_id"].split("/")[1]), kind]
            if isinstance(arguments, tuple):
                right = row["prompt"] + row["canonical_solution"]
                answers = [await _answer(sandbox, text, row["entry_point"], arguments) for text in (right, source)]
                assert answers[0] and answers[0] != answers[1], (row["task_id"], kind, answers)


async def _answer(sandbox: Sandbox, source: str, entry: str, arguments: tuple[Any, ...]) -> str:
    """What a call returns, as text; "" where it raises."""
    printed, _ = await sandbox.run_script(f"{source}\n\nprint(repr({entry}(*{arguments!r})))", "", Limits())
    return printed
