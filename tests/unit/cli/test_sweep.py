"""`align sweep` up to its runs: vectors, shared stages, what is kept, and what is refused. Real runs:
tests/integration/test_studies.py."""

from __future__ import annotations

import os

import pytest

from align.check.machine import Machine
from align.cli import sweep as verb
from align.cli.main import main
from align.errors import PlacementError
from align.experiments.children import Child, Outcome
from align.recipe.load import load_recipe
from align.stages.files import read_json, write_json
from align.stages.fingerprint import fingerprint
from tests.unit.check.workshop import Workshop


@pytest.fixture
def started(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Labels of each call's children. A child's run ends at once, with every stage finished; one named in `fails`
    does not."""
    calls: list[list[str]] = []

    def run_all(children: list[Child], free, *, plugins, logs, tell) -> list[Outcome]:
        calls.append([child.label for child in children])
        return [finish(child) for child in children]

    def finish(child: Child) -> Outcome:
        recipe = load_recipe(child.recipe)
        if child.label in FAILS:
            return Outcome(child.label, "failed", 1.0, "stage 'grpo': no")
        known = read_json(child.run / "run.json")["stages"] if child.run.exists() else {}
        (child.run / "base").mkdir(parents=True, exist_ok=True)
        plugins = verb.validate(recipe, workshop.folder).plugins
        entries = {
            stage.id: known.get(stage.id)
            or {
                "state": "finished",
                "fingerprint": fingerprint(recipe, stage, plugins, workshop.folder),
                "artefacts": {},
                "made_by": child.label,
            }
            for stage in recipe.stages
        }
        write_json(child.run / "run.json", {"stages": entries})
        write_json(child.run / "summary.json", {"stages": {name: {} for name in entries}})
        (child.run / "recipe.yaml").write_text(child.recipe.read_text())
        return Outcome(child.label, "finished", 2.0)

    FAILS.clear()
    monkeypatch.setattr(verb, "run_all", run_all)
    return calls


FAILS: set[str] = set()


def test_a_simplex_gives_a_run_per_vector_and_runs_the_first_stages_once(workshop, started, capsys):
    assert main(["sweep", "recipe.yaml", "--simplex", "3"]) == 0
    labels = [f"numeric-{w}_brevity-{v}" for w, v in (("0", "1"), ("0.5", "0.5"), ("1", "0"))]
    assert started == [["shared"], labels]
    root = workshop.folder / "runs" / "small" / "sweep"
    stages = read_json(root / labels[1] / "run.json")["stages"]
    assert {name: entry["made_by"] for name, entry in stages.items()} == {
        "sft": "shared", "dpo": "shared", "grpo": labels[1], "merged": labels[1], "exam": labels[1],
    }  # fmt: skip
    assert (root / labels[1] / "base").resolve() == (root / "shared" / "base").resolve()
    recipe = load_recipe(root / "recipes" / f"{labels[1]}.yaml")
    assert recipe.stage("grpo").objectives.weights == {"numeric": 0.5, "brevity": 0.5}
    assert [stage.id for stage in load_recipe(root / "recipes" / "shared.yaml").stages] == ["sft", "dpo"]
    assert f"align pareto {root}" in capsys.readouterr().out


@pytest.mark.slow
def test_resume_keeps_what_is_finished_repeats_what_failed_and_adds_new_weights(workshop, started, capsys):
    FAILS.add("numeric-1_brevity-0")
    assert main(["sweep", "recipe.yaml", "--simplex", "2"]) == 1
    assert "numeric-1_brevity-0: stage 'grpo': no" in capsys.readouterr().out
    assert main(["sweep", "recipe.yaml", "--simplex", "2"]) == 2
    assert "--resume" in capsys.readouterr().err
    FAILS.clear()
    assert main(["sweep", "recipe.yaml", "--simplex", "3", "--resume"]) == 0
    assert started[2:] == [[], ["numeric-0.5_brevity-0.5", "numeric-1_brevity-0"]]
    assert "numeric-0_brevity-1" in (out := capsys.readouterr().out) and "kept" in out


def test_a_changed_reward_is_no_finished_run(workshop, started):
    assert main(["sweep", "recipe.yaml", "--weights", "numeric=1,brevity=1"]) == 0
    workshop.write("judge.py", "def brevity(samples):\n    return [0.0 for s in samples]\n")
    assert main(["sweep", "recipe.yaml", "--weights", "numeric=1,brevity=1", "--resume"]) == 0
    assert started[2:] == [[], ["numeric-1_brevity-1"]], "shared stages use no reward; the run itself says what changed"


def test_each_seed_has_its_own_first_stages_and_what_they_fail_is_not_started(workshop, started, capsys):
    FAILS.add("shared_seed-1")
    assert main(["sweep", "recipe.yaml", "--weights", "numeric=1,brevity=0", "--seeds", "0,1"]) == 1
    assert started == [["shared_seed-0", "shared_seed-1"], ["numeric-1_brevity-0_seed-0"]]
    lines = capsys.readouterr().out.splitlines()
    assert any("numeric-1_brevity-0_seed-1" in line and "not started" in line for line in lines)


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["--weights", "numeric=1"], "differ in 'brevity'"),
        (["--weights", "numeric=1,short=1"], "give each of them one: numeric=1,brevity=1"),
        (["--simplex", "3", "--stage", "sft"], "--stage chooses among: grpo"),
        (["--simplex", "3", "--parallel", str(10**6)], "do not fit"),
    ],
)
def test_what_cannot_be_swept_is_refused_before_anything_runs(workshop, started, capsys, words, wanted):
    assert main(["sweep", "recipe.yaml", *words]) == 2
    assert wanted in capsys.readouterr().err
    assert not started and not (workshop.folder / "runs").exists()


def test_a_run_may_have_a_part_of_the_machine_and_no_more_than_all_of_it():
    assert Machine.here(1).cores == 1 and Machine.here().cores == os.cpu_count()
    for cores in (0, (os.cpu_count() or 1) + 1):
        with pytest.raises(PlacementError, match="--cores"):
            Machine.here(cores)


def test_as_many_fit_as_placement_leaves_room_for(workshop, started, capsys):
    cores = os.cpu_count() or 1
    words = ["placement.trainer.cpus=0.6", f"placement.rollout.cpus={cores - 0.7}", "--simplex", "2", "--parallel", "2"]
    assert main(["sweep", "recipe.yaml", *words]) == 2
    assert "at most 1" in capsys.readouterr().err
