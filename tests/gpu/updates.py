"""Updates against TRL's, QLoRA of a 7B shape, and a profile of the slowest update."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from tests.bench import common, gpu_sides
from tests.gpu.runner import Context


def model_folder(context: Context, model: str) -> Path:
    """A model of random weights, drawn on the device; made once. A step that was ended in the middle leaves none."""
    folder, aside = context.work / model, context.work / f"{model}.partial"
    if not folder.exists():
        shutil.rmtree(aside, ignore_errors=True)
        common.apart(gpu_sides.write, model, aside, context.device)
        aside.rename(folder)
    return folder


def cases(context: Context) -> list[gpu_sides.Case]:
    """Of one loss, one a length. Batches of TRL hold up to `TOKENS` tokens; ours at least what one row has."""
    loss, model = context.options["loss"], "toy" if context.toy else context.options["model"]
    rows = {"dpo": 2, "grpo": 1, "sft": 1}[loss]
    found = []
    for length in [64, 128] if context.toy else context.options["lengths"]:
        tokens = 512 if context.toy else 32_768
        batches = sorted({max(1, tokens // 4 // (rows * length)), max(1, tokens // (rows * length))})
        budgets = (tokens // 2, tokens)
        repeats = 1 if context.toy or length > 8192 else 2
        found.append(gpu_sides.Case(model, loss, length, tokens, repeats, budgets, tuple(batches), context.device))
    return found


def against_trl(context: Context) -> None:
    """One comparison a length, both sides in processes of their own. Ours is not measured again where an earlier step
    has it. Before a ratio is told, loss and gradient norm of both are compared. liger's kernels have no form for a CPU:
    there they are only put in place."""
    liger, loss = context.options.get("liger", False), context.options["loss"]
    other = "TRL with liger" if liger else "TRL"
    all_cases = cases(context)
    folder = model_folder(context, all_cases[0].model)
    known = (context.earlier.get(context.options.get("ours_of", "")) or {}).get("figures") or {}
    ours_known = {int(length): own for length, own in known.get("measured", {}).items()}
    with ThreadPoolExecutor() as pool:
        starting = {other: pool.submit(common.Apart, gpu_sides.Theirs, folder, context.device, liger)}
        if any(case.length not in ours_known for case in all_cases):
            starting["ours"] = pool.submit(common.Apart, gpu_sides.Ours, folder, context.device)
        peak = common.apart(gpu_sides.peak_of, context.device, 0.02 if context.toy else 0.5)
        sides = {name: started.result() for name, started in starting.items()}
    figures: dict[str, Any] = {"cases": {}, "measured": {}, "checks": {}}
    if liger:
        placed = sides[other].call("liger_layers", all_cases[0])
        figures |= {"liger_layers": placed, "checks": {"liger's kernels are in TRL's layers": placed > 0}}
        context.write(figures)
    for case in [] if liger and context.toy else all_cases:
        ours = ours_known.get(case.length) or sides["ours"].call("measure", case)
        figures["measured"][case.length] = ours
        context.write(figures)
        theirs = sides[other].call("measure", case)
        words = f"{loss} at {case.length}: the same loss and gradient norm as {other}"
        figures["checks"][words] = False
        context.write(figures)
        figures["cases"][case.length] = gpu_sides.compared(case, ours, theirs, peak, other)
        figures["checks"][words] = True
        context.write(figures)
    for side in sides.values():
        side.close()


def qlora(context: Context) -> None:
    """Memory of an update of a 7B shape in four bits, with checkpointing, against the plan of `align check`."""
    from tests.bench import memory_plan

    case = memory_plan.CASES["qlora, checkpointing"]
    config, tokens = memory_plan.gpu_config(), 2048
    if context.toy:
        config |= {"vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
        config |= {"num_attention_heads": 4, "num_key_value_heads": 2}
        tokens = 256
    folder = context.work / "qlora"
    common.apart(memory_plan.write_model, folder, config, not context.toy)
    got = common.apart(memory_plan.measured, str(folder), case, tokens, config["vocab_size"], not context.toy)
    planned = memory_plan.planned(config, case, tokens, not context.toy).total
    checks = {"an update was made": got["seconds"] > 0}
    if not context.toy:  # a plan for gigabytes says little of a toy
        goal = memory_plan.GPU_GOAL_GB
        checks[f"at most {goal:g} GB"] = got["allocated"] <= goal * 1e9
        checks[f"within {memory_plan.LIMIT:.0%} of the plan"] = abs(planned / got["allocated"] - 1) <= memory_plan.LIMIT
    print(f"  {got['allocated'] / 1e9:.3f} GB allocated, {planned / 1e9:.3f} planned, {got['seconds']:.2f} s")
    context.write({**got, "planned": planned, "tokens": tokens, "checks": checks})


# ------------------------------------------------------------------------------------------------------------ profile


def slowest(context: Context) -> gpu_sides.Case:
    """Of the updates measured so far the one that gains least on TRL; a DPO update where there is none."""
    measured = [
        (figures["ratio"]["median"], figures)
        for step in context.earlier.values()
        for figures in ((step.get("figures") or {}).get("cases") or {}).values()
    ]
    if not measured:
        return gpu_sides.Case("toy" if context.toy else "1.5b", "dpo", 64, 512, 1, (512,), (1,), context.device)
    _, found = min(measured, key=lambda one: one[0])
    budget = int(found["sides"]["ours"]["setting"].split()[1].rstrip(","))
    names = ("model", "loss", "length", "tokens")
    return gpu_sides.Case(*(found[name] for name in names), 1, (budget,), (1,), context.device)


def profile(context: Context) -> None:
    """Where the time of our update goes, by kernel (on a CPU by operation), and how much of it the device was busy."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    case = slowest(context)
    side = gpu_sides.Ours(model_folder(context, case.model), context.device)
    [(setting, update, _)] = side.settings(case)
    update()
    update()
    kinds = [ProfilerActivity.CPU, *([] if context.toy else [ProfilerActivity.CUDA])]
    started = time.perf_counter()
    with profile(activities=kinds) as recorded:
        update()
        if not context.toy:
            torch.cuda.synchronize()
    wall = time.perf_counter() - started
    at = "self_cpu_time_total" if context.toy else "self_device_time_total"
    averages = sorted(recorded.key_averages(), key=lambda event: -getattr(event, at))
    if not context.toy:  # operations carry the time of their kernels: those alone, not both
        averages = [event for event in averages if str(event.device_type).endswith("CUDA")]
    taken = [(event, getattr(event, at) / 1e6) for event in averages]
    busy = sum(seconds for _, seconds in taken)
    rows = [
        {"name": event.key[:160], "calls": event.count, "seconds": seconds, "share": seconds / busy}
        for event, seconds in taken[:40]
    ]
    for row in rows[:15]:
        print(f"  {row['share']:6.1%} {row['calls']:6d} {row['name'][:90]}")
    context.write(
        {
            "case": vars(case),
            "setting": setting,
            "seconds_while_profiled": wall,
            "busy_seconds": busy,
            "rows": rows,
            "checks": {"operations were recorded": bool(rows)},
        }
    )


def own_tests(context: Context) -> None:
    """tests/gpu under pytest: those of kernels, models and memory. Without a GPU each says why it is skipped."""
    report = context.work / "tests.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", "tests/gpu"]
    status = subprocess.run(command, cwd=Path(__file__).resolve().parents[2]).returncode
    suite = next(ElementTree.parse(report).getroot().iter("testsuite"))
    counts = {name: int(suite.attrib[name]) for name in ("tests", "failures", "errors", "skipped")}
    context.write({**counts, "checks": {"none failed": status == 0, "some were found": counts["tests"] > 0}})
