"""`align run`: run a recipe from data to artefacts.

It goes on from where a run stopped. The driver holds paths, token ids and numbers, never a model's tensors. It starts
(or joins) Ray, runs the pipeline, and leaves nothing behind: no process, no folder in the memory file system, no
socket.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
from contextlib import ExitStack
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from align.check.machine import Machine
from align.check.plan import Plan
from align.check.validate import validate
from align.cli.arguments import add_recipe
from align.errors import Interrupted, LostError
from align.recipe.load import dump_recipe, load_document
from align.recipe.shipping import python_files
from align.report.plots import write_report
from align.report.progress import Reporter
from align.shared_files import keep_sources
from align.stages import processes
from align.stages.owned import sweep
from align.stages.pipeline import run_pipeline
from align.stages.publication import PublicationFolder
from align.stages.reaper import Reaper
from align.stages.restarts import MAX_RESTARTS
from align.stages.runfolder import RUN, RunFolder, require_known

if TYPE_CHECKING:
    from align.actors.head import HeadWatch

_CHILDREN_LIMIT_S = 10.0


def add(parser: argparse.ArgumentParser) -> None:
    add_recipe(parser)
    parser.add_argument("--resume", action="store_true", help="continue an interrupted run; finished stages are kept")
    parser.add_argument("--from-stage", metavar="ID", help="run this stage and those after it again (implies --resume)")
    parser.add_argument("--address", metavar="ADDRESS", help="join a Ray cluster instead of starting one here")
    parser.add_argument("--cores", type=int, metavar="N", help="cores of this machine to use (default: all)")
    parser.add_argument(
        "--plugins", metavar="FOLDER", help="where rewards are looked for (default: the recipe's folder)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Run the recipe; returns the exit code. Raises AlignError with place and remedy.

    arguments: recipe (path), overrides (key=value), resume, from_stage (stage id or None), address (of a Ray cluster
    or None), cores (of this machine, or None for all), plugins (folder, or None for the recipe's).
    """
    signal.signal(signal.SIGTERM, _as_interrupt)
    recipe, document = load_document(arguments.recipe, arguments.overrides)
    if arguments.from_stage is not None:  # before anything is made
        require_known(recipe, arguments.from_stage)
    folder = Path(os.path.abspath(arguments.plugins or Path(arguments.recipe).parent))
    machine = Machine.here(arguments.cores)
    plan = validate(recipe, folder, document=document, machine=machine, cluster=arguments.address is not None)
    resume = arguments.resume or arguments.from_stage is not None
    opened = RunFolder.open(recipe, dump_recipe(recipe), resume=resume, cwd=folder)
    with ExitStack() as stack:
        stack.callback(opened.ended)
        stack.callback(_end_children)
        reporter = Reporter(opened.path, recipe)
        stack.callback(reporter.close)
        summary = _run(plan, opened, reporter, arguments, folder)
        reporter.closing_table(summary)
        curves = write_report(opened.path, summary)
        if curves is not None:
            reporter.message(f"curves in {curves}")
    return 0


def _run(plan: Plan, run: RunFolder, reporter: Reporter, arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The pipeline on its cluster; both are gone when this returns or raises."""
    from align.actors.build import RayBackend
    from align.actors.cluster import Cluster
    from align.actors.head import native_output

    with ExitStack() as stack:
        sweep(run.path, say=reporter.message)
        stack.enter_context(Reaper(run.path / RUN))
        reporter.message(f"run folder: {run.path}")
        if run.is_new and (arguments.resume or arguments.from_stage is not None):
            reporter.message("there was no run in it to go on with: this one begins with the first stage")
        if run.lock is not None and run.lock.note:
            reporter.message(run.lock.note)
        if arguments.address is not None:
            keep_sources(python_files(plan.recipe, folder), run.path)
        stack.enter_context(native_output(run.path / "logs"))
        cluster = Cluster(arguments.address, run_folder=run.path, cores=arguments.cores)
        stack.callback(cluster.close)
        watch = cluster.watch
        # nodes of a cluster come and go, and the driver may be on none of them
        publications = PublicationFolder(run.path, shared=not cluster.local)
        stack.callback(publications.close)
        placement = plan.recipe.placement
        backend = RayBackend(cluster, placement, run.token, run.state.get("threads", {}), plan.sampling)
        allowed = placement.max_restarts
        return asyncio.run(
            _until_done(
                reporter,
                run,
                watch,
                lambda stop: run_pipeline(
                    plan.recipe,
                    run,
                    backend,
                    reporter,
                    publications,
                    recipe_folder=folder,
                    plugins=plan.plugins,
                    stop=stop,
                    from_stage=arguments.from_stage,
                    max_restarts=allowed if allowed is not None else 0 if cluster.local else MAX_RESTARTS,
                ),
            )
        )


async def _until_done(reporter: Reporter, run: RunFolder, watch: HeadWatch, start: Any) -> dict[str, Any]:
    """Await the pipeline. The first Ctrl-C (or SIGTERM) lets the step finish and saves; the second ends it at once, and
    so do a run folder that another driver has by now, and a cluster without its head."""
    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    task: asyncio.Task[dict[str, Any]] = asyncio.ensure_future(start(stop))

    def interrupted() -> None:
        if stop.is_set():
            task.cancel()
        else:
            stop.set()
            reporter.message("stopping after this step, with a checkpoint; once more stops at once")

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, interrupted)
    if run.lock is not None:
        run.lock.on_lost = lambda error: loop.call_soon_threadsafe(task.cancel)
    watch.on_gone = lambda error: loop.call_soon_threadsafe(task.cancel)
    try:
        return await task
    except LostError as error:  # of an actor: perhaps the first to notice
        if (gone := watch.look()) is not None:
            raise _gone(gone, stop) from error
        raise
    except asyncio.CancelledError:
        if run.lock is not None and run.lock.lost is not None:
            raise run.lock.lost from None
        if watch.gone is not None:
            raise _gone(watch.gone, stop) from None
        raise Interrupted(
            "stopped at once, without a new checkpoint", remedy="--resume continues from the last one"
        ) from None
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)


def _gone(error: LostError, stop: asyncio.Event) -> LostError:
    """The loss of Ray's head; what ends every process of a job, the driver among them, is the usual cause of one that
    comes while the run is stopping."""
    if not stop.is_set():
        return error
    return LostError(
        f"{error.what}, while the run was stopping: no new checkpoint was saved",
        remedy="--resume continues from the last one; a signal that reaches all processes of a job ends Ray too: send "
        f"SIGTERM to the driver alone (here process {os.getpid()}), early enough for a step to finish",
    )


def _as_interrupt(number: int, frame: FrameType | None) -> None:
    """SIGTERM outside of the pipeline ends as Ctrl-C does: through every clean-up."""
    raise KeyboardInterrupt


def _end_children() -> None:
    """Nothing that this run started may outlive it: what is still there after a grace is ended."""
    processes.end(processes.descendants("left over"), grace_s=_CHILDREN_LIMIT_S)
