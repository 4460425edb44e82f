"""Streams of a stage: opened for it, closed with it, and what a checkpoint keeps of them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
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

_CURSOR = "stream"  # in a checkpoint's `extra`


@dataclass(frozen=True)
class StreamedBatches:
    """Batches of `size` rows as streams give them. report: the file that says what was read."""

    streams: Streams
    size: int
    total: int
    report: Path

    async def of(self, step: int) -> list[Tree]:
        return await asyncio.to_thread(self.streams.take, self.size)

    def extra(self) -> dict[str, Any]:
        write_json(self.report, self.streams.report())
        return {_CURSOR: self.streams.cursor()}

    def restore(self, extra: dict[str, Any]) -> None:
        if extra:
            self.streams.restore(extra[_CURSOR])


async def open_streams(
    context: Context,
    stage: TrainStage,
    kind: Kind,
    tokenizer: ChatTokenizer,
    stack: AsyncExitStack,
    check: Callable[[Sequence[Tree]], None],
) -> StreamedBatches:
    """Batches of the stage's sources as streams, open until the stack closes. check: raises UserError for trees that it
    cannot use.

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
    assert stage.steps is not None, "`align check` asks for them"
    report = context.run.stage_folder(stage.id) / "data.json"
    return StreamedBatches(streams, stage.batch.rows, stage.steps, report)
