"""What a stage does, in the words of `align check`."""

from __future__ import annotations

from collections.abc import Sequence

from align.check.memory import sizes as memory
from align.data.order import BatchPlan
from align.losses import Losses
from align.protocols.trees import Tree
from align.recipe.adapter import Adapter
from align.recipe.capabilities import SamplingStage, ScoringStage, TrainStage
from align.recipe.parts import GroupBatch
from align.stages.roles import Role
from align.stages.training import record_kind

PUBLISHED = {"adapter": "the adapter", "weights": "whole weights"}


def head_words(stage: TrainStage) -> str:
    return f" and {stage.head_words}" if isinstance(stage, ScoringStage) else ""


def loss_notes(stage: TrainStage) -> list[str]:
    """What the losses themselves say about options that are easily misread."""
    return [f"note: {line}" for loss in Losses.of(stage.loss) for line in loss.remarks()]


_LOOKED_AT = 200_000  # rows of batches; more would make `align check` slow


def lacking_notes(stage: TrainStage, trees: Sequence[Tree], order: BatchPlan) -> list[str]:
    """In how many of the stage's batches a loss does without what it takes from a whole batch, and what that is."""
    notes = []
    for loss in Losses.of(stage.loss):
        if not loss.may_lack:
            continue
        seen = min(order.total, max(1, _LOOKED_AT // order.size))
        said = [loss.lacking([trees[row] for row in order.batch(step)]) for step in range(seen)]
        found = [why for why in said if why]
        if found:
            which = f"{order.total}" if seen == order.total else f"the first {seen}"
            notes.append(
                f"note: {len(found)} of {which} batches have {found[0]}; a larger `batch.sequences` makes them fewer"
            )
    return notes


def loop_lines(stage: SamplingStage) -> list[str]:
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


def adapter_words(adapter: Adapter, sizes: memory.Sizes | None, table: memory.Table | None) -> str:
    whole = " and ".join(adapter.parts("full"))
    if adapter.kind == "full":
        return "all weights" if table is None else f"all weights of {whole}"
    count = f" ({memory.count(sizes.adapter_parameters(adapter))} parameters)" if sizes and table is None else ""
    targets = adapter.targets if isinstance(adapter.targets, str) else _target_words(adapter.targets)
    where = "" if table is None else f" of {' and '.join(adapter.parts('lora'))}"
    beside = f", and all weights of {whole}" if whole else ""
    what = "DoRA" if adapter.kind == "dora" else "LoRA"
    packed = f" on weights in four bits ({adapter.quant.type})" if adapter.quant else ""
    scale = f"alpha {adapter.alpha:g}{' (rsLoRA)' if adapter.rslora else ''}"
    return f"{what}{packed} of rank {adapter.rank}, {scale} on {targets}{where}{count}{beside}"


def _target_words(targets: tuple[str, ...]) -> str:
    """Names as they are; paths, of which peft writes one for each layer, by their last names."""
    if len(targets) <= 8:
        return ", ".join(targets)
    last = sorted({target.rpartition(".")[2] for target in targets})
    return f"{len(targets)} modules ({', '.join(last)})"


def steps_words(steps: int | None) -> str:
    return "as many steps as the data give," if steps is None else f"{steps} step{'s' if steps != 1 else ''}"


def updates_words(stage: SamplingStage) -> list[str]:
    """Where a step makes several updates: how many, of what."""
    passes, parts = stage.updates_per_batch, stage.minibatches
    if passes * parts == 1:
        return []
    groups = stage.batch.groups // parts
    times = f"{passes} times" if passes > 1 else "once"
    return [
        f"updates: {passes * parts} a step, each of {groups} group{'s' if groups != 1 else ''}; every group {times}"
    ]


def batch_words(stage: TrainStage) -> str:
    if isinstance(stage.batch, GroupBatch):
        return f"{stage.batch.groups} groups x {stage.batch.group_size}"
    return f"{stage.batch.rows} {'pairs' if record_kind(stage.loss) == 'pair' else 'sequences'}"


def role_words(role: Role) -> str:
    gpus = f", {role.gpus:g} GPU" if role.gpus else ""
    custom = "".join(f", {amount:g} {name}" for name, amount in role.custom.items())
    return f"{role.name} {role.cpus:g} CPU{gpus}{custom} ({role.threads} thread{'s' if role.threads != 1 else ''})"
