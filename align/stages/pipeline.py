"""A recipe's stages, one after another: what each starts from, what it makes, what a second start may skip.

The pipeline holds paths, trees and numbers. Models live behind the `Backend`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from align.data.scratch import train_tokenizer
from align.export.formats import OWN
from align.hub import resolve_model_folder
from align.plugin_modules import texts_in
from align.recipe.capabilities import JudgingStage, TrainStage
from align.recipe.families import family_of
from align.recipe.schema import Recipe
from align.recipe.stages import ExportStage, MergeStage, Stage
from align.recipe.trained_on import require_base
from align.stages.backend import Backend, Start
from align.stages.choices import settle
from align.stages.context import Context, stage_seed
from align.stages.evaluate import judging_needs, run_evaluate
from align.stages.files import remove_folder, remove_leftovers, written_aside
from align.stages.fingerprint import fingerprint
from align.stages.jobs import needs_of
from align.stages.loop import Report, StageResult
from align.stages.manifest import BASE, require_artefact, write_manifest
from align.stages.manifest import NAME as MANIFEST
from align.stages.media_limits import carry_limits
from align.stages.metrics_file import METRICS, cut_metrics, finite, last_line
from align.stages.publication import PublicationFolder
from align.stages.restarts import Restarts
from align.stages.runfolder import RunFolder
from align.stages.stage_start import Origin, check_adapters, judged_start, start_of
from align.stages.training import run_offline, run_online


async def run_merge(context: Context, stage: MergeStage) -> StageResult:
    """One plain model folder at `<stage>/model`, proved equal to base and adapter; without adapter, a copy."""

    async def make(start: Start, target: Path) -> Mapping[str, Any]:
        if start.adapter is None:
            return await context.backend.export(start.base, target, format=OWN, dtype=stage.dtype)
        return await _merged(context, stage, start, target)

    return await _one_folder(context, stage, make)


async def _merged(context: Context, stage: MergeStage | ExportStage, start: Start, target: Path) -> Mapping[str, Any]:
    assert start.adapter is not None, "a start without adapter is a whole model"
    return await context.backend.merge(
        start.base,
        start.adapter,
        target,
        dtype=stage.dtype,
        seed=context.seed(stage.id),
        chat=context.carried(start).files,
    )


async def run_export(context: Context, stage: ExportStage) -> StageResult:
    """The model of the stage before, merged where it has an adapter, converted and proved to load."""

    async def make(start: Start, target: Path) -> Mapping[str, Any]:
        source, warnings = start.base, ()
        if start.adapter is not None:
            source = target.with_name(".writing-merged")
            warnings = (await _merged(context, stage, start, source)).get("warnings", ())
        report = await context.backend.export(source, target, format=stage.format, dtype=stage.dtype)
        return {**report, "warnings": warnings}

    return await _one_folder(context, stage, make)


async def _one_folder(
    context: Context, stage: MergeStage | ExportStage, make: Callable[[Start, Path], Awaitable[Mapping[str, Any]]]
) -> StageResult:
    """Have `make` write `<stage>/model` from what the stage starts from; numbers of its report are the metrics,
    its warnings are said."""
    context.report.stage_started(stage.id, 1, stage.kind)
    begun = time.perf_counter()
    start = start_of(context.recipe, stage, context.origin, context.run.finished())
    target = context.run.stage_folder(stage.id) / "model"
    remove_folder(target)  # a run that was killed right after writing it
    try:
        report = await make(start, target)
    finally:
        remove_leftovers(target.parent)
    for warning in report.get("warnings", ()):
        context.report.message(f"{stage.id}: {warning}")
    context.carried(start).files.write(target, start.base)
    carry_limits(target, context.recipe.media)
    metrics = {k: float(v) for k, v in report.items() if isinstance(v, int | float)}
    context.report.step(stage.id, 1, metrics)
    return StageResult(1, time.perf_counter() - begun, 0.0, metrics, {"model": str(target)})


RUNNERS: dict[str, Callable[[Context, Any], Awaitable[StageResult]]] = {
    "sft": run_offline,
    "preference": run_offline,
    "reward_model": run_offline,
    "classify": run_offline,
    "online": run_online,
    "evaluate": run_evaluate,
    "merge": run_merge,
    "export": run_export,
}


async def run_pipeline(
    recipe: Recipe,
    run: RunFolder,
    backend: Backend,
    report: Report,
    publications: PublicationFolder,
    *,
    recipe_folder: Path,
    plugins: Mapping[str, str],
    stop: asyncio.Event,
    from_stage: str | None = None,
    max_restarts: int = 0,
) -> dict[str, Any]:
    """Run every stage that is not finished in `run`; returns summary.json's content.

    plugins: source hash of each reward by its `use`. max_restarts: see `Restarts`. Raises what stages raise:
    Interrupted after a checkpoint when `stop` is set, AlignError with place and remedy otherwise.
    """
    if from_stage is not None:
        for name in run.restart_from(recipe, from_stage):
            report.message(f"set aside: {name}")
    run.record(backend.processes(), backend.threads())
    prints = {stage.id: fingerprint(recipe, stage, plugins, recipe_folder) for stage in recipe.stages}
    run.compare(recipe, lambda stage: prints[stage.id])
    if (following := next((s for s in recipe.stages if s.id not in run.finished()), None)) is not None:
        _expect(following, backend)
    origin = await _origin(recipe, run, backend, report)
    check_adapters(recipe, origin)
    recipe = await settle(recipe, run, origin, backend, report.message)
    restarts = Restarts(max_restarts, run, report.message)
    context = Context(recipe, run, backend, report, publications, recipe_folder, stop, origin)
    compared: set[Path] = set()
    with closing(context):
        for stage in recipe.stages:
            if stage.id in run.finished():
                for line in await asyncio.to_thread(run.require_kept, stage.id):
                    report.message(line)
                report.message(f"{stage.id}: finished before, kept")
                continue
            context.raise_if_stopped(stage.id)
            for path in _used(context, stage) - compared:
                await asyncio.to_thread(require_artefact, path)
                compared.add(path)
            await _run_stage(context, stage, prints[stage.id], restarts)
    return run.summary()


def _expect(stage: Stage, backend: Backend) -> None:
    """Let the processes of a stage load their libraries while its rows are read."""
    engine = stage.engines.name if stage.engines else None
    if isinstance(stage, TrainStage):
        backend.expect(needs_of(stage), engine)
    elif isinstance(stage, JudgingStage):
        backend.expect(judging_needs(stage), engine)


def _used(context: Context, stage: Stage) -> set[Path]:
    """The folders that a stage starts from or judges, and those that its settings name (a reference, a judge)."""
    done = context.run.finished()
    if isinstance(stage, JudgingStage):
        starts = [judged_start(context.recipe, name, context.origin, done) for name in stage.of]
    else:
        starts = [start_of(context.recipe, stage, context.origin, done)]
    named = {Path(text) for text in texts_in(stage.model_dump(mode="json")) if text.startswith("/")}
    return {path for start in starts for path in (start.base, start.adapter) if path is not None} | named


async def _run_stage(context: Context, stage: Stage, mark: Mapping[str, Any], restarts: Restarts) -> None:
    run = context.run
    run.stage_folder(stage.id).mkdir(parents=True, exist_ok=True)
    run.clean(stage.id)
    run.begin(stage.id, mark, _start_json(context, stage))
    _expect(stage, context.backend)

    async def attempt() -> StageResult:
        if not stage.trains:
            cut_metrics(run.stage_folder(stage.id) / METRICS, -1)  # it starts over: nothing of it is resumed
        return await RUNNERS[stage.kind](context, stage)

    result = await restarts.survive(stage.id, attempt)
    last = last_line(run.stage_folder(stage.id) / METRICS)
    if last.get("step") == result.steps:  # a start that found every turn done knows of none
        result = replace(result, metrics={**finite(last), **result.metrics})
    summary = {**result.to_json(), "restarts": restarts.count(stage.id), **run.forward_of(stage.id)}
    artefacts = [Path(path) for path in result.artefacts.values()]
    manifest = await asyncio.to_thread(write_manifest, run.stage_folder(stage.id), artefacts)
    run.summarise(stage.id, summary)
    run.finish(stage.id, result.artefacts, idle=result.idle, manifest=manifest)
    context.report.stage_finished(stage.id, summary)


def _start_json(context: Context, stage: Stage) -> dict[str, str | None]:
    """On which folders the stage is built, for the stages after it and for the reader of run.json."""
    if not stage.makes_model:
        return {}
    start = start_of(context.recipe, stage, context.origin, context.run.finished())
    return {"base": str(start.base), "adapter": str(start.adapter) if start.adapter else None}


async def _origin(recipe: Recipe, run: RunFolder, backend: Backend, report: Report) -> Origin:
    """The model before the first stage: a local folder or hub snapshot, or `<run>/base`, written once from the seed."""
    model = recipe.model
    if model.path is not None:
        base = await asyncio.to_thread(resolve_model_folder, model.path, model.revision)
        adapter = await asyncio.to_thread(resolve_model_folder, model.adapter) if model.adapter else None
        if adapter is not None:
            for note in require_base(base, adapter, anyway=model.other_base, flag="`model.other_base: true`"):
                report.message(f"model.adapter: {note}")
        return Origin(base, adapter)
    base = run.path / BASE
    if not base.exists():
        assert model.tokenizer is not None, "the recipe's grammar ties `config` and `tokenizer`"
        report.message("base: training the tokenizer and writing the model from scratch")
        with written_aside(base) as aside:
            await asyncio.to_thread(train_tokenizer, model.tokenizer, aside, family=family_of(model.config))
            await backend.write_base(model, aside, stage_seed(recipe.seed, "base"))
        (run.path / MANIFEST).unlink(missing_ok=True)
    if not (run.path / MANIFEST).exists():
        await asyncio.to_thread(write_manifest, run.path, [base])
    return Origin(base, None)
