"""A recipe with all that it names, checked, and the run planned. No torch; under five seconds on text."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack, suppress
from pathlib import Path

from align.check.facts import DataFacts
from align.check.findings import Findings
from align.check.golds import golds_note, require_columns
from align.check.inputs import Rewards, check_reference, open_model, read_data
from align.check.machine import Machine, check_fits, stage_roles
from align.check.needed import check_model_packages, check_packages
from align.check.plan import Plan, Planner
from align.check.rules import check_recipe
from align.check.worlds import Worlds
from align.data.records import Kind
from align.errors import PluginError, RecipeError
from align.losses import Losses
from align.losses import names as loss_names
from align.objectives.check import Known, problems
from align.objectives.trial import try_combiner
from align.plugins import REWARDS, shadowed
from align.recipe.capabilities import SamplingStage
from align.recipe.document import Document
from align.recipe.schema import Recipe
from align.recipe.stages import Stage
from align.stages.choices import merged
from align.stages.context import mix_of
from align.stages.groups import TRUNCATED, refuse_second_truncated, with_penalty
from align.stages.stage_start import check_adapters
from align.stages.training import record_kind
from rewards.find import builtin_names


def validate(
    recipe: Recipe,
    folder: Path,
    *,
    document: Document | None = None,
    every_row: bool = False,
    machine: Machine | None = None,
    cluster: bool = False,
    show: int = 0,
) -> Plan:
    """Check everything that can be known before anything starts, and plan the run.

    Args:
        folder: the recipe's, where plugins are looked for. document: gives errors their lines.
        every_row: read all data, not only the first 1,000 rows of each source.
        show: how many rows of each source are shown as the model sees them (0: one of each whose columns were guessed).
        machine: to plan for (default: this one). cluster: the run joins a cluster, whose size is not known here.

    Raises UserError: the only problem in its own class, or one error that lists all of them.
    """
    found = Findings(document)
    sound = check_recipe(recipe, found)
    check_packages(recipe, found, cluster=cluster)
    plan = Plan(recipe, machine or Machine.here())
    planned = recipe
    rewards, worlds = Rewards(folder), Worlds(folder)
    with ExitStack() as stack:
        planner: Planner | None = None
        with found.gather(key="model"):
            model = stack.enter_context(open_model(recipe, folder))
            if not plan.machine.gpus and not cluster:
                with suppress(PluginError):  # an engine that does not load has been told of, by the rules
                    planned = merged(recipe, model.origin)
            planner = Planner(planned, plan.machine, model)
            plan.notes += [f"model.adapter: {note}" for note in model.notes]
            check_adapters(recipe, model.origin)
            check_model_packages(recipe, model.config, model.origin, found, cluster=cluster)
        for stage in planned.stages:
            _check_rewards(stage, rewards, worlds, found)
            with found.gather(stage.id, "reference"):
                check_reference(stage)
            if stage.id not in sound:
                continue
            if not cluster:
                with found.gather(stage.id):
                    roles = stage_roles(recipe, stage, plan.machine)
                    with found.gather():
                        check_fits(roles, plan.machine)
            if planner is not None:
                _check_stage(recipe, stage, planner, plan, found, folder, rewards, worlds, every_row, show)
                if plan.stages and plan.stages[-1].id == stage.id:
                    plan.stages[-1].lines += rewards.lines(stage.rewarded_by)
        if planner is not None:
            plan.model, plan.sampling = planner.model_line(), planner.sampling
    found.raise_any()
    plan.plugins = {**rewards.sources, **worlds.sources}
    plan.notes += _shadowed(recipe)
    return plan


def _shadowed(recipe: Recipe) -> list[str]:
    """Notes of names that an installed package has as well as we: ours are taken."""
    rewards = {
        (reward.use, "align.rewards", (*builtin_names(), *REWARDS)) for s in recipe.stages for reward in s.every_reward
    }
    losses = {(term.name, "align.losses", loss_names()) for stage in recipe.stages for term in stage.losses}
    return [note for one in sorted(rewards | losses) if (note := shadowed(*one)) is not None]


def _check_rewards(stage: Stage, rewards: Rewards, worlds: Worlds, found: Findings) -> None:
    """Plugins can be loaded, their objectives have names of their own, and `objectives` can work with them."""
    judged = None
    if isinstance(stage, SamplingStage) and stage.eval is not None and stage.eval.rewards:
        judged = rewards.objectives(stage.eval.rewards, stage.id, "eval.rewards", found)
    if not stage.rewarded_by and not stage.worlds:
        return
    known, objectives = rewards.objectives(stage.rewarded_by, stage.id, "rewards", found), stage.weighed
    if stage.worlds:
        known = worlds.objectives(stage, known, found)
    if isinstance(stage, SamplingStage) and stage.eval is not None:
        _check_best(stage, judged if stage.eval.rewards else known, found)
    if known is None or objectives is None:
        return
    penalty = stage.engines.truncated_penalty if stage.engines else None
    if penalty is not None:
        with found.gather(stage.id):
            refuse_second_truncated(known)
        known[TRUNCATED] = Known("cost", (0.0, 1.0))
        objectives = with_penalty(objectives, penalty)
    with found.gather(stage.id, "objectives.combine"):  # a user's combiner is loaded
        wrong = problems(objectives, known)
        for error in wrong:
            found.add(error, stage.id)
        if not wrong and isinstance(stage, SamplingStage):
            try_combiner(objectives, known, min(stage.batch.groups, 4), stage.batch.group_size)


def _check_best(stage: SamplingStage, judged: Mapping[str, Known] | None, found: Findings) -> None:
    """The best checkpoint by an objective is the one with the least of a cost, and the most of a reward."""
    best = stage.save.best
    objective = None if best is None else (judged or {}).get(best.metric.removeprefix("eval/"))
    if best is None or objective is None:
        return
    wanted = "min" if objective.kind == "cost" else "max"
    if best.mode != wanted:
        error = RecipeError(
            f"`save.best` would keep the worst checkpoint: {best.metric} is a {objective.kind}, and mode {best.mode}",
            where="save.best.mode",
            remedy=f"write `best: {{metric: {best.metric}, mode: {wanted}}}`",
        )
        found.add(error, stage.id)


def _check_stage(
    recipe: Recipe,
    stage: Stage,
    planner: Planner,
    plan: Plan,
    found: Findings,
    folder: Path,
    known: Rewards,
    worlds: Worlds,
    every_row: bool,
    show: int,
) -> None:
    """Read a stage's data, then plan it; what fails is kept in `found`."""
    read: dict[str, DataFacts] = {}
    sampled = stage.engines is not None
    for key, sources in stage.datasets.items():
        with found.gather(stage.id, key):
            kind: Kind = "prompt" if sampled else record_kind(stage.losses)
            read[key] = read_data(
                recipe,
                sources,
                kind,
                planner.model,
                seed_of=stage.id,
                folder=folder,
                every_row=every_row,
                answers=stage.judges_pairs,
                margins=not sampled and Losses.of(stage.losses).needs_margin,
                labels=stage.score_head if kind == "labelled" else None,
                losses=() if sampled else stage.losses,
                show=show,
                exhausted=mix_of(stage, key),
                offered=worlds.offered(stage, found) if sampled else None,
            )
    if len(read) < len(stage.datasets):
        return
    with found.gather(stage.id, "environment"):
        for facts in read.values():
            worlds.measure(stage, planner.model.tokenizer, facts, found)
    golds = {key: _golds(stage, key, facts, found, folder, known) for key, facts in read.items()}
    with found.gather(stage.id):
        planned = planner.stage(stage, read.get("data", DataFacts()))
        planned.lines += worlds.lines(stage, planner.model, read.get("data", DataFacts()), found)
        for key, facts in read.items():
            if stage.engines is not None and key != "data":
                planner.checks.length(stage, stage.engines, facts)
            planned.lines += [f"{key}: {line.strip()}" for line in (facts.report.summary if facts.report else [])]
            planned.lines += [f"{key}: {note}" for note in [*facts.notes, *golds.get(key, [])]]
            planned.lines += [line if line.startswith("  ") else f"{key}: {line}" for line in facts.shown]
        plan.stages.append(planned)


def _golds(stage: Stage, key: str, facts: DataFacts, found: Findings, folder: Path, known: Rewards) -> list[str]:
    """Notes of rewards that miss the answer in some of the rows they will judge; those that could not be called are
    refused."""
    rewards, of = stage.rewarded_by, "rewards"
    if key != "data" and isinstance(stage, SamplingStage) and stage.eval is not None and stage.eval.rewards:
        rewards, of = stage.eval.rewards, "eval.rewards"
    notes = []
    for number, reward in enumerate(rewards):
        with found.gather(stage.id, f"{of}.{number}"):
            require_columns(known.known(reward), facts.prompts)
            note = golds_note(reward, folder, facts.prompts)
            notes += [f"note: {note}"] if note else []
    return notes
