"""What a run will do, stage by stage: computed without torch, printed by `align check`, handed to `align run`."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from align.cli import memory
from align.cli.inputs import DataFacts, ModelFacts
from align.cli.memory_plan import Estimate
from align.cli.memory_stage import SeenBy, dtype_of
from align.cli.objective_words import objective_words
from align.cli.trained import Measured, table_lines
from align.data.media.opening import takes_media
from align.data.order import DEFAULT_BATCH, BatchPlan
from align.errors import DataError, ModelError, PlacementError, RecipeError, Unsupported
from align.losses import configure
from align.model.scoring_class import SEEING, nobody_elses
from align.recipe.adapter import Adapter
from align.recipe.labels import Labels
from align.recipe.schema import Recipe
from align.recipe.served import refuse_unserved
from align.recipe.support import publish_mode, reference_words
from align.stages.backend import Needs
from align.stages.context import stage_seed
from align.stages.defaults import resolved_optim, resolved_rates
from align.stages.handover import adapter_of, trained_by
from align.stages.roles import Role, roles_of, sampling_threads
from align.stages.training import SCORED, head_of, needs_of, online_turns, record_kind, reference_of


@dataclass(frozen=True)
class Machine:
    """Cores, GPUs and bytes of memory of the machine that a run would start its own cluster on. gpu_memory: of its
    smallest GPU; 0 where it is not known."""

    cores: int
    gpus: float
    memory: int
    gpu_memory: int = 0

    @classmethod
    def here(cls, cores: int | None = None) -> Machine:
        """This machine, or so many of its cores. Raises PlacementError for more than it has, or none."""
        there = os.cpu_count() or 1
        if cores is not None and not 1 <= cores <= there:
            raise PlacementError(f"{cores} of {there} cores", where="--cores", remedy=f"give 1 to {there}")
        gpus, memory = _gpus(), os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return cls(cores or there, gpus, memory, _gpu_memory() if gpus else 0)


def _gpus() -> int:
    """NVIDIA GPUs that Ray will count: those CUDA_VISIBLE_DEVICES leaves of those that the driver shows."""
    present = list(Path("/proc/driver/nvidia/gpus").glob("*"))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return len(present)
    return min(len(present), len([name for name in visible.split(",") if name.strip() not in ("", "-1")]))


def _gpu_memory() -> int:
    """Bytes of the smallest GPU, as the driver's tool says; 0 where it says nothing."""
    asked = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(asked, capture_output=True, text=True, timeout=10, check=True).stdout
        return min((int(line) for line in said.split("\n") if line.strip()), default=0) << 20
    except (OSError, subprocess.SubprocessError, ValueError):
        return 0


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


# ------------------------------------------------------------------------------------------------- a stage


class Planner:
    """Plans the stages of a recipe on a machine, from what was read of its inputs."""

    def __init__(self, recipe: Recipe, machine: Machine, model: ModelFacts):
        self.recipe, self.machine, self.model = recipe, machine, model
        self.sizes = memory.sizes_of(model.config, model.tokenizer.vocab_size)
        self.sampling = sampling_threads(self.sizes.parameters if self.sizes and not machine.gpus else None)
        scratch = None if recipe.model.path else model.tokenizer.vocab_size
        self.measured = Measured(model.config, scratch)

    def model_line(self) -> str:
        where = self.recipe.model.path or "from scratch"
        kind = self.model.config.get("model_type", "?")
        size = f", {memory.count(self.sizes.parameters)} parameters" if self.sizes else ""
        return f"{where} ({kind}{size}, {self.model.tokenizer.vocab_size} tokens), attention {self.attention()}"

    def attention(self) -> str:
        """The kernel that is meant; the probe at load may find that the model needs another."""
        model = self.recipe.model
        if model.attention != "auto":
            return model.attention
        half = self.machine.gpus > 0 and dtype_of(True, model.dtype) != "float32"
        return f"auto ({'varlen' if half else 'sdpa'})"

    def training(self, stage: Any, facts: DataFacts) -> StagePlan:
        """A stage that trains. Raises UserError where it cannot run."""
        if stage.from_ is None:
            self._check_head(stage)
        self._check_attention()
        adapter = adapter_of(self.recipe, stage, self.model.origin)
        self._check_experts(adapter)
        optim = resolved_optim(stage, adapter)
        steps = self._steps(stage, facts)
        plan = StagePlan(stage.id, stage.kind, steps, self.roles(stage))
        table = self.measured.table(adapter)
        losses = " + ".join(t.name if t.weight == 1 else f"{t.weight:g} {t.name}" for t in stage.loss)
        plan.lines += [
            f"starts from {stage.from_ or 'the model'}; trains {_adapter_words(adapter, self.sizes, table)}"
            f"{_head_words(stage)}; loss {losses}",
            f"reference: {reference_words(adapter, reference_of(stage), self._continues(stage))}",
            f"{_steps_words(steps)} of {_batch_words(stage)}; lr {optim.lr:g} {optim.schedule}, "
            f"warm-up {100 * (optim.warmup or 0):g} %",
        ]
        if table is not None:
            plan.lines += table_lines(table, resolved_rates(stage, adapter))
        if stage.kind == "online":
            self._check_length(stage.rollout, facts)
            kind = str(self.model.config.get("model_type"))
            refuse_unserved(kind, publish_mode(adapter, stage.rollout), stage.rollout)
            plan.lines.append(
                f"engines: {stage.rollout.workers} x {stage.rollout.name}, "
                f"receive {_PUBLISHED[publish_mode(adapter, stage.rollout)]}; "
                f"at most {stage.rollout.max_tokens} tokens at temperature {stage.rollout.temperature:g}"
            )
            plan.lines.append(f"objectives: {objective_words(stage.objectives)}")
            plan.lines += _updates_words(stage)
            plan.lines += _loop_lines(stage)
        else:
            self._check_positions(facts)
            if stage.kind in SCORED:
                self._check_padding()
        if stage.kind == "preference" and stage.rewards:
            plan.lines.append("margins: before the stage, rewards judge both answers of each pair; scores are kept")
        plan.lines += _loss_notes(stage) + self._packing_notes(stage, facts)
        if self.sizes is None:
            plan.lines.append("memory: not estimated, the architecture is not a plain decoder")
        else:
            seen = SeenBy(self.recipe, self.machine, self.model.config, self.sizes, table)
            plan.memory, said = seen.memory(stage, adapter, facts, plan.roles)
            plan.lines += said
        return plan

    def evaluation(self, stage: Any, facts: DataFacts) -> StagePlan:
        plan = StagePlan(stage.id, stage.kind, len(stage.of), self.roles(stage))
        how = f"greedy completions from {stage.rollout.name}" if stage.rewards else "loss metrics"
        plan.lines.append(f"evaluates {', '.join(stage.of)}: {how} on {facts.rows}{'' if facts.whole else '+'} rows")
        if stage.rewards:
            self._check_length(stage.rollout, facts)
        return plan

    def files(self, stage: Any) -> StagePlan:
        source = trained_by(self.recipe, stage.from_) if stage.from_ else None
        model_type = str(self.model.config.get("model_type"))
        sees = takes_media(self.model.config) and model_type not in SEEING
        if stage.kind == "export" and sees and source is not None and source.kind in SCORED:
            raise nobody_elses(model_type)
        what = "merges" if stage.kind == "merge" else "exports"
        line = f"{what} {stage.from_ or 'the model'} into {self.recipe.run_folder / stage.id / 'model'}"
        return StagePlan(stage.id, stage.kind, 1, self.roles(stage), lines=[line])

    def _check_experts(self, adapter: Adapter) -> None:
        """Stacked experts are no linear layers: most weights of such a model would stay as they are."""
        if adapter.quant is not None and self.sizes is not None and self.sizes.experts > 1:
            raise Unsupported(
                f"four bits are for linear layers; this model's {self.sizes.experts} experts a block are stacked in "
                "tensors of their own",
                where="adapter.kind",
                remedy="use `kind: lora` with `model.dtype: bfloat16`",
            )

    def _check_attention(self) -> None:
        """Kernels of a GPU need one, and flash attention half precision."""
        model = self.recipe.model
        if model.attention in ("varlen", "flex") and not self.machine.gpus:
            raise PlacementError(
                f"`model.attention: {model.attention}` needs an NVIDIA GPU, and this machine has none",
                where="model.attention",
                remedy="use auto, which is sdpa here",
            )
        if model.attention == "varlen" and model.dtype == "float32":
            raise RecipeError(
                "`model.attention: varlen` computes in half precision, and `model.dtype` is float32",
                where="model.attention",
                remedy="set `model.dtype: bfloat16`, or use auto",
            )

    def roles(self, stage: Any) -> list[Role]:
        return stage_roles(self.recipe, stage, self.machine, self.sampling)

    def _continues(self, stage: Any) -> bool:
        """Whether the stage starts from an adapter that was trained before."""
        if stage.from_ is None:
            return self.recipe.model.adapter is not None
        source = self.recipe.stage(stage.from_.partition("@")[0])
        return (
            source.kind not in ("merge", "export") and adapter_of(self.recipe, source, self.model.origin).kind != "full"
        )

    # -------------------------------------------------------------------------------------------- lengths

    def _steps(self, stage: Any, facts: DataFacts) -> int | None:
        if stage.steps is None and not facts.whole:
            return None
        if stage.kind == "online":
            return online_turns(stage, facts.rows)
        return BatchPlan.of(stage, max(facts.rows, 1), stage_seed(self.recipe.seed, stage.id)).total

    def _check_length(self, rollout: Any, facts: DataFacts) -> None:
        """Prompt and completion must fit the engine, which fits the model."""
        needed = facts.longest + rollout.max_tokens
        limit, key = rollout.max_model_len, "rollout.max_model_len"
        positions = self.sizes.max_positions if self.sizes else None
        if positions is not None and (limit is None or limit > positions):
            if limit is not None:
                raise RecipeError(
                    f"`{key}: {limit}` is more than the model's {positions} positions",
                    where=key,
                    remedy=f"at most {positions}",
                )
            limit, key = positions, "the model's `max_position_embeddings`"
        if limit is not None and needed > limit:
            raises = "" if limit == positions else "raise `rollout.max_model_len`, "
            raise RecipeError(
                f"the longest prompt ({facts.longest} tokens) and `rollout.max_tokens: {rollout.max_tokens}` need "
                f"{needed} tokens, more than {key} ({limit})",
                where="rollout.max_tokens",
                remedy=f"lower `rollout.max_tokens`, {raises}or set `max_length` and `overlong_prompts: filter` on "
                "the data",
            )

    def _check_positions(self, facts: DataFacts) -> None:
        positions = self.sizes.max_positions if self.sizes else None
        lengths = facts.report.lengths if facts.report else None
        if positions is not None and lengths is not None and lengths.size and int(lengths.max()) > positions:
            raise DataError(
                f"{int((lengths > positions).sum())} rows are longer than the model's {positions} positions "
                f"(the longest has {int(lengths.max())} tokens)",
                where="data",
                remedy=f"set `max_length: {positions}` with `truncate: right`, or leave these rows out",
            )

    def _check_head(self, stage: Any) -> None:
        """A model that scores is where a stage may start that trains such a head: of the same labels."""
        names = [str(name) for name in self.model.config.get("architectures") or ()]
        if not any(name.endswith("ForSequenceClassification") for name in names):
            return
        if stage.kind not in SCORED:
            raise ModelError(
                f"the model is a {names[0]}: it scores, and has no language model head",
                where="model.path",
                remedy="give a causal language model; only a stage of kind reward_model or classify starts from one "
                "that scores",
            )
        has, wanted = Labels.from_config(self.model.config), head_of(stage)
        if not wanted.agrees_with(has):
            raise ModelError(
                f"the model is a {has.words}, and the stage trains a {wanted.words}",
                where="model.path",
                remedy="name the model's own labels in their order, or start from a causal language model",
            )

    def _check_padding(self) -> None:
        """Users of a model that scores pad, and find the end of a sequence by the padding token."""
        if self.model.tokenizer.pad_id is None:
            raise ModelError(
                "the tokenizer has no padding token, by which users of a model that scores find the end of a sequence",
                where="model",
                remedy="set `pad_token` in tokenizer_config.json to a token that ends no completion",
            )

    def _packing_notes(self, stage: Any, facts: DataFacts) -> list[str]:
        gpu, what = self.machine.gpus > 0, "prompt" if stage.kind == "online" else "example"
        budget, patches = stage.packing.budget(gpu), stage.packing.patches(gpu)
        said = []
        if stage.kind != "online" and facts.longest > budget:
            said.append(f"note: the largest example has {facts.longest} tokens and is computed alone (budget {budget})")
        if facts.most_patches > patches:
            said.append(
                f"note: the media of the largest {what} are {facts.most_patches} patches, more than "
                f"`packing.max_patches` ({patches}): it is computed alone; `media.max_pixels` makes images smaller"
            )
        return said


def _head_words(stage: Any) -> str:
    if stage.kind not in SCORED:
        return ""
    return " and a score head" + (f": {stage.head.words}" if stage.kind == "classify" else "")


def _loss_notes(stage: Any) -> list[str]:
    """What the losses themselves say about options that are easily misread."""
    chosen = [configure(term.name, term.options) for term in stage.loss]
    said = [module.remarks(config) for module, config, _ in chosen if hasattr(module, "remarks")]
    return [f"note: {line}" for lines in said for line in lines]


def _loop_lines(stage: Any) -> list[str]:
    """How far sampling runs ahead of training, and what becomes of groups that come to nothing."""
    groups = stage.batch.groups
    if stage.staleness == 0:
        said = ["synchronous: each step trains on what its own version sampled"]
    else:
        late = (
            "a step waits for groups that would become older"
            if stage.overdue == "wait"
            else "older groups are dropped, which favours short completions"
        )
        behind = f"{stage.staleness} version{'s' if stage.staleness != 1 else ''}"
        said = [f"asynchronous: {(stage.staleness + 1) * groups} groups on their way, at most {behind} behind; {late}"]
    if stage.dynamic_sampling:
        most = groups + int((stage.dynamic_sampling.max_factor - 1) * groups + 1e-9)
        said.append(f"dynamic sampling: groups without signal are replaced, at most {most} are sampled for {groups}")
    return said


_PUBLISHED = {"adapter": "the adapter", "weights": "whole weights"}


def stage_roles(recipe: Recipe, stage: Any, machine: Machine, sampling: int | None = None) -> list[Role]:
    """What a stage of any kind reserves on the machine."""
    if stage.kind in ("merge", "export"):
        needs = Needs(files=True)
    elif stage.kind != "evaluate":
        needs = needs_of(stage)
    elif stage.rewards:
        needs = Needs(engines=stage.rollout.workers, scorers=1)
    else:
        needs = Needs(trainer=True)
    return roles_of(needs, recipe.placement, cores=machine.cores, gpus=machine.gpus, threads={}, sampling=sampling)


def check_fits(roles: list[Role], machine: Machine) -> None:
    """Raise PlacementError where the roles of a stage ask for more than the machine has."""
    for role in roles:
        for name in role.custom:
            raise PlacementError(
                f"{role.name} asks for {name!r}, a resource that nodes of a cluster are given",
                where=f"placement.{role.kind.partition(' ')[0]}.resources",
                remedy="join the cluster with --address, or leave it out on one machine",
            )
    for resource, has in (("CPU", machine.cores), ("GPU", machine.gpus)):
        wanted = sum(role.resources.get(resource, 0.0) for role in roles)
        if wanted > has + 1e-6:
            detail = ", ".join(f"{r.name} {r.resources[resource]:g}" for r in roles if resource in r.resources)
            raise PlacementError(
                f"{wanted:g} {resource}s are asked for ({detail}), this machine has {has:g}",
                where="placement",
                remedy=f"lower `placement.*.{resource.lower()}s` or `rollout.workers`, or join a larger cluster with "
                "--address",
            )


def _adapter_words(adapter: Adapter, sizes: memory.Sizes | None, table: memory.Table | None) -> str:
    whole = " and ".join(adapter.parts("full"))
    if adapter.kind == "full":
        return "all weights" if table is None else f"all weights of {whole}"
    count = f" ({memory.count(sizes.adapter_parameters(adapter))} parameters)" if sizes and table is None else ""
    targets = adapter.targets if isinstance(adapter.targets, str) else ", ".join(adapter.targets)
    where = "" if table is None else f" of {' and '.join(adapter.parts('lora'))}"
    beside = f", and all weights of {whole}" if whole else ""
    what = "DoRA" if adapter.kind == "dora" else "LoRA"
    packed = f" on weights in four bits ({adapter.quant.type})" if adapter.quant else ""
    scale = f"alpha {adapter.alpha:g}{' (rsLoRA)' if adapter.rslora else ''}"
    return f"{what}{packed} of rank {adapter.rank}, {scale} on {targets}{where}{count}{beside}"


def _steps_words(steps: int | None) -> str:
    return "as many steps as the data give," if steps is None else f"{steps} step{'s' if steps != 1 else ''}"


def _updates_words(stage: Any) -> list[str]:
    """Where a step makes several updates: how many, of what."""
    passes, parts = stage.updates_per_batch, stage.minibatches
    if passes * parts == 1:
        return []
    groups = stage.batch.groups // parts
    times = f"{passes} times" if passes > 1 else "once"
    return [
        f"updates: {passes * parts} a step, each of {groups} group{'s' if groups != 1 else ''}; every group {times}"
    ]


def _batch_words(stage: Any) -> str:
    batch: Mapping[str, Any] = stage.batch.model_dump(exclude_none=True)
    if stage.kind == "online":
        return f"{batch['groups']} groups x {batch['group_size']}"
    unit = "pairs" if record_kind(stage.loss) == "pair" else "sequences"
    return f"{batch.get(unit, DEFAULT_BATCH)} {unit}"


def lines(plan: Plan, shown: str) -> list[str]:
    """The plan for a terminal."""
    recipe, machine = plan.recipe, plan.machine
    out = [
        f"recipe   {shown}: {recipe.name}, seed {recipe.seed}, {len(recipe.stages)} stages -> {recipe.run_folder}",
        f"model    {plan.model}",
        f"machine  {machine.cores} cores, {machine.gpus:g} GPUs, {memory.human(machine.memory)}",
    ]
    for stage in plan.stages:
        out.append(f"\n{stage.id} ({stage.kind})")
        out += [f"  {line}" for line in stage.lines]
        if stage.roles:
            out.append("  placement: " + ", ".join(_role_words(role) for role in stage.roles))
        out += [f"  memory, {who}: about {estimate}" for who, estimate in stage.memory.items()]
    return out + ([""] + [f"note: {note}" for note in plan.notes] if plan.notes else [])


def _role_words(role: Role) -> str:
    gpus = f", {role.gpus:g} GPU" if role.gpus else ""
    custom = "".join(f", {amount:g} {name}" for name, amount in role.custom.items())
    return f"{role.name} {role.cpus:g} CPU{gpus}{custom} ({role.threads} thread{'s' if role.threads != 1 else ''})"
