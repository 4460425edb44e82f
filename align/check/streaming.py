"""Where rows can be read as they are trained on, and what such a stage can do without knowing them all."""

from __future__ import annotations

from collections.abc import Iterator

from align.check.findings import Findings
from align.data.generators import is_generator
from align.errors import RecipeError
from align.recipe.capabilities import TrainStage
from align.recipe.schema import Recipe
from align.recipe.stages import Stage


def check_streams(recipe: Recipe, found: Findings) -> None:
    """Every stream of a recipe that could not be read as one, into `found`."""
    if recipe.model.tokenizer is not None and any(source.stream for source in recipe.model.tokenizer.train_on):
        what = "a tokenizer is trained on all rows at once, and `stream: true` reads them one after another"
        found.add(
            RecipeError(what, where="model.tokenizer.train_on", remedy="name a part of the rows that memory holds")
        )
    for stage in recipe.stages:
        for where, what, remedy in _problems(stage):
            found.add(RecipeError(what, where=where, remedy=remedy), stage.id)


def _problems(stage: Stage) -> Iterator[tuple[str, str, str]]:
    """(key, what is wrong, remedy) of each."""
    for key, sources in stage.datasets.items():
        streams = [source for source in sources if source.stream]
        if not streams:
            continue
        if not isinstance(stage, TrainStage) or key != "data":
            yield key, "rows that a model is judged on are read whole, every time", "leave `stream` out, or set `limit`"
            continue
        if stage.engines is not None:
            what = f"a stage of kind {stage.kind} draws its prompts from all of them"
            yield key, f"`stream: true`: {what}", "leave `stream` out: prompts are short, and a million take a gigabyte"
            continue
        if len(streams) < len(sources):
            what = f"{len(streams)} of {len(sources)} sources are streams"
            yield key, what, "give all of a stage's sources `stream: true`, or none"
        for source in streams:
            if is_generator(source.path):
                what = f"`stream: true` on {source.path}: a generator's rows are made before the stage"
                yield key, what, "write its rows to a .jsonl file and name that"
        yield from _of_training(stage)


def _of_training(stage: TrainStage) -> Iterator[tuple[str, str, str]]:
    """What a training stage needs to know of its rows beforehand."""
    if stage.steps is None:
        key = "epochs" if stage.epochs is not None else "steps"
        yield (
            key,
            "how many rows a stream has is not known before it ends, so that `epochs` is no length",
            ("give the stage `steps`; a stream that ends begins again"),
        )
    if stage.mix is not None:
        yield (
            "mix",
            "`mix` says how long an epoch is, and streams have none",
            ("leave it out: shares hold at every step, and a stream that ends begins again"),
        )
    if stage.reference == "cached":
        yield (
            "reference",
            "`reference: cached` is computed for every row before the first step",
            ("write `reference: start`"),
        )
    if stage.judges_pairs:
        yield (
            "rewards",
            "rewards judge every pair before the stage",
            ("write the margins into the rows (`margin`), or leave `stream` out"),
        )
