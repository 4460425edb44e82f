"""Streams of a stage: opened for it, closed with it, and what a checkpoint keeps of them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from typing import Any

from align.data.labels import Labelling
from align.data.media.opening import open_library
from align.data.prepare import check_options
from align.data.records import Kind
from align.data.streams import Stream, Streams
from align.data.tables import Tokeniser
from align.data.tokenizer import ChatTokenizer
from align.protocols.trees import Tree
from align.recipe.capabilities import TrainStage
from align.stages.context import Context
from align.stages.files import write_json

CURSOR = "stream"
"""Name under which a checkpoint's `extra` holds where the streams are."""


async def open_streams(
    context: Context,
    stage: TrainStage,
    kind: Kind,
    tokenizer: ChatTokenizer,
    stack: AsyncExitStack,
    check: Callable[[Sequence[Tree]], None],
) -> Streams:
    """The stage's sources as streams, until the stack closes. check: raises UserError for trees it cannot use.

    They have a library of media of their own: what they showed may leave the store while the stage runs."""
    library = open_library(context.recipe, tokenizer.folder) if tokenizer.folder is not None else None
    if library is not None:
        stack.callback(library.close)
    labelling = Labelling(stage.score_head) if kind == "labelled" and stage.score_head is not None else None

    def made() -> list[Stream]:
        streams = []
        for number, source in enumerate(stage.data):
            check_options(source, kind)
            tokeniser = Tokeniser(source, kind, tokenizer, library, labelling=labelling)
            streams.append(Stream(tokeniser, context.recipe_folder, context.seed(stage.id), number))
        return streams

    streams = Streams(
        await asyncio.to_thread(made),
        [source.weight for source in stage.data],
        tell=lambda line: context.report.message(f"{stage.id}: {line}"),
        check=check,
    )
    stack.callback(streams.close)
    return streams


def noted(context: Context, stage: TrainStage, streams: Streams) -> dict[str, Any]:
    """What a checkpoint keeps of them; the report of what was read goes to `<stage>/data.json`."""
    write_json(context.run.stage_folder(stage.id) / "data.json", streams.report())
    return {CURSOR: streams.cursor()}
