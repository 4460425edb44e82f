"""What a run will do, stage by stage: computed without torch, printed by `align check`, handed to `align run`."""

from __future__ import annotations

from dataclasses import dataclass, field

from align.check.facts import DataFacts
from align.check.inputs import ModelFacts
from align.check.layout_notes import layout_notes
from align.check.machine import Machine, stage_roles
from align.check.memory import sizes as memory
from align.check.memory.plan import Estimate
from align.check.memory.stage import SeenBy, dtype_of
from align.check.objective_words import objective_words
from align.check.stage_checks import StageChecks
from align.check.stage_words import (
    PUBLISHED,
    adapter_words,
    batch_words,
    head_words,
    lacking_notes,
    loop_lines,
    loss_notes,
    role_words,
    steps_words,
    updates_words,
)
from align.check.trained import Measured, table_lines
from align.data.media.opening import takes_media
from align.data.order import BatchPlan
from align.model.scoring_class import SEEING, nobody_elses
from align.recipe.capabilities import BEFORE_ANY, FolderStage, JudgingStage, SamplingStage, StageBase, TrainStage
from align.recipe.schema import Recipe
from align.recipe.served import refuse_unserved
from align.recipe.stages import Stage
from align.recipe.support import publish_mode, reference_words
from align.stages.context import stage_seed
from align.stages.jobs import reference_of
from align.stages.roles import Role, sampling_threads
from align.stages.stage_start import adapter_of, model_adapter, trained_by


@dataclass
class StagePlan:
    """One stage. lines: what it does, for a person. steps: None where the data were not read to their end."""

    id: str
    kind: str
    steps: int | None = None
    roles: list[Role] = field(default_factory=list)
    memory: dict[str, Estimate] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)


@dataclass
class Plan:
    """The whole run. plugins: SHA-256 of each reward's source by its `use`, what a resumed run compares.
    sampling: threads of each engine where the model's size decides them."""

    recipe: Recipe
    machine: Machine
    model: str = ""
    stages: list[StagePlan] = field(default_factory=list)
    plugins: dict[str, str] = field(default_factory=dict)
    sampling: int | None = None
    notes: list[str] = field(default_factory=list)


class Planner:
    """Plans the stages of a recipe on a machine, from what was read of its inputs."""

    def __init__(self, recipe: Recipe, machine: Machine, model: ModelFacts):
        self.recipe, self.machine, self.model = recipe, machine, model
        self.sizes = memory.sizes_of(model.config, model.tokenizer.vocab_size)
        self.sampling = sampling_threads(self.sizes.parameters if self.sizes and not machine.gpus else None)
        self.checks = StageChecks(recipe, machine, model, self.sizes)
        scratch = None if recipe.model.path else model.tokenizer.vocab_size
        self.measured = Measured(model.config, scratch)

    def model_line(self) -> str:
        model = self.recipe.model
        where = f"{model.path or 'from scratch'}" + (f" with the adapter {model.adapter}" if model.adapter else "")
        kind = self.model.config.get("model_type", "?")
        size = f", {memory.count(self.sizes.parameters)} parameters" if self.sizes else ""
        tokens = f"{self.model.tokenizer.vocab_size} tokens"
        measured = model.dtype == "auto" and not self.machine.gpus
        dtype = ", dtype auto (float32 or bfloat16: measured when the run begins)" if measured else ""
        return f"{where} ({kind}{size}, {tokens}), attention {self.attention()}{dtype}"

    def attention(self) -> str:
        """The kernel that is meant; the probe at load may find that the model needs another."""
        model = self.recipe.model
        if model.attention != "auto":
            return model.attention
        half = self.machine.gpus > 0 and dtype_of(True, model.dtype) != "float32"
        return f"auto ({'varlen' if half else 'sdpa'})"

    def stage(self, stage: Stage, facts: DataFacts) -> StagePlan:
        """What a stage will do with data of which `facts` are known. Raises UserError where it cannot run."""
        if isinstance(stage, TrainStage):
            return self._training(stage, facts)
        return self._files(stage) if isinstance(stage, FolderStage) else self._evaluation(stage, facts)

    def _training(self, stage: TrainStage, facts: DataFacts) -> StagePlan:
        if stage.from_ is None:
            self.checks.head(stage)
        self.checks.attention()
        adapter = adapter_of(self.recipe, stage, self.model.origin)
        experts = self.checks.experts(adapter)
        self.checks.quantised(stage, adapter)
        optim = stage.optim_for(adapter)
        steps = self._steps(stage, facts)
        plan = StagePlan(stage.id, stage.kind, steps, self.roles(stage))
        table = self.measured.table(adapter)
        losses = " + ".join(t.name if t.weight == 1 else f"{t.weight:g} {t.name}" for t in stage.loss)
        plan.lines += [
            f"starts from {stage.from_ or 'the model'}; trains {adapter_words(adapter, self.sizes, table)}"
            f"{head_words(stage)}; loss {losses}",
            f"reference: {reference_words(adapter, reference_of(stage), self._continues(stage))}",
            f"{steps_words(steps)} of {batch_words(stage)}; lr {optim.lr:g} {optim.schedule}, "
            f"warm-up {100 * (optim.warmup or 0):g} %",
        ]
        if table is not None:
            plan.lines += table_lines(table, stage.rates_for(adapter))
        plan.lines += experts
        if isinstance(stage, SamplingStage):
            self.checks.length(stage, stage.rollout, facts)
            kind = str(self.model.config.get("model_type"))
            refuse_unserved(kind, publish_mode(adapter, stage.rollout), stage.rollout)
            plan.lines.append(
                f"engines: {stage.rollout.workers} x {stage.rollout.name}, "
                f"receive {PUBLISHED[publish_mode(adapter, stage.rollout)]}; "
                f"at most {stage.rollout.max_tokens} tokens at temperature {stage.rollout.temperature:g}"
            )
            plan.lines.append(f"objectives: {objective_words(stage.objectives)}")
            plan.lines += updates_words(stage)
            plan.lines += loop_lines(stage)
        else:
            self.checks.positions(facts)
            if facts.whole and facts.trees:
                plan.lines += lacking_notes(stage, facts.trees, self._order(stage, facts))
            if stage.score_head is not None:
                self.checks.padding()
        if stage.judges_pairs:
            plan.lines.append("margins: before the stage, rewards judge both answers of each pair; scores are kept")
        plan.lines += loss_notes(stage) + self._packing_notes(stage, facts)
        plan.lines += layout_notes(self.model.config, facts.sampled(stage) if stage.engines else facts.longest)
        if self.sizes is None:
            plan.lines.append("memory: not estimated, the architecture is not a plain decoder")
        else:
            seen = SeenBy(self.recipe, self.machine, self.model.config, self.sizes, table)
            plan.memory, said = seen.memory(stage, adapter, facts, plan.roles)
            plan.lines += said
        return plan

    def _evaluation(self, stage: JudgingStage, facts: DataFacts) -> StagePlan:
        plan = StagePlan(stage.id, stage.kind, len(stage.of), self.roles(stage))
        origin = self.model.origin
        judged = [adapter_of(self.recipe, trained_by(self.recipe, name), origin) for name in stage.judged]
        judged += [model_adapter(origin)] if BEFORE_ANY in stage.of else []
        if stage.engines and any(adapter.kind != "full" for adapter in judged):
            self.checks.quantised(stage, None)  # the adapter is merged for the engine
        how = f"greedy completions from {stage.rollout.name}" if stage.engines else "loss metrics"
        plan.lines.append(f"evaluates {', '.join(stage.of)}: {how} on {facts.rows}{'' if facts.whole else '+'} rows")
        if stage.engines:
            self.checks.length(stage, stage.engines, facts)
        return plan

    def _files(self, stage: FolderStage) -> StagePlan:
        self.checks.quantised(stage, None)
        source = trained_by(self.recipe, stage.from_) if stage.from_ else None
        model_type = str(self.model.config.get("model_type"))
        sees = takes_media(self.model.config) and model_type not in SEEING
        if stage.for_others and sees and source is not None and source.score_head is not None:
            raise nobody_elses(model_type)
        line = f"{stage.does} {stage.from_ or 'the model'} into {self.recipe.run_folder / stage.id / 'model'}"
        return StagePlan(stage.id, stage.kind, 1, self.roles(stage), lines=[line])

    def roles(self, stage: StageBase) -> list[Role]:
        return stage_roles(self.recipe, stage, self.machine, self.sampling)

    def _continues(self, stage: StageBase) -> bool:
        """Whether the stage starts from an adapter that was trained before."""
        if stage.from_ is None:
            return self.recipe.model.adapter is not None
        source = self.recipe.stage(stage.from_.partition("@")[0])
        return not source.makes_folder and adapter_of(self.recipe, source, self.model.origin).kind != "full"

    def _steps(self, stage: TrainStage, facts: DataFacts) -> int | None:
        if stage.steps is None and not facts.whole:
            return None
        if isinstance(stage, SamplingStage):
            return stage.turns(facts.rows)
        return self._order(stage, facts).total

    def _order(self, stage: TrainStage, facts: DataFacts) -> BatchPlan:
        return BatchPlan.of(stage, max(facts.rows, 1), stage_seed(self.recipe.seed, stage.id))

    def _packing_notes(self, stage: TrainStage, facts: DataFacts) -> list[str]:
        gpu, what = self.machine.gpus > 0, "prompt" if stage.engines else "example"
        budget, patches = stage.packing.budget(gpu), stage.packing.patches(gpu)
        said = []
        if stage.engines is None and facts.longest > budget:
            said.append(f"note: the largest example has {facts.longest} tokens and is computed alone (budget {budget})")
        if facts.most_patches > patches:
            said.append(
                f"note: the media of the largest {what} are {facts.most_patches} patches, more than "
                f"`packing.max_patches` ({patches}): it is computed alone; `media.max_pixels` makes images smaller"
            )
        return said


def lines(plan: Plan, shown: str) -> list[str]:
    """The plan for a terminal."""
    recipe, machine = plan.recipe, plan.machine
    stages = f"{len(recipe.stages)} stage{'s' if len(recipe.stages) != 1 else ''}"
    out = [
        f"recipe   {shown}: {recipe.name}, seed {recipe.seed}, {stages} -> {recipe.run_folder}",
        f"model    {plan.model}",
        f"machine  {machine.cores} cores, {machine.gpus:g} GPUs, {memory.human(machine.memory)}",
    ]
    for stage in plan.stages:
        out.append(f"\n{stage.id} ({stage.kind})")
        out += [f"  {line}" for line in stage.lines]
        if stage.roles:
            out.append("  placement: " + ", ".join(role_words(role) for role in stage.roles))
        out += [f"  memory, {who}: about {estimate}" for who, estimate in stage.memory.items()]
    return out + ([""] + [f"note: {note}" for note in plan.notes] if plan.notes else [])
