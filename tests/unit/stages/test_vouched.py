"""What a finished stage or a checkpoint left is compared with what was written, before anything builds on it."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from align.cli.main import main
from align.errors import Interrupted, RunFolderError
from align.experiments.runs import read_recipe
from align.recipe.schema import Recipe
from align.stages.loop import Loop
from align.stages.manifest import require_artefact, write_manifest
from align.stages.metrics_file import METRICS, cut_metrics, last_step, metrics_mark
from align.stages.rollout_log import read_rollouts
from tests.unit.stages import test_pipeline
from tests.unit.stages.plain import Lines
from tests.unit.stages.test_pipeline import PlainBackend, start

recipe = test_pipeline.recipe


def flip(path: Path, at: int = -2, *, same_time: bool = False) -> None:
    """One bit, as a disk does it: the size stays, and the time where asked."""
    facts, content = path.stat(), bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)
    if same_time:
        os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))


def stopped(recipe: Recipe, stage: str = "grpo", step: int = 1) -> Path:
    """A run of which `stage` was stopped after a checkpoint; the stages before it are finished."""
    with pytest.raises(Interrupted):
        start(recipe, PlainBackend(), stop_in=(stage, step))
    return recipe.run_folder


@pytest.mark.parametrize("name", ["sft/model/tokenizer.json", "dpo/adapter/w.json"])
def test_one_flipped_bit_in_what_a_later_stage_builds_on_stops_a_resume(recipe: Recipe, name: str) -> None:
    """The time is as it was: a disk that fails changes none."""
    flip(stopped(recipe) / name, same_time=True)
    backend = PlainBackend()
    with pytest.raises(RunFolderError) as caught:
        start(recipe, backend, resume=True)
    stage, _, file = name.partition("/")
    said = str(caught.value)
    assert f"what stage {stage!r} left has changed" in said and Path(file).name in said
    assert f"--from-stage {stage}" in said and backend.jobs == []


def test_from_stage_makes_a_damaged_stage_again(recipe: Recipe) -> None:
    flip(stopped(recipe) / "dpo" / "adapter" / "w.json")
    summary, _ = start(recipe, PlainBackend(), resume=True, from_stage="dpo")
    assert "exam" in summary["stages"]


def test_a_stage_that_is_only_kept_is_compared_where_it_was_touched(recipe: Recipe) -> None:
    start(recipe, PlainBackend())
    flip(recipe.run_folder / "release" / "model" / "config.json")
    with pytest.raises(RunFolderError, match=r"'release' left has changed: config\.json is damaged"):
        start(recipe, PlainBackend(), resume=True)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda f: (f / "sft" / "model" / "extra.safetensors").write_bytes(b"x"), "was not written by the stage"),
        (lambda f: (f / "sft" / "artefacts.json").unlink(), "is gone"),
        (lambda f: flip(f / "sft" / "artefacts.json"), "is not what was written"),
        (lambda f: (f / "sft" / "model" / "w.json").unlink(), "w.json cannot be read"),
        (lambda f: flip(f / "sft" / METRICS, 20), "a line was changed"),
        (lambda f: os.truncate(f / "sft" / METRICS, 10), "bytes are gone"),
        (lambda f: flip(f / "base" / "tokenizer.json", 100, same_time=True), "remove it: it is made again"),
    ],
    ids=["new file", "no list", "list", "missing", "metrics", "cut metrics", "base"],
)
def test_whatever_changed_of_a_finished_stage_is_named(recipe: Recipe, damage, said: str) -> None:
    folder = stopped(recipe, "sft" if said.startswith("remove") else "dpo", 1)
    damage(write_curves(folder))
    with pytest.raises(RunFolderError, match=said):
        start(recipe, PlainBackend(), resume=True)


def write_curves(folder: Path) -> Path:
    """The plain report writes no metrics file: put one beside the finished stage, as its end would have."""
    for stage in ("sft",):
        state = json.loads((folder / "run.json").read_text())
        entry = state["stages"][stage]
        if entry["state"] == "finished":
            lines = "".join(json.dumps({"step": n + 1, "time": 1.0, "loss/total": 0.5}) + "\n" for n in range(6))
            (folder / stage / METRICS).write_text(lines)
            paths = [Path(path) for path in entry["artefacts"].values()]
            entry["manifest"] = write_manifest(folder / stage, paths)
            (folder / "run.json").write_text(json.dumps(state))
    return folder


def test_notes_and_pictures_beside_the_weights_are_the_users_own(recipe: Recipe) -> None:
    folder = stopped(recipe)
    (folder / "dpo" / "adapter" / "README.md").write_text("my notes")
    (folder / "sft" / "model" / "curve.png").write_bytes(b"x")
    start(recipe, PlainBackend(), resume=True)


def test_a_run_of_a_version_without_lists_goes_on_and_says_so(recipe: Recipe) -> None:
    folder = stopped(recipe)
    state = json.loads((folder / "run.json").read_text())
    for name, entry in state["stages"].items():
        entry.pop("manifest", None)
        (folder / name / "artefacts.json").unlink(missing_ok=True)
    state["processes"] = [{"pid": 1, "started": 1.0, "what": "driver"}]
    (folder / "run.json").write_text(json.dumps(state))
    (folder / "artefacts.json").unlink()
    for manifest in folder.rglob("manifest.json"):
        old = json.loads(manifest.read_text())
        manifest.write_text(json.dumps({"step": old["step"], "files": old["files"]}))
    _, lines = start(recipe, PlainBackend(), resume=True)
    assert sum("cannot be checked" in line for line in lines.messages) == 2


def test_a_finished_stage_whose_folder_was_removed_may_go_where_nothing_needs_it(recipe: Recipe) -> None:
    start(recipe, PlainBackend())
    shutil.rmtree(recipe.run_folder / "sft" / "model")
    _, lines = start(recipe, PlainBackend(), resume=True)
    assert any("model is gone" in line for line in lines.messages)
    with pytest.raises(RunFolderError, match="it is gone"):
        start(recipe, PlainBackend(), resume=True, from_stage="dpo")


def test_a_moved_stage_is_vouched_for_where_it_lies_now(recipe: Recipe, tmp_path: Path) -> None:
    start(recipe, PlainBackend())
    moved = shutil.copytree(recipe.run_folder / "dpo", tmp_path / "elsewhere")
    require_artefact(moved / "adapter")
    flip(moved / "adapter" / "w.json")
    with pytest.raises(RunFolderError, match=r"w\.json is damaged"):
        require_artefact(moved / "adapter")


def test_a_model_that_is_another_runs_stage_is_compared_too(recipe: Recipe, tmp_path: Path) -> None:
    start(recipe, PlainBackend())
    flip(recipe.run_folder / "release" / "model" / "tokenizer.json", same_time=True)
    model = recipe.model.model_copy(
        update={"path": str(recipe.run_folder / "release" / "model"), "config": None, "tokenizer": None}
    )
    with pytest.raises(RunFolderError, match="'release' left has changed"):
        start(recipe.model_copy(update={"name": "second", "model": model}), PlainBackend())


@pytest.mark.parametrize("verb", ["merge", "soup", "classify"])
def test_verbs_that_take_a_stages_folder_compare_it(tmp_path: Path, verb: str, capsys: pytest.CaptureFixture) -> None:
    adapter = tmp_path / "dpo" / "adapter"
    adapter.mkdir(parents=True)
    (adapter / "adapter_config.json").write_text('{"base_model_name_or_path": "' + str(tmp_path) + '"}')
    (adapter / "adapter_model.safetensors").write_bytes(b"\0" * 64)
    write_manifest(tmp_path / "dpo", [adapter])
    flip(adapter / "adapter_model.safetensors", same_time=True)
    given, out = str(adapter), ["--out", str(tmp_path / "out")]
    words = {
        "merge": ["--base", str(tmp_path), "--adapter", given, *out],
        "soup": [given, given, "--weights", "0.5,0.5", *out],
        "classify": [given, str(tmp_path / "rows.jsonl"), *out],
    }
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a"}\n')
    assert main([verb, *words[verb]]) == 2
    said = capsys.readouterr().err
    assert "what stage 'dpo' left has changed: adapter_model.safetensors is damaged" in said, said


def test_the_best_checkpoint_is_vouched_for_as_the_last_one_is(tmp_path: Path) -> None:
    best = tmp_path / "sft" / "checkpoints" / "step-000004" / "trainer" / "adapter"
    best.mkdir(parents=True)
    (best / "w.json").write_text("1.0")
    write_manifest(tmp_path / "sft", [best])
    require_artefact(best)
    flip(best / "w.json", 0)
    with pytest.raises(RunFolderError, match=r"w\.json is damaged"):
        require_artefact(best)


def test_a_stage_whose_driver_died_after_its_last_checkpoint_keeps_its_metrics(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The artefacts were not written; the next start finds every turn done."""
    monkeypatch.setattr(test_pipeline, "Lines", Written)
    Written.folder = recipe.run_folder.with_name("whole")
    whole, _ = start(recipe.model_copy(update={"name": "whole"}), PlainBackend())
    Written.folder = recipe.run_folder
    finish = Loop._finish

    async def dies(loop: Loop):
        if loop.stage_id == "dpo":
            raise KeyboardInterrupt
        return await finish(loop)

    monkeypatch.setattr(Loop, "_finish", dies)
    with pytest.raises(KeyboardInterrupt):
        start(recipe, PlainBackend())
    monkeypatch.setattr(Loop, "_finish", finish)
    summary, lines = start(recipe, PlainBackend(), resume=True)
    assert "dpo: continues from step 3" in lines.messages
    for stage in ("dpo", "grpo"):
        one, two = (s["stages"][stage]["metrics"] for s in (whole, summary))
        assert one.keys() == two.keys() and one["loss/total"] == two["loss/total"]


class Written(Lines):
    """Also writes metrics.jsonl, as the real report does."""

    folder: Path

    def step(self, stage_id: str, step: int, metrics) -> None:
        super().step(stage_id, step, metrics)
        folder = self.folder / stage_id
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / METRICS).open("a") as out:
            out.write(json.dumps({"step": step, "time": 1.0, **metrics}) + "\n")


# ------------------------------------------------------------------------------------------------- metrics.jsonl


def curves(path: Path, last: int = 6) -> Path:
    path.write_text("".join(json.dumps({"step": n, "x": n / 3}) + "\n" for n in range(last)))
    return path


def test_a_changed_line_that_a_checkpoint_knew_is_an_error(tmp_path: Path) -> None:
    path = curves(tmp_path / METRICS)
    mark = metrics_mark(path)
    with path.open("a") as out:
        out.write('{"step": 6, "x": 2.0}\n{"step": 7, "x"')
    said: list[str] = []
    cut_metrics(path, 5, mark, said.append)
    assert path.read_text() == curves(tmp_path / "as it was").read_text()
    assert len(said) == 1 and "its last line was torn" in said[0]
    path.write_text(path.read_text().replace("0.3333", "0.4444"))
    with pytest.raises(RunFolderError, match=r"the checkpoint of step 5: a line was changed\n.*move it away"):
        cut_metrics(path, 5, mark)
    path.unlink()
    cut_metrics(path, 5, mark, said.append)
    assert "is gone: the curves begin after step 5" in said[-1]


@pytest.mark.parametrize(
    "line", ["{", '{"x": 1}', '{"step": "2"}', '{"step": true}', '{"step": -1}', "[1]", "\udcff", "[" * 5000]
)
def test_a_bad_line_in_the_middle_is_an_error_with_its_number(tmp_path: Path, line: str) -> None:
    path = curves(tmp_path / METRICS)
    lines = path.read_text().splitlines()
    lines[2] = line
    path.write_text("\n".join(lines) + "\n", errors="surrogateescape")
    for read in (lambda: cut_metrics(path, 5), lambda: last_step(path)):
        with pytest.raises(RunFolderError, match=r"metrics\.jsonl:3: this line is damaged"):
            read()


def test_a_resume_compares_the_metrics_with_its_checkpoint(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(test_pipeline, "Lines", Written)
    Written.folder = recipe.run_folder
    folder = stopped(recipe)
    path = folder / "grpo" / METRICS
    path.write_text(path.read_text().replace('"step": 1', '"step":  1'))
    with pytest.raises(RunFolderError, match="the checkpoint of step 2: "):
        start(recipe, PlainBackend(), resume=True)
    path.unlink()
    _, lines = start(recipe, PlainBackend(), resume=True)
    assert any("the curves begin after step 2" in line for line in lines.messages)


def test_a_changed_number_in_a_summary_is_refused_and_spaces_are_not(recipe: Recipe) -> None:
    folder = stopped(recipe)
    path = folder / "summary.json"
    whole = json.loads(path.read_text())
    path.write_text(json.dumps(whole))
    changed = json.loads(json.dumps(whole))
    changed["stages"]["dpo"]["steps"] += 1
    path.write_text(json.dumps(changed))
    with pytest.raises(RunFolderError, match=r"summary\.json: it is not what the run wrote"):
        start(recipe, PlainBackend(), resume=True)
    path.write_text(json.dumps({key: value for key, value in changed.items() if key != "sha256"}))
    start(recipe, PlainBackend(), resume=True)  # of a version that noted none
    path.write_text(json.dumps(whole))
    start(recipe, PlainBackend(), resume=True)


def test_a_study_of_a_run_whose_recipe_was_changed_since_is_refused(recipe: Recipe) -> None:
    """Its weights and settings would be taken for those that the rollouts were made by."""
    start(recipe, PlainBackend())
    path = recipe.run_folder / "recipe.yaml"
    right = read_recipe(recipe.run_folder)
    path.write_text(path.read_text().replace("group_size: 2", "group_size: 3"))
    with pytest.raises(RunFolderError, match=r"recipe\.yaml: it is not the recipe by which the run was made"):
        read_recipe(recipe.run_folder)
    start(recipe, PlainBackend(), resume=True)
    assert read_recipe(recipe.run_folder) == right


# ------------------------------------------------------------------------------------------------- rollouts


def test_a_flipped_bit_in_rollouts_is_refused_by_whoever_reads_them(recipe: Recipe) -> None:
    start(recipe, PlainBackend())
    folder = recipe.run_folder / "exam" / "rollouts" / "dpo"
    [file] = folder.glob("*.parquet")
    whole, refused, right = file.read_bytes(), 0, read_rollouts(folder)
    for at in range(4, len(whole), 23):
        file.write_bytes(whole)
        flip(file, at)
        try:
            found = read_rollouts(folder)
        except RunFolderError as error:
            assert "--from-stage" in str(error)
            refused += 1
            continue
        assert found.names == right.names and np.array_equal(found.scores, right.scores, equal_nan=True), at
        assert all(map(str, found.columns["completion"])) and list(found.columns["prompt"]) == list(
            right.columns["prompt"]
        ), at
    assert refused > 50
    for content in (b"", b"PAR1", whole[: len(whole) // 2], whole[:-7]):
        file.write_bytes(content)
        with pytest.raises(RunFolderError, match="--from-stage"):
            read_rollouts(folder)


def test_rollouts_of_a_finished_stage_that_were_exchanged_cut_back_or_added_to_are_refused(recipe: Recipe) -> None:
    """Each of these is a whole file of completions, which no checksum of its own pages tells from the right one."""
    start(recipe, PlainBackend())
    grpo = recipe.run_folder / "grpo" / "rollouts"
    first, *others = sorted(grpo.glob("*.parquet"))
    right = first.read_bytes()
    shutil.copy(others[0], first)
    with pytest.raises(RunFolderError, match="step-000002"):
        read_rollouts(grpo)
    with pytest.raises(RunFolderError, match=r"step-000002.*\n.*--from-stage grpo"):
        start(recipe, PlainBackend(), resume=True)
    first.unlink()
    with pytest.raises(RunFolderError, match=r"step-000002.*is gone"):
        read_rollouts(grpo)
    _, lines = start(recipe, PlainBackend(), resume=True)
    assert any("1 files of its rollouts are gone" in line for line in lines.messages)
    first.write_bytes(right)
    shutil.copy(first, grpo / "step-000009.parquet")
    with pytest.raises(RunFolderError, match=r"step-000009.* was not written by the stage"):
        read_rollouts(grpo)
    [dpo] = (recipe.run_folder / "exam" / "rollouts" / "dpo").glob("*.parquet")
    shutil.copy(others[1], dpo)  # of another stage
    with pytest.raises(RunFolderError, match=r"step-000000.* were written|step-000000.*damaged"):
        read_rollouts(dpo.parent)
    assert len(read_rollouts(dpo.parent.with_name("release")))


def test_a_strangers_file_among_rollouts_stays(recipe: Recipe) -> None:
    folder = stopped(recipe)
    (folder / "grpo" / "rollouts" / "notes.txt").write_text("mine")
    start(recipe, PlainBackend(), resume=True)
    assert (folder / "grpo" / "rollouts" / "notes.txt").exists()
