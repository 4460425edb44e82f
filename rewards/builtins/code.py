"""Does the completion's program pass its tests? It runs in a sandbox (`rewards.sandbox`), or not at all.

A program that fails, hangs, crashes or eats its memory scores 0: that is a judgement of the program. Where the sandbox
fails, or the row's tests cannot run, there is no score: that is an error.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from rewards.api import Context, Objective, Sample, Score, reward
from rewards.builtins._programs import Cases, Take, judged_by, program, same_output
from rewards.sandbox import Limits, Outcome, Sandbox

_AT_ONCE = max(1, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
_SPARE_S = 5.0  # beside a solution's own time: starting, ending, a machine that is busy

_sandbox = Sandbox()
_starting = asyncio.Lock()


def _check(seconds: float = 4.0, memory_mb: int = 512) -> None:
    if not 0 < seconds <= 3600:
        raise ValueError(f"seconds is more than 0 and at most 3600, not {seconds}")
    if memory_mb < 64:
        raise ValueError(f"memory_mb is at least 64, not {memory_mb}")


def _prepare() -> None:
    """PluginError where code cannot be contained on this machine."""

    async def try_it() -> None:
        async with Sandbox():
            pass

    asyncio.run(try_it())


def _gold(row: Mapping[str, Any]) -> str | None:
    """HumanEval's prompt with its canonical solution; MBPP's `code`; a `solution`."""
    if isinstance(row.get("canonical_solution"), str):
        prompt = row.get("prompt")
        return (prompt if isinstance(prompt, str) else "") + row["canonical_solution"]
    return next((row[c] for c in ("code", "solution") if isinstance(row.get(c), str)), None)


@reward(
    objectives={"code": Objective(range=(0, 1))},
    batch=1,
    concurrency=_AT_ONCE,
    timeout_s=60.0,
    retries=1,
    validate=_check,
    prepare=_prepare,
    gold=_gold,
)
async def code(
    samples: Sequence[Sample],
    ctx: Context,
    *,
    language: Literal["python"] = "python",
    take: Take = "auto",
    tests: str | None = None,
    score: Literal["all", "fraction"] = "all",
    seconds: float = 4.0,
    memory_mb: int = 512,
) -> list[Score]:
    """1 where all tests pass, else 0; or the fraction that passes.

    Args:
        language: python, with its standard library. take: where the program is: last or first (fenced block; none
            scores 0), text (the whole completion), continue (the row's prompt, then the completion), auto (the last
            block, else the text; after the row's prompt where it does not define the entry point).
        tests: the row's column: HumanEval's `test` (with `entry_point`), MBPP's `test_list`, {inputs, outputs} or a
            list of {input, output} for a program that reads and prints; default: the first of test, test_list,
            input_output, tests, test_cases that the row has.
        score: all, or fraction (of assertions, or of inputs).
        seconds: of CPU for a solution, rounded up; twice as many and one pass on the clock before it is ended.
        memory_mb: MiB for each of its processes. `concurrency`: solutions at once, default one per core.
    """
    limits = Limits(cpu_s=seconds, wall_s=2 * seconds + 1, memory_mb=memory_mb)
    if ctx.remaining() < limits.wall_s + _SPARE_S:
        raise ValueError(
            f"a solution may take {limits.wall_s:g} s, and the call {ctx.remaining():.0f} s: "
            f"set timeout_s to at least {limits.wall_s + _SPARE_S:g}, or lower `seconds`"
        )
    async with _starting:
        await _sandbox.start()
    return await asyncio.gather(*(_one(s, take, tests, score == "fraction", limits) for s in samples))


async def _one(sample: Sample, take: Take, column: str | None, fraction: bool, limits: Limits) -> Score:
    judge = judged_by(sample, column, fraction)
    source = program(sample, take)
    if source is None:
        return Score(0.0, {"cause": "no code", "detail": "the completion has no fenced block of Python"})
    if isinstance(judge, list):
        outcome = await _run_cases(source, judge, fraction, limits)
    else:
        outcome = await _sandbox.run_tests(source, judge, limits)
    value = outcome.fraction if fraction else float(outcome.passed == outcome.total)
    told: dict[str, Any] = {"passed": outcome.passed, "total": outcome.total}
    return Score(value, {**told, "cause": outcome.cause, "detail": outcome.detail} if outcome.cause else told)


async def _run_cases(source: str, cases: Cases, fraction: bool, limits: Limits) -> Outcome:
    """Each case in a sandbox of its own; all of them within the solution's time on the clock."""
    started = time.monotonic()
    passed, first = 0, Outcome(0, 1)
    for number, (given, expected) in enumerate(cases, 1):
        left = limits.wall_s - (time.monotonic() - started)
        if left <= 0:
            outcome = Outcome(0, 1, "timeout", f"not done after {limits.wall_s:g} s")
        else:
            own = Limits(cpu_s=limits.cpu_s, wall_s=left, memory_mb=limits.memory_mb)
            printed, outcome = await _sandbox.run_script(source, given, own)
            if not outcome.cause and not same_output(printed, expected):
                outcome = Outcome(0, 1, "failed", f"printed {printed[:200]!r}, expected {expected[:200]!r}")
        passed += not outcome.cause
        if outcome.cause and not first.cause:
            first = Outcome(0, 1, outcome.cause, f"case {number}: {outcome.detail}")
        if first.cause and (not fraction or left <= 0):
            break
    return Outcome(passed, len(cases), first.cause, first.detail)
