"""What every stage is given: recipe, run folder, who makes actors, where progress goes, and data on demand."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from align.data.carried import Carried, carried
from align.data.media.library import Library
from align.data.media.opening import open_library, store_of
from align.data.prepare import Prepared, prepare
from align.data.records import Kind
from align.data.tokenizer import ChatTokenizer
from align.data.world import Offered
from align.errors import Interrupted
from align.protocols.fleet import Group, PromptItem, group_seed
from align.protocols.trainer import Trainer
from align.protocols.trees import Tree
from align.recipe.capabilities import StageBase, TrainStage
from align.recipe.inputs import DataSource, Exhausted, Model
from align.recipe.schema import Recipe
from align.stages.backend import Backend, Start
from align.stages.files import write_json
from align.stages.loop import Report
from align.stages.media_inputs import note_media
from align.stages.publication import PublicationFolder
from align.stages.runfolder import RunFolder
from align.stages.stage_start import Origin


def stage_seed(run_seed: int, stage_id: str) -> int:
    """31-bit seed of a stage's data order, fresh adapter weights and dropout."""
    digest = hashlib.blake2b(f"{run_seed}|{stage_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 33


def carried_by(model: Model, base: Path, adapter: Path | None) -> Carried:
    """`align.data.carried` as a recipe's `model:` says."""
    return carried(
        base,
        adapter,
        chat_template=model.chat_template,
        template_args=model.template_args,
        end_of_turn=model.end_of_turn,
        whose=model.tokenizer_of,
    )


@dataclass
class Context:
    """recipe_folder: where plugins are looked for. stop: set when the user wants the run to end after this turn."""

    recipe: Recipe
    run: RunFolder
    backend: Backend
    report: Report
    publications: PublicationFolder
    recipe_folder: Path
    stop: asyncio.Event
    origin: Origin
    _prepared: tuple[tuple[str, ...], list[Any]] | None = None
    _said: set[str] = field(default_factory=set)
    _libraries: dict[Path, Library | None] = field(default_factory=dict)

    def seed(self, stage_id: str) -> int:
        return stage_seed(self.recipe.seed, stage_id)

    def record(self) -> None:
        """Note in run.json what runs now: a later `--resume` ends it if this process could not."""
        self.run.record(self.backend.processes(), self.backend.threads())

    async def note_forward(self, stage_id: str, trainer: Trainer) -> None:
        """How the trainer computes: in run.json, and on the screen where that costs speed or is to be known."""
        found = await trainer.forward()
        self.run.note_forward(stage_id, found)
        if found["slower"]:
            self.report.message(f"{stage_id}: slower than it could be: {found['words']}; {'; '.join(found['slower'])}")
        for note in found["notes"]:
            self.report.message(f"{stage_id}: {note}")

    def raise_if_stopped(self, stage_id: str) -> None:
        """Raise Interrupted where the user wants the run to end and nothing of the stage has begun yet."""
        if self.stop.is_set():
            raise Interrupted(f"stopped before stage {stage_id!r}", remedy="the same command with --resume continues")

    def carried(self, start: Start) -> Carried:
        """Tokenizer, chat template and ends of turns of what a stage starts from; what differs is said once."""
        found = carried_by(self.recipe.model, start.base, start.adapter)
        for note in found.notes:
            if note not in self._said:
                self._said.add(note)
                self.report.message(f"{start.adapter}: {note}")
        return found

    def tokenizer(self, start: Start) -> ChatTokenizer:
        return self.carried(start).tokenizer

    def library(self, folder: Path | None) -> Library | None:
        """The media of the model in `folder`, open until the run ends: what its trees name stays in the store."""
        if folder is None:
            return None
        if folder not in self._libraries:
            self._libraries[folder] = open_library(self.recipe, folder)
        return self._libraries[folder]

    def close(self) -> None:
        """Give up what the run held of the media store."""
        while self._libraries:
            _, library = self._libraries.popitem()
            if library is not None:
                library.close()

    async def items(
        self,
        stage: StageBase,
        sources: Sequence[DataSource],
        kind: Kind,
        tokenizer: ChatTokenizer,
        name: str = "data",
        offered: Offered | None = None,
    ) -> list[Any]:
        """Prepared trees or prompts of `sources`; the data report goes to `<stage>/<name>.json` and the screen.

        Asked again for the same (an evaluate stage does so for every model it judges), it answers from memory.
        """
        asked = (stage.id, name, kind, tokenizer.fingerprint)
        if self._prepared is not None and self._prepared[0] == asked:
            return self._prepared[1]
        prepared = await self._read(stage, sources, kind, tokenizer, name, offered=offered)
        self._prepared = (asked, list(prepared.items))
        return self._prepared[1]

    async def _read(
        self,
        stage: StageBase,
        sources: Sequence[DataSource],
        kind: Kind,
        tokenizer: ChatTokenizer,
        name: str,
        *,
        answers: bool = False,
        offered: Offered | None = None,
    ) -> Prepared:
        prepared = await asyncio.to_thread(
            prepare,
            sources,
            kind,
            tokenizer,
            seed=self.seed(stage.id),
            cache=self.run.path.parent / ".cache",  # keyed by content: runs beside this one share it
            folder=self.recipe_folder,
            answers=answers,
            labels=stage.score_head if kind == "labelled" else None,
            media=self.library(tokenizer.folder),
            exhausted=mix_of(stage, name),
            offered=offered,
        )
        folder = self.run.stage_folder(stage.id)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / f"{name}.json", prepared.report.to_json())
        store = store_of(self.recipe)  # what was fetched lies there: it is ours, and may go
        note_media(folder, name, {p: sha for p, sha in prepared.files.items() if not Path(p).is_relative_to(store)})
        for line in (f"{stage.id}: {line}" for line in prepared.report.summary):
            if line not in self._said:  # an evaluate stage reads the same data once for every stage it judges
                self._said.add(line)
                self.report.message(line)
        return prepared

    async def trees(
        self, stage: StageBase, sources: Sequence[DataSource], kind: Kind, tokenizer: ChatTokenizer, name: str = "data"
    ) -> list[Tree]:
        return await self.items(stage, sources, kind, tokenizer, name)

    async def pairs(
        self, stage: StageBase, sources: Sequence[DataSource], tokenizer: ChatTokenizer, name: str = "data"
    ) -> tuple[list[Tree], list[Group]]:
        """Pairs as trees, and as groups of two completions with their rows, chosen first, for rewards to judge."""
        prepared = await self._read(stage, sources, "pair", tokenizer, name, answers=True)
        return list(prepared.items), list(prepared.groups)

    async def prompts(
        self,
        stage: StageBase,
        sources: Sequence[DataSource],
        tokenizer: ChatTokenizer,
        name: str = "data",
        offered: Offered | None = None,
    ) -> list[PromptItem]:
        """Prompts numbered by row, each with the seed of its row: what evaluation samples, whatever stage asks.
        offered: by environments to the prompts."""
        items = await self.items(stage, sources, "prompt", tokenizer, name, offered)
        label = f"{stage.id}/{name}"
        return [
            replace(item, group_id=row, seed=group_seed(self.recipe.seed, label, row)) for row, item in enumerate(items)
        ]


def mix_of(stage: StageBase, name: str) -> Exhausted | None:
    """How long an epoch of the stage's `data` is; other rows are not mixed."""
    return stage.mix.exhausted if isinstance(stage, TrainStage) and stage.mix and name == "data" else None


async def opened(stack: AsyncExitStack, *makers: Awaitable[Any]) -> list[Any]:
    """Await all makers at once; what they made is closed with `stack`, also where one of them fails."""
    made = await asyncio.gather(*makers, return_exceptions=True)
    for one in made:
        if not isinstance(one, BaseException):
            stack.push_async_callback(one.close)
    for one in made:
        if isinstance(one, BaseException):
            raise one
    return [one for one in made if not isinstance(one, BaseException)]
