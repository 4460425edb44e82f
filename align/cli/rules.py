"""What must hold within a recipe beyond its grammar: losses fit their stages, adapters and engines go together."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from align.cli.findings import Findings
from align.cli.sharding import check_sharding
from align.errors import PluginError, RecipeError, Unsupported
from align.losses import configure, load
from align.losses.base import Needs
from align.plugins import describe_in_child
from align.recipe.adapter import Adapter
from align.recipe.engines import facts_of
from align.recipe.parts import Rollout
from align.recipe.problems import option_problems
from align.recipe.schema import Recipe
from align.recipe.stages import TrainStage
from align.recipe.support import check_adapter, check_sharded, is_sound, publish_mode
from align.stages.handover import adapter_of, check_adapters, trained_by
from align.stages.training import SCORED, head_of

_RECORDS = {
    "sft": ("conversation",),
    "preference": ("pair", "unpaired"),
    "reward_model": ("pair",),
    "classify": ("labelled",),
    "online": ("group",),
}
_SAMPLING = ("top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "min_tokens")


def check_recipe(recipe: Recipe, found: Findings) -> set[str]:
    """Everything that the recipe alone decides, into `found`; returns the ids of stages whose losses are sound."""
    sound: set[str] = set()
    _check_whole(recipe, found)
    check_sharding(recipe, found)
    with found.gather():
        check_adapters(recipe)  # again with the adapter that the recipe starts from, once its folder is known
    for stage in recipe.stages:
        _check_from(recipe, stage, found)
        _check_score_head(recipe, stage, found)
        if not hasattr(stage, "loss") or check_losses(stage, found):
            sound.add(stage.id)
        if isinstance(stage, TrainStage):
            if stage.adapter is not None:
                with found.gather(stage.id):
                    check_adapter(stage.adapter)
            with found.gather(stage.id):
                check_sharded(adapter_of(recipe, stage), stage.optim.name, recipe.placement.trainer.strategy.name)
            _check_evaluation(stage, found)
        if stage.kind == "online":
            _check_online(recipe, stage, found)
        if stage.kind == "evaluate" and stage.rewards:
            with found.gather(stage.id):
                _check_engine(stage.rollout)
    return sound


def _check_whole(recipe: Recipe, found: Findings) -> None:
    for part in ("reference", "rollout", "rewards"):
        ranks = getattr(recipe.placement, part).ranks
        if ranks != 1:
            others = {"rollout": "use `rollout.workers`", "rewards": "use `placement.rewards.count`"}
            more = others.get(part, "one process holds it: leave it out")
            found.add(
                Unsupported(
                    f"`placement.{part}.ranks: {ranks}` is not offered by this version",
                    where=f"placement.{part}.ranks",
                    remedy=more,
                )
            )


def _check_from(recipe: Recipe, stage: Any, found: Findings) -> None:
    """`from: X@best` needs an X that chooses a best checkpoint."""
    wanted = [("from", stage.from_)] if stage.from_ else []
    wanted += [("of", name) for name in getattr(stage, "of", ())]
    for key, text in wanted:
        name, at, which = text.partition("@")
        source = recipe.stage(name)
        if at and which != "best":
            what, remedy = f"`{text}`: there are no weights called {which!r}", f"write {name} or {name}@best"
        elif at and getattr(getattr(source, "save", None), "best", None) is None:
            what = f"`{text}`: stage {name!r} chooses no best checkpoint"
            remedy = f"add `save: {{best: {{metric: ...}}}}` and `eval:` to {name!r}, or write {name}"
        else:
            continue
        found.add(RecipeError(what, where=key, remedy=remedy), stage.id)


def _check_score_head(recipe: Recipe, stage: Any, found: Findings) -> None:
    """A reward model or classifier has a score head where others have the language model's: only stages that train
    such a head go on with it, and only with the same outputs."""
    if stage.kind in ("merge", "export"):
        return
    for name in (stage.from_, *getattr(stage, "of", ())):
        source = trained_by(recipe, name) if name is not None else None
        if name is None or source is None or source.kind not in SCORED:
            continue
        what = "a reward model" if source.kind == "reward_model" else "a classifier"
        if stage.kind in SCORED:
            mine, its = (head_of(one) for one in (stage, source))
            if mine.agrees_with(its):
                continue
            problem = f"{name!r} is {what}, {its.words}, and stage {stage.id!r} trains a {mine.words}"
            key, remedy = "from", f"build on the stage before {name!r}, or give both the same labels"
        else:
            problem = f"{name!r} is {what}: it scores, and a stage of kind {stage.kind} needs a language model"
            key, remedy = "from", f"build on the stage before {name!r}; its folder is what others load"
        if stage.kind == "evaluate":
            held = "with pairs: it reports accuracies" if source.kind == "reward_model" else "or use `align classify`"
            key, remedy = "of", f"give {name!r} an `eval: {{data: ...}}` {held}"
        found.add(RecipeError(problem, where=key, remedy=remedy), stage.id)


# ------------------------------------------------------------------------------------------------- losses


def check_losses(stage: Any, found: Findings) -> bool:
    """Names, options and records of a stage's losses; whether all is well."""
    before = len(found.errors)
    needs: list[Needs] = []
    for number, term in enumerate(stage.loss):
        where = f"loss.{number}" if len(stage.loss) > 1 else "loss"
        try:
            if ":" in term.name or term.name.endswith(".py"):  # the user's code: a child tries it first
                describe_in_child("align.losses.describe", [term.name], name=term.name)
            options = load(term.name).Config
            options(**term.options)
            needs.append(configure(term.name, term.options)[2])
        except PluginError as error:
            found.add(PluginError(error.what, where=f"{where}.name", remedy=error.remedy), stage.id)
        except ValidationError as error:
            for problem in option_problems(error, term.options, options, f"loss {term.name!r}"):
                found.add(RecipeError(problem.what, where=f"{where}.{problem.where}", remedy=problem.remedy), stage.id)
    if len(needs) == len(stage.loss):
        with found.gather(stage.id):
            _check_needs(stage, needs)
    return len(found.errors) == before


def _check_needs(stage: Any, needs: list[Needs]) -> None:
    allowed = _RECORDS.get(stage.kind, ("conversation", "pair", "unpaired"))
    names = [term.name for term in stage.loss]
    for name, need in zip(names, needs, strict=True):
        if ("scores" in need.head) == (stage.kind in SCORED):
            continue
        if stage.kind in SCORED:
            what = f"a stage of kind {stage.kind} has a score head, and the loss {name!r} needs a language model's"
            remedy = f"leave `loss` out, or use `kind: {'preference' if stage.kind == 'reward_model' else 'sft'}`"
        else:
            what = f"the loss {name!r} needs a score head, which a stage of kind {stage.kind} has not"
            remedy = f"use `kind: {'classify' if need.record == 'labelled' else 'reward_model'}`"
        raise RecipeError(what, where="loss", remedy=remedy)
    if needs[0].record not in allowed:
        kinds = [kind for kind, records in _RECORDS.items() if needs[0].record in records]
        raise RecipeError(
            f"the loss {names[0]!r} learns from {_plural(needs[0].record)}, which a stage of kind {stage.kind} has not",
            where="loss",
            remedy=f"use `kind: {kinds[0]}`, or a loss for {_plural(allowed[0])}",
        )
    first = needs[0].record
    for name, need in zip(names[1:], needs[1:], strict=True):
        if need.record != first and not (first == "pair" and need.record == "conversation"):
            raise RecipeError(
                f"the losses {names[0]!r} and {name!r} learn from different records "
                f"({_plural(first)} and {_plural(need.record)})",
                where="loss",
                remedy="train them in stages of their own; `sft` may stand after a loss on pairs",
            )
    covered = {need.nll for need in needs if need.nll != "none"}
    if len(covered) > 1:
        raise RecipeError(
            f"the losses {' and '.join(names)} cover different tokens with their likelihood terms",
            where="loss",
            remedy="keep one likelihood term: set the other's weight to 0, or drop `sft`",
        )
    _check_units(stage, first)
    if stage.kind != "evaluate" and stage.reference is not None and not any(need.reference for need in needs):
        raise RecipeError(
            f"`reference` is given, and the loss {' + '.join(names)} compares with none",
            where="reference",
            remedy="leave it out" + (", or set `loss.kl` above 0" if stage.kind == "online" else ""),
        )
    _check_margin(stage, needs)
    if stage.kind == "classify":
        _check_labels(stage)
    _check_cached(stage, needs)
    _check_updates(stage, needs)


def _check_labels(stage: Any) -> None:
    """Options of the classify loss that depend on what the head's outputs are."""
    for number, term in enumerate(stage.loss):
        where = f"loss.{number}" if len(stage.loss) > 1 else "loss"
        weights, count = term.options.get("class_weights"), len(stage.head.names)
        if term.options.get("label_smoothing") and stage.problem != "single_label":
            raise RecipeError(
                f"`label_smoothing` spreads one label over all, and `problem: {stage.problem}` has not one a row",
                where=f"{where}.label_smoothing",
                remedy="leave it out",
            )
        if weights is not None and (stage.problem == "regression" or len(weights) != count):
            has = "a regression has none" if stage.problem == "regression" else f"the stage has {count} labels"
            raise RecipeError(
                f"`class_weights` has {len(weights)} numbers, one for each label in order, and {has}",
                where=f"{where}.class_weights",
                remedy="leave it out"
                if stage.problem == "regression"
                else f"the labels are {', '.join(stage.head.names)}",
            )


def _check_margin(stage: Any, needs: list[Needs]) -> None:
    """Scores of pairs are for a loss that reads a margin."""
    if stage.kind == "preference" and stage.rewards and not any(need.margin for need in needs):
        names = " + ".join(term.name for term in stage.loss)
        raise RecipeError(
            f"`rewards` of a preference stage give each pair a margin, and the loss {names} reads none",
            where="rewards",
            remedy="use `loss: {name: modpo, preference_weight: 0.5}`, or leave `rewards` out",
        )


def _check_cached(stage: Any, needs: list[Needs]) -> None:
    """Log-probabilities that are computed before the stage must be of sequences that it will train on."""
    if getattr(stage, "reference", None) != "cached":
        return
    if stage.kind == "online":
        why = "an online stage samples new completions at every step"
    else:
        pairs = zip(stage.loss, needs, strict=True)
        others = [t.name for t, need in pairs if need.scope == "batch" and hasattr(load(t.name), "auxiliary")]
        if not others:
            return
        why = f"the loss {others[0]!r} also compares sequences that are made of several rows of a batch"
    raise RecipeError(
        f"`reference: cached` is computed once, before the first step, and {why}",
        where="reference",
        remedy="write `reference: start`",
    )


def _check_updates(stage: Any, needs: list[Needs]) -> None:
    """After a batch's first update the policy is no longer the one that sampled: a ratio must say how far it went."""
    if stage.kind != "online" or stage.updates_per_batch * stage.minibatches == 1:
        return
    names = [term.name for term, need in zip(stage.loss, needs, strict=True) if need.ratio == "none"]
    if names:
        key = "updates_per_batch" if stage.updates_per_batch > 1 else "minibatches"
        raise RecipeError(
            f"`{key}: {getattr(stage, key)}` trains on samples of an earlier policy, and the loss {names[0]!r} has no "
            "importance ratio",
            where=key,
            remedy=f"leave `{key}` out, use grpo, or say in `needs` which policy the ratio is to (`Needs.ratio`)",
        )


def _check_units(stage: Any, record: str) -> None:
    """A batch counts pairs, or sequences for losses on single completions."""
    if stage.kind not in ("preference", "reward_model"):
        return
    right, wrong = ("sequences", "pairs") if record == "unpaired" else ("pairs", "sequences")
    if getattr(stage.batch, wrong) is not None:
        raise RecipeError(
            f"the batch of a loss on {_plural(record)} is counted in {right}",
            where=f"batch.{wrong}",
            remedy=f"write `batch: {{{right}: {getattr(stage.batch, wrong)}}}`",
        )


def _plural(record: str) -> str:
    words = {
        "conversation": "conversations",
        "pair": "pairs",
        "unpaired": "labelled completions",
        "labelled": "labelled texts",
    }
    return words.get(record, "groups of sampled completions")


# ------------------------------------------------------------------------------------------------- stages


def _check_evaluation(stage: Any, found: Findings) -> None:
    best = stage.save.best
    if best is not None and stage.eval is None:
        found.add(
            RecipeError("`save.best` needs an evaluation", where="save.best", remedy="add `eval: {data: ...}`"),
            stage.id,
        )
    elif best is not None and not best.metric.startswith("eval/"):
        found.add(
            RecipeError(
                f"`save.best.metric: {best.metric}` is no metric of the evaluation",
                where="save.best.metric",
                remedy=f"their names begin with eval/: eval/{best.metric.rpartition('/')[2]}",
            ),
            stage.id,
        )
    if stage.kind != "online" and stage.eval is not None and stage.eval.rewards:
        found.add(
            RecipeError(
                "`eval.rewards` needs completions, which only online stages sample",
                where="eval.rewards",
                remedy="add a stage of kind evaluate, `of: [...]`, with these rewards",
            ),
            stage.id,
        )


def _check_online(recipe: Recipe, stage: Any, found: Findings) -> None:
    if stage.rollout.temperature == 0:
        found.add(
            RecipeError(
                "`rollout.temperature: 0` samples equal completions, from which nothing can be learned",
                where="rollout.temperature",
                remedy="use 1.0",
            ),
            stage.id,
        )
    adapter: Adapter = adapter_of(recipe, stage)
    if is_sound(adapter):  # otherwise the stage that asks for it has been told
        with found.gather(stage.id):
            publish_mode(adapter, stage.rollout)
    with found.gather(stage.id):
        _check_engine(stage.rollout)


def _check_engine(rollout: Rollout) -> None:
    for name in _SAMPLING:
        if name in rollout.engine:
            raise Unsupported(
                f"`rollout.engine.{name}` changes the sampling distribution, and the importance ratio would be biased",
                where=f"rollout.engine.{name}",
                remedy="leave it out; `rollout.temperature` is offered",
            )
    facts_of(rollout.name).check(rollout.engine)
