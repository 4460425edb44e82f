from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from align.errors import RunFolderError
from align.recipe.load import dump_recipe
from align.recipe.schema import Recipe
from align.stages import processes
from align.stages.files import read_json, sha256_file, write_json
from align.stages.fingerprint import differences, fingerprint
from align.stages.media_inputs import note_media
from align.stages.metrics_file import cut_metrics
from align.stages.processes import ProcessId
from align.stages.runfolder import RunFolder, require_known


def recipe(folder: Path, **changes: Any) -> Recipe:
    data = folder / "rows.jsonl"
    if not data.exists():
        data.write_text('{"messages": []}\n')
    stages = [
        {"id": "sft", "kind": "sft", "data": str(data), "steps": 4, "optim": {"lr": 1e-3}},
        {"id": "dpo", "kind": "preference", "from": "sft", "data": str(data), "steps": 4},
        {
            "id": "grpo", "kind": "online", "from": "dpo", "data": str(data), "steps": 4,
            "rewards": [{"use": "my.py:short"}],
        },
    ]  # fmt: skip
    for key, value in changes.items():
        stage, _, field = key.partition("_")
        next(s for s in stages if s["id"] == stage)[field] = value
    return Recipe.model_validate(
        {"name": "run", "output": str(folder / "runs"), "model": {"path": str(folder)}, "stages": stages}
    )


def opened(r: Recipe, *, resume: bool = False) -> RunFolder:
    return RunFolder.open(r, "name: run\n", resume=resume, cwd=r.run_folder.parent.parent)


def prints(r: Recipe, plugins: dict[str, str] | None = None) -> dict[str, Any]:
    return {stage.id: fingerprint(r, stage, plugins or {"my.py:short": "abc"}) for stage in r.stages}


def finished(r: Recipe, *ids: str) -> RunFolder:
    """A run in which stages `ids` are finished, seen by a second start."""
    run = opened(r)
    marks = prints(r)
    for name in ids:
        run.stage_folder(name).mkdir()
        run.begin(name, marks[name], {"base": "b", "adapter": None})
        run.finish(name, {"adapter": f"{name}/adapter"})
        run.summarise(name, {"steps": 4, "metrics": {"loss/total": 1.0}})
    run.ended()
    return opened(r, resume=True)


def compare(run: RunFolder, r: Recipe, plugins: dict[str, str] | None = None) -> None:
    marks = prints(r, plugins)
    run.compare(r, lambda stage: marks[stage.id])


def test_an_existing_run_needs_resume_or_another_name(tmp_path: Path) -> None:
    opened(recipe(tmp_path)).ended()
    with pytest.raises(RunFolderError) as caught:
        opened(recipe(tmp_path))
    assert caught.value.exit_code == 2
    assert "--resume" in str(caught.value) and "name=" in str(caught.value)
    assert opened(recipe(tmp_path), resume=True).state["starts"] == 2


def test_resume_without_an_earlier_run_starts_one(tmp_path: Path) -> None:
    assert opened(recipe(tmp_path), resume=True).state["starts"] == 1


def test_a_folder_that_is_no_run_is_never_taken_over(tmp_path: Path) -> None:
    folder = recipe(tmp_path).run_folder
    folder.mkdir(parents=True)
    (folder / "thesis.txt").write_text("mine")
    with pytest.raises(RunFolderError, match="no run"):
        opened(recipe(tmp_path), resume=True)


def test_what_a_run_is_stands_in_its_folder(tmp_path: Path) -> None:
    run = opened(recipe(tmp_path))
    compare(run, recipe(tmp_path))
    state = read_json(run.path / "run.json")
    assert state["seed"] == 0 and state["versions"]["numpy"] and "git_commit" in state
    assert state["processes"] == [processes.this_process().to_json()]
    assert (run.path / "recipe.yaml").read_text() == "name: run\n"


def test_a_refused_resume_leaves_the_runs_recipe_as_it_was(tmp_path: Path) -> None:
    run = finished(recipe(tmp_path), "sft")
    compare(run, recipe(tmp_path))
    edited = recipe(tmp_path, sft_steps=8)
    again = RunFolder.open(edited, "name: edited\n", resume=True, cwd=tmp_path)
    with pytest.raises(RunFolderError):
        compare(again, edited)
    assert (run.path / "recipe.yaml").read_text() == "name: run\n"


def test_what_a_kill_left_of_the_very_first_write_is_no_run(tmp_path: Path) -> None:
    folder = recipe(tmp_path).run_folder
    folder.mkdir(parents=True)
    (folder / ".run.json.123").write_text("{")
    assert opened(recipe(tmp_path)).state["starts"] == 1


def test_a_second_driver_is_refused_while_the_first_one_works(tmp_path: Path) -> None:
    run = opened(recipe(tmp_path))
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        other = processes.describe(child.pid, "driver")
        assert other is not None
        run.state["processes"] = [other.to_json()]
        run.write()
        with pytest.raises(RunFolderError, match=f"process {child.pid} is working"):
            opened(recipe(tmp_path), resume=True)
        assert child.poll() is None
    finally:
        child.kill()
        child.wait()


def test_resume_ends_what_a_killed_driver_left_and_no_stranger(tmp_path: Path) -> None:
    run = opened(recipe(tmp_path))
    left, stranger = (subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) for _ in range(2))
    try:
        ours = processes.describe(left.pid, "ray: raylet")
        reused = processes.describe(stranger.pid, "ray: worker")
        assert ours is not None and reused is not None
        run.record([ours, ProcessId(reused.pid, reused.started - 500, reused.what)], {})
        opened(recipe(tmp_path), resume=True)
        assert not processes.is_alive(ours)
        assert stranger.poll() is None
    finally:
        for child in (left, stranger):
            child.kill()
            child.wait()


def test_an_unchanged_recipe_keeps_its_finished_stages(tmp_path: Path) -> None:
    r = recipe(tmp_path)
    run = finished(r, "sft", "dpo")
    compare(run, r)
    assert list(run.finished()) == ["sft", "dpo"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"sft_steps": 8}, "stage.steps: 4 -> 8"),
        ({"sft_optim": {"lr": 2e-3}}, "stage.optim.lr: 0.001 -> 0.002"),
        ({"dpo_loss": {"name": "dpo", "beta": 0.5}}, "stage.loss"),
    ],
)
def test_an_edited_stage_is_refused_with_the_key_that_differs(tmp_path: Path, changes: dict, said: str) -> None:
    run = finished(recipe(tmp_path), "sft", "dpo")
    with pytest.raises(RunFolderError) as caught:
        compare(run, recipe(tmp_path, **changes))
    assert said in str(caught.value) and "--from-stage" in str(caught.value)


def test_a_stage_that_has_not_run_may_change(tmp_path: Path) -> None:
    run = finished(recipe(tmp_path), "sft")
    compare(run, recipe(tmp_path, grpo_steps=9))


def test_keeping_more_checkpoints_changes_no_result(tmp_path: Path) -> None:
    run = finished(recipe(tmp_path), "sft")
    compare(run, recipe(tmp_path, sft_save={"keep": 5}))


def test_when_an_engine_counts_as_lost_changes_no_result(tmp_path: Path) -> None:
    run = finished(recipe(tmp_path), "sft", "dpo", "grpo")
    compare(run, recipe(tmp_path, grpo_rollout={"heartbeat_s": 5, "request_timeout_s": 3600}))
    with pytest.raises(RunFolderError, match="max_tokens"):
        compare(run, recipe(tmp_path, grpo_rollout={"max_tokens": 5}))


def test_how_fast_a_reward_runs_changes_no_result(tmp_path: Path) -> None:
    run = finished(recipe(tmp_path), "sft", "dpo", "grpo")
    compare(run, recipe(tmp_path, grpo_rewards=[{"use": "my.py:short", "processes": 4, "rate": "60/min"}]))
    with pytest.raises(RunFolderError, match="rewards"):
        compare(run, recipe(tmp_path, grpo_rewards=[{"use": "my.py:short", "on_error": "fail"}]))


def test_changed_data_is_noticed(tmp_path: Path) -> None:
    r = recipe(tmp_path)
    run = finished(r, "sft")
    (tmp_path / "rows.jsonl").write_text('{"messages": [1]}\n')
    with pytest.raises(RunFolderError, match=r"data\..*rows\.jsonl"):
        compare(run, r)


def test_an_edited_picture_is_noticed_and_one_that_was_only_touched_is_not(tmp_path: Path) -> None:
    r, pictures = recipe(tmp_path), [tmp_path / "pictures" / f"{n}.png" for n in range(5)]
    pictures[0].parent.mkdir()
    for picture in pictures:
        picture.write_bytes(b"as it was")
    run = finished(r, "sft", "dpo")
    files = {str(picture): sha256_file(picture) for picture in pictures}
    note_media(run.stage_folder("dpo"), "data", files)
    note_media(run.stage_folder("dpo"), "eval", {})
    assert [path.name for path in run.stage_folder("dpo").iterdir()] == ["data.media.json"]
    os.utime(pictures[0], (1, 1))
    compare(run, r)
    for picture in pictures[:4]:
        picture.write_bytes(b"is edited")
    pictures[4].unlink()
    with pytest.raises(RunFolderError, match="--from-stage dpo") as caught:
        compare(run, r)
    said = str(caught.value)
    assert "stage 'dpo'" in said and "0.png has another content" in said and "and 2 more media files" in said
    note_media(run.stage_folder("dpo"), "data", {})
    compare(run, r)


def test_a_picture_that_is_gone_is_noticed(tmp_path: Path) -> None:
    r, picture = recipe(tmp_path), tmp_path / "pictures" / "a.png"
    picture.parent.mkdir()
    picture.write_bytes(b"as it was")
    run = finished(r, "sft")
    note_media(run.stage_folder("sft"), "data", {str(picture): sha256_file(picture)})
    picture.unlink()
    with pytest.raises(RunFolderError, match=r"'sft' .*a\.png is gone"):
        compare(run, r)


def test_a_changed_reward_is_noticed_by_its_stage_only(tmp_path: Path) -> None:
    r = recipe(tmp_path)
    run = finished(r, "sft")
    compare(run, r, {"my.py:short": "other"})
    (tmp_path / "b").mkdir()
    run = finished(recipe(tmp_path / "b"), "sft", "dpo", "grpo")
    with pytest.raises(RunFolderError, match=r"plugins\.my\.py:short"):
        compare(run, recipe(tmp_path / "b"), {"my.py:short": "other"})


def test_a_stage_that_left_the_recipe_is_named(tmp_path: Path) -> None:
    r = recipe(tmp_path)
    run = finished(r, "sft", "dpo")
    fewer = r.model_copy(update={"stages": r.stages[:1]})
    with pytest.raises(RunFolderError, match="'dpo'"):
        compare(run, fewer)


def test_from_stage_sets_it_and_later_ones_aside_under_a_free_number(tmp_path: Path) -> None:
    r = recipe(tmp_path)
    run = finished(r, "sft", "dpo", "grpo")
    (run.path / "dpo.old-1").mkdir()
    assert run.restart_from(r, "dpo") == ["dpo.old-2", "grpo.old-1"]
    assert list(run.finished()) == ["sft"] and list(run.summary()["stages"]) == ["sft"]
    assert (run.path / "sft").is_dir() and not (run.path / "dpo").exists()
    compare(run, recipe(tmp_path, dpo_steps=99))


def test_from_stage_needs_a_stage_of_the_recipe(tmp_path: Path) -> None:
    r = recipe(tmp_path)
    with pytest.raises(RunFolderError, match="sft, dpo, grpo"):
        finished(r, "sft").restart_from(r, "gpro")


def test_metrics_are_cut_back_to_the_checkpoint_and_a_torn_line_goes(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": n, "x": n / 3}) + "\n" for n in range(6)) + '{"step": 6, "x')
    cut_metrics(path, 4)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [0, 1, 2, 3, 4]
    cut_metrics(path, -1)
    assert path.read_text() == ""
    cut_metrics(tmp_path / "absent.jsonl", 3)
    assert not (tmp_path / "absent.jsonl").exists()


def test_an_evaluation_joins_the_metrics_of_the_stage_it_judged(tmp_path: Path) -> None:
    run = finished(recipe(tmp_path), "sft")
    run.summarise("sft", {"metrics": {"accuracy": 0.5}})
    assert run.summary()["stages"]["sft"] == {"steps": 4, "metrics": {"loss/total": 1.0, "accuracy": 0.5}}


def test_differences_name_dotted_keys_and_both_values() -> None:
    old, new = {"a": {"b": 1, "c": [1]}, "d": None}, {"a": {"b": 2, "c": [1]}, "e": "x" * 100}
    assert differences(old, old) == []
    assert differences(old, new) == ["a.b: 1 -> 2", f"e: None -> '{'x' * 56}..."]


def test_json_is_replaced_whole(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"z": 1, "a": [2]})
    write_json(tmp_path / "a.json", {"z": 3})
    assert read_json(tmp_path / "a.json") == {"z": 3}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_copy_of_the_recipes_folder_resumes_as_the_folder_itself(tmp_path: Path) -> None:
    """A job of a cluster runs in a copy of what was sent to it, and its successor in another."""
    run = RunFolder(tmp_path, {"stages": {}, "processes": [], "folder": "/jobs/1"}, "")

    def mark(folder: str, rows: str = "abc") -> dict[str, Any]:
        return {"stage": {"rewards": [{"use": f"{folder}/my.py:f"}]}, "data": {f"{folder}/a.jsonl": rows}}

    r = recipe(tmp_path)
    for stage in r.stages:
        run.begin(stage.id, mark("/jobs/1"), {})
    run.state["folder"] = "/jobs/2"
    run.compare(r, lambda stage: mark("/jobs/2"))
    with pytest.raises(RunFolderError, match=r"data\.a\.jsonl: 'abc' -> 'xyz'"):
        run.compare(r, lambda stage: mark("/jobs/2", "xyz"))
    with pytest.raises(RunFolderError, match=r"my\.py:f"):
        run.compare(r, lambda stage: mark("/jobs/3"))


def test_a_changed_module_beside_a_reward_is_noticed_by_name(tmp_path: Path) -> None:
    code = tmp_path / "code"
    code.mkdir()
    (code / "my.py").write_text("import helper\n")
    (code / "helper.py").write_text("WEIGHT = 1\n")
    (code / "other.py").write_text("")
    r = recipe(tmp_path)

    def mark(stage: Any) -> dict[str, Any]:
        return fingerprint(r, stage, {"my.py:short": "abc"}, code)

    run = opened(r)
    for stage in r.stages:
        run.begin(stage.id, mark(stage), {"base": "b", "adapter": None})
        run.finish(stage.id, {})
    (code / "other.py").write_text("x = 1\n")
    run.compare(r, mark)
    (code / "helper.py").write_text("WEIGHT = 2\n")
    with pytest.raises(RunFolderError, match=r"stage 'grpo' .*modules\..*helper\.py"):
        run.compare(r, mark)


def test_a_changed_loss_generator_template_or_reference_is_noticed(tmp_path: Path) -> None:
    """What a stage names beside its data and rewards decides its result as well."""
    code = tmp_path / "code"
    (code / "judge").mkdir(parents=True)
    texts = {"made.py": "import rows\n", "rows.py": "N = 1\n", "mine.py": "import terms\n", "terms.py": "BETA = 1\n"}
    texts |= {"chat.jinja": "{{ messages }}", "judge/config.json": "{}"}
    for name, text in texts.items():
        (code / name).write_text(text)
    r = recipe(
        tmp_path,
        dpo_data=f"{code}/made.py:f",
        dpo_loss={"name": f"{code}/mine.py", "beta": 1},
        dpo_reference={"path": str(code / "judge")},
    )
    r = r.model_copy(update={"model": r.model.model_copy(update={"chat_template": str(code / "chat.jinja")})})
    before = fingerprint(r, r.stages[1], {}, code)
    for name in ("rows.py", "terms.py", "chat.jinja", "judge/config.json"):
        (code / name).write_text(texts[name] + "\n")
        [changed] = differences(before, fingerprint(r, r.stages[1], {}, code))
        assert name in changed, changed
        (code / name).write_text(texts[name])


def test_a_run_of_a_version_that_hashed_no_modules_resumes(tmp_path: Path) -> None:
    r = recipe(tmp_path)
    run = finished(r, "sft", "dpo", "grpo")
    for entry in run.state["stages"].values():
        for key in ("modules", "named"):
            entry["fingerprint"].pop(key)
    compare(run, r)


def test_a_start_that_found_no_run_is_told_from_one_that_goes_on(tmp_path: Path) -> None:
    """`--resume` of a misspelt name begins anew: the command says so."""
    r = recipe(tmp_path)
    first = opened(r, resume=True)
    assert first.is_new
    first.ended()
    again = opened(r, resume=True)
    assert not again.is_new
    again.ended()


def test_a_stage_to_start_from_that_is_none_is_refused_before_a_folder_is_made(tmp_path: Path) -> None:
    """Else the next start would be told that the run folder exists."""
    from align.cli.main import main

    written = tmp_path / "run.yaml"
    written.write_text(dump_recipe(recipe(tmp_path)))
    with pytest.raises(RunFolderError, match="no stage 'nope'"):
        require_known(recipe(tmp_path), "nope")
    for verb in (["run"], ["submit", "--address", "http://127.0.0.1:1"]):
        assert main([verb[0], str(written), *verb[1:], "--from-stage", "nope"]) == 2
    assert not (tmp_path / "runs").exists()
