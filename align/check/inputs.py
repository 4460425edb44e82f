"""What a recipe names outside itself: the model's folder, its tokenizer, data, and reward plugins. No torch."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from os.path import expanduser
from pathlib import Path
from typing import Any

from align.actors.plugins import plugin_spec
from align.check.facts import DataFacts
from align.check.findings import Findings
from align.check.memory import sizes as memory
from align.check.scratch import scratch
from align.check.shown_rows import shown_rows
from align.data.audit import DataReport
from align.data.media.library import Library
from align.data.media.opening import open_library, refuse_media_settings, takes_media
from align.data.prepare import prepare
from align.data.records import Kind
from align.data.scratch import train_tokenizer
from align.data.sources import on_hub
from align.data.streams import open_stream
from align.data.tokenizer import ChatTokenizer
from align.data.world import Offered
from align.errors import ModelError, PluginError
from align.hub import resolve_model_folder
from align.mediastore import processor_files
from align.model.adapter_config import read_adapter_config, refuse_beyond_lora
from align.model.media.support import refuse_unsupported_media
from align.objectives.check import Known
from align.plugins import describe_in_child
from align.recipe.capabilities import StageBase, TrainStage
from align.recipe.families import family_of
from align.recipe.inputs import DataSource, Exhausted, Model
from align.recipe.labels import Labels
from align.recipe.model_folder import refuse_adapter_inside, refuse_two_checkpoints, refuse_untied_head
from align.recipe.parts import LossTerm, ReferencePath, Reward
from align.recipe.schema import Recipe
from align.recipe.trained_on import require_base
from align.stages.context import carried_by, stage_seed
from align.stages.margins import refuse_own_margins, require_margins
from align.stages.row_weights import refuse_weights
from align.stages.stage_start import Origin
from rewards.api import PluginError as RewardsPluginError
from rewards.naming import Named, objective_names

FIRST_ROWS = 1000


@dataclass(frozen=True)
class ModelFacts:
    """The model before the first stage: its configuration and tokenizer, and where it (or its folder to be) is.

    media: of a model that takes them, open as long as it is: a process that decodes takes seconds to start. notes:
    where its adapter's tokenizer differs from its own.
    """

    config: dict[str, Any]
    tokenizer: ChatTokenizer
    origin: Origin
    media: Library | None = None
    notes: tuple[str, ...] = ()


@contextmanager
def open_model(recipe: Recipe, folder: Path) -> Iterator[ModelFacts]:
    """The model's configuration and tokenizer; from scratch, the tokenizer is trained into a temporary folder.

    folder: the recipe's. Raises ModelError, DataError, Unsupported.
    """
    model = recipe.model
    if model.path is not None:
        found = resolve_model_folder(model.path, model.revision, weights=False)
        config = memory.read_config(found)
        _refuse_unsound_weights(found, Path(expanduser(model.path)).is_dir())
        refuse_unsupported_media(config, found)
        refuse_media_settings(recipe, config)
        library = open_library(recipe, found)
        with closing(library) if library is not None else nullcontext():
            origin = Origin(found, _adapter(recipe))
            chat = carried_by(model, found, origin.adapter)
            yield ModelFacts(config, chat.tokenizer, origin, library, (*chat.notes, *_of_its_base(model, origin)))
        return
    assert model.tokenizer is not None and model.config is not None, "the grammar ties `config` and `tokenizer`"
    refuse_media_settings(recipe, model.config)
    with scratch() as aside:
        train_tokenizer(model.tokenizer, aside, data_folder=folder, family=family_of(model.config))
        chat = carried_by(model, Path(aside), None)
        yield ModelFacts(dict(model.config), chat.tokenizer, Origin(recipe.run_folder / "base", None))


def _adapter(recipe: Recipe) -> Path | None:
    """The adapter that the first stages go on with. Raises ModelError or Unsupported where they cannot."""
    if recipe.model.adapter is None:
        return None
    folder = resolve_model_folder(recipe.model.adapter)
    first = [stage for stage in recipe.stages if stage.from_ is None and stage.makes_model]
    scoring = all(stage.score_head is not None for stage in first)
    refuse_beyond_lora(read_adapter_config(folder), folder, "train", score_head=scoring)
    return folder


def _of_its_base(model: Model, origin: Origin) -> list[str]:
    """Notes on `model.adapter` and the base that it was trained on. Raises ModelError where that is another."""
    if origin.adapter is None or not any(origin.base.glob("*.safetensors")):  # the run fetches the weights
        return []
    return require_base(origin.base, origin.adapter, anyway=model.other_base, flag="`model.other_base: true`")


def check_reference(stage: StageBase) -> None:
    """A reference of its own must be there. Raises ModelError."""
    if isinstance(stage, TrainStage) and isinstance(reference := stage.reference, ReferencePath):
        memory.read_config(resolve_model_folder(reference.path, reference.revision, weights=False))
        if reference.adapter is not None:
            read_adapter_config(resolve_model_folder(reference.adapter))


def _refuse_unsound_weights(folder: Path, local: bool) -> None:
    if local and not any(folder.glob("*.safetensors")):
        raise ModelError(
            "the folder has no weights in safetensors (pickled weights are never read)",
            where=folder,
            remedy="convert them once with model.save_pretrained(folder) in transformers",
        )
    refuse_adapter_inside(folder)
    refuse_two_checkpoints(folder)
    refuse_untied_head(folder)


# ------------------------------------------------------------------------------------------------- data


def read_data(
    recipe: Recipe,
    sources: tuple[DataSource, ...],
    kind: Kind,
    model: ModelFacts,
    *,
    seed_of: str,
    folder: Path,
    every_row: bool,
    answers: bool = False,
    margins: bool = False,
    labels: Labels | None = None,
    losses: Sequence[LossTerm] = (),
    show: int = 0,
    exhausted: Exhausted | None = None,
    offered: Offered | None = None,
) -> DataFacts:
    """The first rows of each source (all with `every_row`) through tokenizer and template. Raises DataError.

    answers: rewards will judge the pairs. margins: every pair must have one, from them or from its row. labels: of
    labelled rows. losses: that learn from the rows; they must take the rows' weights. show: how many rows of each
    source are shown (0: one of each whose columns were guessed). exhausted: see `align.data.mixing`. offered: by an
    environment. A hub data set is opened with every row only: the library that reads it brings torch. Of a stream
    never more than its first rows are read.
    """
    here = tuple(s for s in sources if every_row or not on_hub(s, folder))
    streams = _streams(sources, folder)
    later = [source.path for source in sources if source not in here]
    facts = DataFacts(notes=streams)
    facts.notes += [f"{path}: a hub data set, read by `align check --data` and by the run" for path in later]
    blind = takes_media(model.config) and not _has_processor(model.tokenizer)
    facts.notes += ["read by the run, which makes the model's processor of images first"] if blind else []
    if blind or not here:
        return facts
    first = FIRST_ROWS if streams or not every_row else None
    prepared = prepare(
        here,
        kind,
        model.tokenizer,
        seed=stage_seed(recipe.seed, seed_of),
        first=first,
        folder=folder,
        answers=answers,
        media=model.media,
        labels=labels,
        exhausted=exhausted,
        offered=offered,
    )
    if margins:
        (refuse_own_margins if answers else require_margins)(prepared.items)
    refuse_weights(prepared.items, losses)
    facts.report = prepared.report
    facts.notes += _beginnings(here, prepared.report, first)
    facts.shown = shown_rows(prepared.items, prepared.report, model.tokenizer, show)
    facts.trees = prepared.items if losses else ()
    facts.prompts = prepared.items if kind == "prompt" else ()
    facts.whole = not streams and len(here) == len(sources) and not _cut(here, prepared.report, first)
    facts.measure(prepared.items)
    return facts


def _cut(sources: Sequence[DataSource], report: DataReport, first: int | None) -> bool:
    """Whether one of the sources has, or may have, more rows than the `first` that were read of it."""
    read = zip(sources, report.sources, strict=True)
    return first is not None and any((s.limit is None or s.limit > first) and r.read >= first for s, r in read)


def _beginnings(sources: Sequence[DataSource], report: DataReport, first: int | None) -> list[str]:
    """What is said of sources whose first rows alone were read. What an epoch takes of them is not known."""
    said = []
    for source, read in zip(sources, report.sources, strict=True):
        if not source.stream and _cut([source], DataReport(report.kind, [read]), first):
            read.used = read.kept
            said.append(f"{source.path}: its first {read.read:,} rows; `align check --data` reads all")
    return said


def _streams(sources: Sequence[DataSource], folder: Path) -> list[str]:
    """What is said of those that are streams. Raises DataError for one that cannot be."""
    said = []
    for source in sources:
        if source.stream:
            open_stream(source, folder)
            said.append(
                f"{source.path}: a stream, read {source.rows_at_once} rows at a time, these in random order; where it "
                "ends it begins again. Above are its first rows"
            )
    return said


def _has_processor(tokenizer: ChatTokenizer) -> bool:
    return tokenizer.folder is not None and bool(processor_files(tokenizer.folder))


# ------------------------------------------------------------------------------------------------- rewards


def describe_reward(reward: Reward, folder: Path) -> dict[str, Any]:
    """What a reward offers, from a child process; the `rewards.describe` answer. Raises PluginError."""
    spec = plugin_spec(reward)
    arguments = [spec.use, "--folder", str(folder), "--signature", spec.signature]
    arguments += ["--args", json.dumps(spec.args), "--options", json.dumps(spec.options)]
    arguments += ["--as", spec.name] if spec.name else []
    answer: dict[str, Any] = describe_in_child("rewards.describe", arguments, name=reward.use)
    return answer


class Rewards:
    """Descriptions of a recipe's rewards, each asked for once."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.sources: dict[str, str] = {}
        self._known: dict[str, dict[str, Any]] = {}

    def objectives(self, rewards: tuple[Reward, ...], stage: str, key: str, found: Findings) -> dict[str, Known] | None:
        """Objectives of a stage by name, in order; None where a reward could not be described (it is in `found`)."""
        named, offered = [], []
        for number, reward in enumerate(rewards):
            with found.gather(stage, f"{key}.{number}"):
                described = self._describe(reward)
                named.append(Named(described["name"], tuple(described["objectives"]), reward.as_ is not None))
                offered += [Known(o["kind"], o["range"]) for o in described["objectives"].values()]
        if len(named) < len(rewards):
            return None
        try:
            names = [name for names in objective_names(named) for name in names]
            return dict(zip(names, offered, strict=True))
        except RewardsPluginError as error:
            found.add(PluginError(error.what, where=key, remedy=error.remedy), stage)
            return None

    def lines(self, rewards: tuple[Reward, ...]) -> list[str]:
        """How each reward that could be described will run, as the recipe and its own decorator say together."""
        known = [self.known(reward) for reward in rewards]
        return [_reward_words(described) for described in known if described is not None]

    def known(self, reward: Reward) -> dict[str, Any] | None:
        """What the reward said of itself; None where it could not be described, or was not asked."""
        return self._known.get(reward.model_dump_json())

    def _describe(self, reward: Reward) -> dict[str, Any]:
        asked = reward.model_dump_json()
        if asked not in self._known:
            self._known[asked] = describe_reward(reward, self.folder)
        self.sources[reward.use] = self._known[asked].get("sha256") or ""
        return self._known[asked]


def _reward_words(described: dict[str, Any]) -> str:
    o = described["options"]
    gives = [f"{name} ({what['kind']})" for name, what in described["objectives"].items()]
    whole = " in whole groups" if described["scope"] == "batch" else ""
    unit = "a group a call" if described["scope"] == "group" else f"{o['batch']} a call{whole}"
    words = [
        unit,
        *(["text as generated"] if o["text"] == "raw" else []),
        f"{o['timeout_s']:g} s, {o['retries']} retries",
        f"on_error {o['on_error']}",
    ]
    words.append(f"at most {100 * o['max_error_rate']:g} % errors")
    words += [f"{o['concurrency']} at once"] if described["is_async"] else []
    words += [f"{o['processes']} processes"] if o["processes"] > 1 else []
    words += [f"rate {o['rate']}"] if o["rate"] is not None else []
    words += ["cached"] if o["cache"] else []
    return f"reward {described['name']}: {', '.join(gives)}; {', '.join(words)}"
