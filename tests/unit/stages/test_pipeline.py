"""The pipeline over plain objects: real data, run folder and checkpoints; no Ray, no model."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from align.errors import AlignError, Interrupted, RunFolderError
from align.protocols.trainer import Metrics, Publication
from align.recipe.chat_files import ChatFiles
from align.recipe.inputs import Model
from align.recipe.load import dump_recipe
from align.recipe.schema import Recipe
from align.stages.backend import FleetJob, Needs, ScorerJob, TrainerJob
from align.stages.pipeline import run_pipeline
from align.stages.processes import ProcessId
from align.stages.publication import PublicationFolder
from align.stages.runfolder import RunFolder
from tests.unit.stages.plain import Lines, PlainFleet, PlainScorer, PlainTrainer


class ServingFleet(PlainFleet):
    """Also serves the folder it was started with."""

    async def publish(self, publication: Publication) -> Metrics:
        if publication.kind == "base":
            self.version, self.w = publication.version, 0.5
            return {}
        return await super().publish(publication)


class PlainBackend:
    """Makes plain objects, keeps the jobs it was given, and fails where a test asks."""

    def __init__(self, fail_at: str = "") -> None:
        self.jobs: list[Any] = []
        self.trainers: list[PlainTrainer] = []
        self.needs: list[Needs] = []
        self.merges: list[tuple[Path, Path, Path]] = []
        self.open_places = 0
        self.fail_at = fail_at
        self.prepare = lambda trainer, job: None

    @asynccontextmanager
    async def places(self, needs: Needs) -> AsyncIterator[None]:
        self.needs.append(needs)
        self.open_places += 1
        try:
            yield
        finally:
            self.open_places -= 1

    async def trainer(self, job: TrainerJob) -> PlainTrainer:
        assert self.open_places == 1
        self.jobs.append(job)
        trainer = PlainTrainer(job.start.base if job.start.artefact == "model" else None)
        self.trainers.append(trainer)
        self.prepare(trainer, job)
        return trainer

    async def fleet(self, job: FleetJob) -> ServingFleet:
        self.jobs.append(job)
        if self.fail_at == "fleet":
            raise AlignError("no engine")
        return ServingFleet()

    async def scorer(self, job: ScorerJob) -> PlainScorer:
        self.jobs.append(job)
        return PlainScorer(**{reward.name: lambda g, c: -float(len(c.token_ids)) for reward in job.rewards})

    def expect(self, needs: Needs, engine: str | None = None) -> None: ...

    def gpus(self) -> float:
        return 0

    async def multiplied(self, inner: int, outer: int) -> Mapping[str, float]:
        return {"float32": 100.0, "bfloat16": 1.0}

    async def write_base(self, model: Model, folder: Path, seed: int) -> None:
        assert (folder / "tokenizer.json").is_file()
        (folder / "config.json").write_text(json.dumps(model.config))

    async def merge(
        self, base: Path, adapter: Path, out: Path, *, dtype: str, seed: int, chat: ChatFiles
    ) -> Mapping[str, Any]:
        if self.fail_at == "merge":
            raise AlignError("the merge could not be proved")
        assert not out.exists()
        self.merges.append((base, adapter, out))
        self._model_folder(base, out)
        return {"kl": 1e-9, "warnings": ("rounding costs what was trained",)}

    async def export(self, folder: Path, out: Path, *, format: str, dtype: str) -> Mapping[str, Any]:
        self._model_folder(folder, out)
        return {}

    def _model_folder(self, source: Path, out: Path) -> None:
        out.mkdir(parents=True)
        for path in source.iterdir():
            if path.is_file():
                (out / path.name).write_bytes(path.read_bytes())

    def processes(self) -> list[ProcessId]:
        return []

    def threads(self) -> Mapping[str, int]:
        return {"trainer": 2}

    async def close(self) -> None: ...


def chat(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    rows = [chat(f"{a} + {b} =", str(a + b)) for a in range(4) for b in range(3)]
    pairs = [{"prompt": "Hi", "chosen": "yes", "rejected": "no, I will not"} for _ in range(8)]
    for name, content in (("rows", rows), ("pairs", pairs)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    data, full = str(tmp_path / "rows.jsonl"), {"kind": "full"}
    shared = {"data": data, "save": {"every": 2}}
    return Recipe.model_validate(
        {
            "name": "run",
            "output": str(tmp_path / "runs"),
            "model": {"config": {"model_type": "qwen3"}, "tokenizer": {"train_on": data, "vocab_size": 300}},
            "stages": [
                {"id": "sft", "kind": "sft", **shared, "batch": {"sequences": 4}, "epochs": 2, "adapter": full,
                 "eval": {"data": data, "every": 3, "at_start": True}},
                {"id": "dpo", "kind": "preference", "from": "sft", **shared, "data": str(tmp_path / "pairs.jsonl"),
                 "batch": {"pairs": 4}, "steps": 3, "adapter": {"kind": "lora", "rank": 4}},
                {"id": "grpo", "kind": "online", "from": "dpo", **shared, "batch": {"groups": 5, "group_size": 2},
                 "steps": 5, "rewards": [{"use": "short"}], "eval": {"data": data, "every": 5}},
                {"id": "merged", "kind": "merge", "from": "grpo"},
                {"id": "release", "kind": "export", "from": "merged"},
                {"id": "exam", "kind": "evaluate", "of": ["dpo", "release"], "data": data,
                 "rewards": [{"use": "short"}]},
                {"id": "losses", "kind": "evaluate", "of": ["sft"], "data": data},
            ],
        }
    )  # fmt: skip


def start(recipe: Recipe, backend: PlainBackend, *, resume: bool = False, from_stage: str | None = None, stop_in=()):
    """One start of the recipe; returns (summary, report)."""
    lines, folder = Lines(), recipe.run_folder.parent.parent
    run = RunFolder.open(recipe, dump_recipe(recipe), resume=resume, cwd=folder)
    publications = PublicationFolder(run.path)

    async def whole() -> dict[str, Any]:
        stop = asyncio.Event()
        previous = backend.prepare

        def prepare(trainer: PlainTrainer, job: TrainerJob) -> None:
            previous(trainer, job)
            if stop_in and job.stage_id == stop_in[0]:
                trainer.during_step = lambda step: stop.set() if step == stop_in[1] else None

        backend.prepare = prepare
        return await run_pipeline(
            recipe, run, backend, lines, publications,
            recipe_folder=folder, plugins={"short": "hash"}, stop=stop, from_stage=from_stage,
        )  # fmt: skip

    try:
        return asyncio.run(whole()), lines
    finally:
        publications.close()
        run.ended()


def test_the_steps_of_an_online_stage_count_turns_and_its_schedule_updates(recipe: Recipe) -> None:
    often = recipe.stages[2].model_copy(update={"updates_per_batch": 2, "minibatches": 5})
    backend = PlainBackend()
    start(recipe.model_copy(update={"stages": (*recipe.stages[:2], often)}), backend)
    job = next(job for job in backend.jobs if isinstance(job, TrainerJob) and job.stage_id == "grpo")
    steps = [call for call in backend.trainers[2].calls if call.startswith("step")]
    assert job.total == len(steps) == 5 * 2 * 5
    assert [call for call in backend.trainers[2].calls if call.startswith("publish")] == [
        f"publish {version}" for version in range(6)
    ]


def test_a_recipe_runs_from_scratch_to_its_evaluation(recipe: Recipe) -> None:
    backend = PlainBackend()
    summary, _ = start(recipe, backend)
    stages = summary["stages"]
    assert list(stages) == ["sft", "dpo", "grpo", "merged", "release", "exam", "losses"]
    assert (stages["sft"]["steps"], stages["dpo"]["steps"], stages["grpo"]["steps"]) == (6, 3, 5)
    assert stages["dpo"]["metrics"]["mean_length"] > 0 and stages["release"]["metrics"]["short"] < 0
    assert "accuracy" not in stages["grpo"]["metrics"], "the exam was not asked about it"
    assert stages["sft"]["metrics"]["eval/loss"] != 0
    folder = recipe.run_folder
    for path in ("sft/model/w.json", "dpo/adapter/w.json", "grpo/adapter/w.json", "merged/model/config.json",
                 "release/model/config.json", "exam/rollouts/dpo/step-000000.parquet", "base/tokenizer.json",
                 "grpo/rollouts/step-000005.parquet", "sft/data.json", "sft/eval.json"):  # fmt: skip
        assert (folder / path).is_file(), path
    assert not [p for p in folder.rglob("*") if p.name.startswith((".writing", ".removing", ".merged"))]
    assert backend.open_places == 0
    assert all(trainer.calls[-1] == "close" for trainer in backend.trainers)


def test_an_exam_judges_the_model_before_any_stage_too_which_is_no_stage_of_the_summary(recipe: Recipe) -> None:
    losses = recipe.stages[-1].model_copy(update={"of": ("base", "sft")})
    exam = recipe.stages[-2].model_copy(update={"of": ("base", "sft")})
    backend = PlainBackend()
    summary, _ = start(recipe.model_copy(update={"stages": (recipe.stages[0], exam, losses)}), backend)
    stages = summary["stages"]
    assert list(stages) == ["sft", "exam", "losses"]
    assert stages["exam"]["of"] == ["base", "sft"]
    for key in ("short", "short/ci95", "mean_length"):
        assert {f"base/{key}", f"sft/{key}"} <= stages["exam"]["metrics"].keys()
    assert {"base/eval/loss", "sft/eval/loss"} <= stages["losses"]["metrics"].keys()
    served = [job.base for job in backend.jobs if isinstance(job, FleetJob)]
    assert served == [recipe.run_folder / "base", recipe.run_folder / "sft" / "model"]


def test_what_makes_a_stage_slower_is_said_when_it_starts_and_recorded(recipe: Recipe) -> None:
    backend = PlainBackend()

    def prepare(trainer: PlainTrainer, job: TrainerJob) -> None:
        trainer.slower = ["m.conv carries a state"] if job.stage_id == "dpo" else []

    backend.prepare = prepare
    summary, report = start(recipe, backend)
    said = [line for line in report.messages if "slower than" in line]
    assert said == ["dpo: slower than it could be: packed; m.conv carries a state"]
    recorded = json.loads((recipe.run_folder / "run.json").read_text())["stages"]
    assert recorded["dpo"]["forward"]["slower"] == summary["stages"]["dpo"]["forward"]["slower"] != []
    assert recorded["sft"]["forward"]["layout"] == "shared" and "forward" not in summary["stages"]["merged"]


def test_each_stage_is_told_what_it_starts_from(recipe: Recipe) -> None:
    backend = PlainBackend()
    start(recipe, backend)
    folder = recipe.run_folder
    sft, dpo, grpo = (next(j for j in backend.jobs if isinstance(j, TrainerJob) and j.stage_id == i)
                      for i in ("sft", "dpo", "grpo"))  # fmt: skip
    assert (sft.start.base, sft.start.adapter, sft.total, sft.reference) == (folder / "base", None, 6, None)
    assert (dpo.start.base, dpo.start.adapter, dpo.reference) == (folder / "sft" / "model", None, "start")
    assert (grpo.start.base, grpo.start.adapter) == (folder / "sft" / "model", folder / "dpo" / "adapter")
    assert grpo.start.config.rank == 4 and grpo.reference is None, "GRPO without a KL term needs no reference"
    assert len({sft.seed, dpo.seed, grpo.seed}) == 3
    fleet = next(j for j in backend.jobs if isinstance(j, FleetJob) and j.stage_id == "grpo")
    assert (fleet.base, fleet.adapter_rank, fleet.group_size) == (folder / "sft" / "model", 0, 2), "no GPU: merged"
    assert backend.merges[0] == (folder / "sft" / "model", folder / "grpo" / "adapter", folder / "merged" / "model")
    served = [j.base for j in backend.jobs if isinstance(j, FleetJob) and j.stage_id == "exam"]
    assert served == [folder / "exam" / ".merged-dpo", folder / "release" / "model"]


def test_a_second_start_keeps_every_finished_stage(recipe: Recipe) -> None:
    first, _ = start(recipe, PlainBackend())
    backend = PlainBackend()
    again, lines = start(recipe, backend, resume=True)
    assert again == first and backend.jobs == [] and backend.merges == []
    assert sum("kept" in message for message in lines.messages) == 7


def test_a_stop_ends_the_run_and_resume_finishes_it_as_if_undisturbed(recipe: Recipe) -> None:
    whole, _ = start(recipe.model_copy(update={"name": "whole"}), PlainBackend())
    with pytest.raises(Interrupted):
        start(recipe, PlainBackend(), stop_in=("grpo", 1))
    state = json.loads((recipe.run_folder / "run.json").read_text())
    assert [entry["state"] for entry in state["stages"].values()] == ["finished", "finished", "running"]
    backend = PlainBackend()
    summary, lines = start(recipe, backend, resume=True)
    assert "grpo: continues from step 2" in lines.messages
    assert [j.stage_id for j in backend.jobs if isinstance(j, TrainerJob)] == ["grpo", "losses"]
    for name in ("dpo", "grpo", "release"):
        timed = ("time/", "tokens/per_second")
        one, two = ({k: v for k, v in s["stages"][name]["metrics"].items() if not k.startswith(timed)}
                    for s in (whole, summary))  # fmt: skip
        assert one == two, name


def test_from_stage_runs_it_and_the_later_ones_again(recipe: Recipe) -> None:
    start(recipe, PlainBackend())
    backend = PlainBackend()
    _, lines = start(recipe, backend, from_stage="merged", resume=True)
    assert [j for j in backend.jobs if isinstance(j, TrainerJob) and j.stage_id != "losses"] == []
    assert len(backend.merges) == 2, "the merge stage, and the exam's own of dpo"
    assert (recipe.run_folder / "merged.old-1" / "model").is_dir()
    assert "set aside: merged.old-1" in lines.messages


def test_an_edited_stage_stops_a_resume_before_anything_starts(recipe: Recipe) -> None:
    start(recipe, PlainBackend())
    stages = list(recipe.stages)
    stages[0] = stages[0].model_copy(update={"epochs": 3.0})
    backend = PlainBackend()
    with pytest.raises(RunFolderError, match=r"stage\.epochs: 2\.0 -> 3\.0"):
        start(recipe.model_copy(update={"stages": tuple(stages)}), backend, resume=True)
    assert backend.jobs == []


def test_a_template_of_the_recipe_travels_with_every_whole_model(recipe: Recipe) -> None:
    template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}: {{ m['content'] }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant: {% endif %}"
    )
    model = recipe.model.model_copy(update={"chat_template": template})
    start(recipe.model_copy(update={"model": model}), PlainBackend())
    for folder in ("sft", "merged", "release"):
        assert (recipe.run_folder / folder / "model" / "chat_template.jinja").read_text() == template, folder


def test_what_was_made_is_closed_where_another_part_fails_to_start(recipe: Recipe) -> None:
    backend = PlainBackend(fail_at="fleet")
    with pytest.raises(AlignError, match="no engine"):
        start(recipe, backend)
    assert all(trainer.calls[-1] == "close" for trainer in backend.trainers) and backend.open_places == 0


def test_a_merge_that_fails_leaves_no_model_and_can_be_run_again(recipe: Recipe) -> None:
    with pytest.raises(AlignError, match="proved"):
        start(recipe, PlainBackend(fail_at="merge"))
    assert not (recipe.run_folder / "merged" / "model").exists()
    summary, _ = start(recipe, PlainBackend(), resume=True)
    assert "exam" in summary["stages"]


def test_what_a_merge_warns_of_is_said_on_the_screen(recipe: Recipe) -> None:
    _, report = start(recipe, PlainBackend())
    assert [line for line in report.messages if "rounding" in line] == ["merged: rounding costs what was trained"]


def test_a_model_that_a_kill_left_unrecorded_is_made_again(recipe: Recipe) -> None:
    with pytest.raises(AlignError, match="proved"):
        start(recipe, PlainBackend(fail_at="merge"))
    (recipe.run_folder / "merged" / "model").mkdir()
    start(recipe, PlainBackend(), resume=True)
    assert (recipe.run_folder / "merged" / "model" / "config.json").is_file()
