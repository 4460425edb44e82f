"""What must hold within a recipe beyond its grammar: losses fit their stages, adapters and engines go together."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import ValidationError

from align.check.findings import Findings
from align.check.sharding import check_sharding
from align.check.streaming import check_streams
from align.errors import PluginError, RecipeError, Unsupported
from align.losses import Loss, Losses, configure, load
from align.plugins import asked_in_child, is_users
from align.recipe.adapter import Adapter
from align.recipe.capabilities import SamplingStage, ScoringStage, TrainStage
from align.recipe.engines import facts_of
from align.recipe.labels import Labels
from align.recipe.parts import LossTerm, PairBatch, Rollout
from align.recipe.problems import option_problems
from align.recipe.schema import Recipe
from align.recipe.stages import Stage, kinds_for
from align.recipe.support import check_adapter, check_sharded, is_sound, publish_mode
from align.stages.stage_start import adapter_of, check_adapters, trained_by

_SAMPLING = ("top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "min_tokens")


def check_recipe(recipe: Recipe, found: Findings) -> set[str]:
    """Everything that the recipe alone decides, into `found`; returns the ids of stages whose losses are sound."""
    sound: set[str] = set()
    _check_whole(recipe, found)
    check_sharding(recipe, found)
    check_streams(recipe, found)
    with found.gather():
        check_adapters(recipe)  # again with the adapter that the recipe starts from, once its folder is known
    for stage in recipe.stages:
        _check_from(recipe, stage, found)
        _check_score_head(recipe, stage, found)
        if not stage.losses or check_losses(stage, found):
            sound.add(stage.id)
        if isinstance(stage, TrainStage):
            if stage.adapter is not None:
                with found.gather(stage.id):
                    check_adapter(stage.adapter)
            with found.gather(stage.id):
                check_sharded(adapter_of(recipe, stage), stage.optim.name, recipe.placement.trainer.strategy.name)
            _check_evaluation(stage, found)
        if isinstance(stage, SamplingStage):
            _check_sampling(recipe, stage, found)
        if stage.engines is not None:
            with found.gather(stage.id):
                _check_engine(stage.engines)
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


def _check_from(recipe: Recipe, stage: Stage, found: Findings) -> None:
    """`from: X@best` needs an X that chooses a best checkpoint."""
    wanted = [("from", stage.from_)] if stage.from_ else []
    wanted += [("of", name) for name in stage.judged]
    for key, text in wanted:
        name, at, which = text.partition("@")
        source = recipe.stage(name)
        if at and which != "best":
            what, remedy = f"`{text}`: there are no weights called {which!r}", f"write {name} or {name}@best"
        elif at and not (isinstance(source, TrainStage) and source.save.best is not None):
            what = f"`{text}`: stage {name!r} chooses no best checkpoint"
            remedy = f"add `save: {{best: {{metric: ...}}}}` and `eval:` to {name!r}, or write {name}"
        else:
            continue
        found.add(RecipeError(what, where=key, remedy=remedy), stage.id)


def _check_score_head(recipe: Recipe, stage: Stage, found: Findings) -> None:
    """A reward model or classifier has a score head where others have the language model's: only stages that train
    such a head go on with it, and only with the same outputs."""
    if stage.makes_folder:
        return
    for name in (stage.from_, *stage.judged):
        source = trained_by(recipe, name) if name is not None else None
        if not isinstance(source, ScoringStage):
            continue
        what, mine, its = source.makes, stage.score_head, source.score_head
        if mine is not None:
            if mine.agrees_with(its):
                continue
            problem = f"{name!r} is {what}, {its.words}, and stage {stage.id!r} trains a {mine.words}"
            key, remedy = "from", f"build on the stage before {name!r}, or give both the same labels"
        else:
            problem = f"{name!r} is {what}: it scores, and a stage of kind {stage.kind} needs a language model"
            key, remedy = "from", f"build on the stage before {name!r}; its folder is what others load"
        if not stage.makes_model:
            key, remedy = "of", f"give {name!r} an `eval: {{data: ...}}` {source.evaluated}"
        found.add(RecipeError(problem, where=key, remedy=remedy), stage.id)


# ------------------------------------------------------------------------------------------------- losses


def check_losses(stage: Stage, found: Findings) -> bool:
    """Names, options and records of a stage's losses; whether all is well."""
    before = len(found.errors)
    chosen: list[Loss] = []
    for number, term in enumerate(stage.losses):
        where = f"loss.{number}" if len(stage.losses) > 1 else "loss"
        try:
            if is_users(term.name):  # a child tries it first
                asked_in_child("align.losses:described", term.name)
            options = load(term.name).Config
            chosen.append(configure(term.name, term.options))
        except PluginError as error:
            found.add(PluginError(error.what, where=f"{where}.name", remedy=error.remedy), stage.id)
        except RecipeError as error:
            if not isinstance(error.__cause__, ValidationError):
                raise
            for problem in option_problems(error.__cause__, term.options, options, f"loss {term.name!r}"):
                found.add(RecipeError(problem.what, where=f"{where}.{problem.where}", remedy=problem.remedy), stage.id)
    if len(chosen) == len(stage.losses):
        with found.gather(stage.id):
            _check_needs(stage, Losses(chosen))
    return len(found.errors) == before


def _check_needs(stage: Stage, losses: Losses) -> None:
    allowed, names = stage.records, [loss.name for loss in losses]
    for loss in losses:
        if ("scores" in loss.needs.head) == isinstance(stage, ScoringStage):
            continue
        if isinstance(stage, ScoringStage):
            what = f"a stage of kind {stage.kind} has a score head, and the loss {loss.name!r} needs a language model's"
            remedy = f"leave `loss` out, or use `kind: {stage.language_kind}`"
        else:
            what = f"the loss {loss.name!r} needs a score head, which a stage of kind {stage.kind} has not"
            remedy = f"use `kind: {next(iter(kinds_for(loss.needs.record, scoring=True)), 'reward_model')}`"
        raise RecipeError(what, where="loss", remedy=remedy)
    first = losses.records[0]
    if first not in allowed:
        raise RecipeError(
            f"the loss {names[0]!r} learns from {_plural(first)}, which a stage of kind {stage.kind} has not",
            where="loss",
            remedy=f"use `kind: {kinds_for(first)[0]}`, or a loss for {_plural(allowed[0])}",
        )
    for name, record in zip(names[1:], losses.records[1:], strict=True):
        if record != first and not (first == "pair" and record == "conversation"):
            raise RecipeError(
                f"the losses {names[0]!r} and {name!r} learn from different records "
                f"({_plural(first)} and {_plural(record)})",
                where="loss",
                remedy="train them in stages of their own; `sft` may stand after a loss on pairs",
            )
    _check_observed(stage, losses)
    if len({loss.needs.nll for loss in losses} - {"none"}) > 1:
        raise RecipeError(
            f"the losses {' and '.join(names)} cover different tokens with their likelihood terms",
            where="loss",
            remedy="keep one likelihood term: set the other's weight to 0, or drop `sft`",
        )
    if isinstance(stage, TrainStage) and isinstance(stage.batch, PairBatch):
        _check_units(stage.batch, first)
    if isinstance(stage, TrainStage) and stage.reference is not None and not losses.needs_reference:
        raise RecipeError(
            f"`reference` is given, and the loss {' + '.join(names)} compares with none",
            where="reference",
            remedy="leave it out" + (", or set `loss.kl` above 0" if stage.engines else ""),
        )
    _check_margin(stage, losses)
    if stage.score_head is not None and first == "labelled":
        _check_labels(stage.losses, stage.score_head)
    if isinstance(stage, TrainStage):
        _check_cached(stage, losses)
    if isinstance(stage, SamplingStage):
        _check_updates(stage, losses)


def _check_observed(stage: Stage, losses: Losses) -> None:
    """What learns from an environment's answers has one, and stands beside what learns from scores."""
    own = [loss.name for loss in losses if loss.needs.nll == "observed"]
    if own and not stage.worlds:
        raise RecipeError(
            f"the loss {own[0]!r} learns what an environment answers, and the stage has none",
            where="loss",
            remedy="add an `environment`, or leave the loss out",
        )
    if own and len(own) == len(losses):
        raise RecipeError(
            f"the loss {own[0]!r} alone learns from no score: what `reward` says would have no effect",
            where="loss",
            remedy=f"put it beside another: `loss: [{{name: grpo}}, {{name: {own[0]}, weight: 0.05}}]`",
        )


def _check_labels(losses: Sequence[LossTerm], head: Labels) -> None:
    """Options of the classify loss that depend on what the head's outputs are."""
    for number, term in enumerate(losses):
        where = f"loss.{number}" if len(losses) > 1 else "loss"
        weights, count = term.options.get("class_weights"), len(head.names)
        if term.options.get("label_smoothing") and head.problem != "single_label":
            raise RecipeError(
                f"`label_smoothing` spreads one label over all, and `problem: {head.problem}` has not one a row",
                where=f"{where}.label_smoothing",
                remedy="leave it out",
            )
        if weights is not None and (head.problem == "regression" or len(weights) != count):
            has = "a regression has none" if head.problem == "regression" else f"the stage has {count} labels"
            raise RecipeError(
                f"`class_weights` has {len(weights)} numbers, one for each label in order, and {has}",
                where=f"{where}.class_weights",
                remedy="leave it out" if head.problem == "regression" else f"the labels are {', '.join(head.names)}",
            )


def _check_margin(stage: Stage, losses: Losses) -> None:
    """Scores of pairs are for a loss that reads a margin."""
    if stage.judges_pairs and not losses.needs_margin:
        names = " + ".join(loss.name for loss in losses)
        raise RecipeError(
            f"`rewards` of a preference stage give each pair a margin, and the loss {names} reads none",
            where="rewards",
            remedy="use `loss: {name: modpo, preference_weight: 0.5}`, or leave `rewards` out",
        )


def _check_cached(stage: TrainStage, losses: Losses) -> None:
    """Log-probabilities that are computed before the stage must be of sequences that it will train on."""
    if stage.reference != "cached":
        return
    if stage.engines is not None:
        why = "an online stage samples new completions at every step"
    else:
        others = [loss.name for loss in losses if loss.sees_others]
        if not others:
            return
        why = f"the loss {others[0]!r} also compares sequences that are made of several rows of a batch"
    raise RecipeError(
        f"`reference: cached` is computed once, before the first step, and {why}",
        where="reference",
        remedy="write `reference: start`",
    )


def _check_updates(stage: SamplingStage, losses: Losses) -> None:
    """After a batch's first update the policy is no longer the one that sampled: a ratio must say how far it went."""
    if stage.updates_per_batch * stage.minibatches == 1:
        return
    names = [loss.name for loss in losses if loss.needs.ratio == "none"]
    if names:
        key = "updates_per_batch" if stage.updates_per_batch > 1 else "minibatches"
        raise RecipeError(
            f"`{key}: {getattr(stage, key)}` trains on samples of an earlier policy, and the loss {names[0]!r} has no "
            "importance ratio",
            where=key,
            remedy=f"leave `{key}` out, use grpo, or say in `needs` which policy the ratio is to (`Needs.ratio`)",
        )


def _check_units(batch: PairBatch, record: str) -> None:
    """A batch counts pairs, or sequences for losses on single completions."""
    right, wrong = ("sequences", "pairs") if record == "unpaired" else ("pairs", "sequences")
    if getattr(batch, wrong) is not None:
        raise RecipeError(
            f"the batch of a loss on {_plural(record)} is counted in {right}",
            where=f"batch.{wrong}",
            remedy=f"write `batch: {{{right}: {getattr(batch, wrong)}}}`",
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


def _check_evaluation(stage: TrainStage, found: Findings) -> None:
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
    if stage.engines is None and stage.eval is not None and stage.eval.rewards:
        found.add(
            RecipeError(
                "`eval.rewards` needs completions, which only online stages sample",
                where="eval.rewards",
                remedy="add a stage of kind evaluate, `of: [...]`, with these rewards",
            ),
            stage.id,
        )


def _check_sampling(recipe: Recipe, stage: SamplingStage, found: Findings) -> None:
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


def _check_engine(rollout: Rollout) -> None:
    for name in _SAMPLING:
        if name in rollout.engine:
            raise Unsupported(
                f"`rollout.engine.{name}` changes the sampling distribution, and the importance ratio would be biased",
                where=f"rollout.engine.{name}",
                remedy="leave it out; `rollout.temperature` is offered",
            )
    facts_of(rollout.name).check(rollout.engine)
