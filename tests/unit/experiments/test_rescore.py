"""Old rollouts under other weights, against the stage that made them: a real online stage on plain objects."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import yaml

from align.cli.main import main
from align.errors import RecipeError, RunFolderError
from align.experiments.rescore import Rescored, rescore, write
from align.recipe.objectives import Objectives
from align.recipe.stages import OnlineStage
from align.stages.rollout_log import read_rollouts
from tests.unit.stages.online_run import Run
from tests.unit.stages.plain import PlainFleet, PlainScorer

SCORERS = {
    "right": lambda group, c: float(c.token_ids.sum() % 3 == 0),
    "short": lambda group, c: -float(len(c.token_ids)),
    "rare": lambda group, c: float("nan") if c.token_ids[0] % 2 else float(c.token_ids[0] % 5),
}


def sampled(folder: Path, own: Objectives, truncated: str = "mask", **settings) -> tuple[Path, OnlineStage, Run]:
    """Six turns under `own`; the rollouts' folder and the stage's recipe."""
    fleet = PlainFleet(truncate=lambda group, sample: (group + sample) % 5 == 0)
    run = Run(folder, total=6, scorer=PlainScorer(**SCORERS), fleet=fleet, truncated=truncated, **settings)
    penalty = 0.5 if truncated == "penalise" else 0.0
    run.stage.plan = replace(run.stage.plan, objectives=own, truncated_penalty=penalty)
    run()
    stage = OnlineStage.model_validate(
        {
            "id": "grpo",
            "kind": "online",
            "data": "x.jsonl",
            "rewards": ["numeric"],
            "objectives": own.model_dump(),
            "rollout": {"truncated": truncated} | ({"truncated_penalty": penalty} if penalty else {}),
        }
    )
    return folder / "grpo" / "rollouts", stage, run


OWN = Objectives(weights={"right": 1.0, "short": 0.2, "rare": 0.5})
NEW = Objectives(combine="decoupled", weights={"right": 0.1, "short": 1.0, "rare": 0.5})


@pytest.mark.parametrize("truncated", ["mask", "keep", "penalise"])
@pytest.mark.parametrize("own", [OWN, NEW], ids=["weighted_sum", "decoupled"])
def test_the_runs_own_settings_give_its_advantages_to_the_bit(tmp_path, own, truncated):
    folder, stage, _ = sampled(tmp_path, own, truncated)
    found = rescore(folder, stage, own)
    assert found.replayed == 0.0 and found.correlation == pytest.approx(1.0) and found.turned == 0.0
    np.testing.assert_array_equal(found.before, found.after)


def test_other_settings_give_what_the_stage_would_have_given(tmp_path):
    """Advantages are those that the stage computes from the same groups and scores, turn by turn."""
    folder, stage, _ = sampled(tmp_path / "a", OWN)
    found = rescore(folder, stage, NEW)
    assert found.replayed == 0.0
    _, _, other = sampled(tmp_path / "b", NEW)
    log = read_rollouts(tmp_path / "b" / "grpo" / "rollouts")
    assert other.trainer.w != 0
    first = found.rollouts.columns["step"] == 1  # the same groups: until the first update both runs are one
    np.testing.assert_array_equal(found.after[first], log.columns["advantage"][log.columns["step"] == 1])
    assert found.correlation < 0.99 and 0 < found.turned < 1


def test_dead_groups_are_those_whose_trained_completions_are_alike(tmp_path):
    folder, stage, _ = sampled(tmp_path, OWN)
    nothing = rescore(folder, stage, Objectives(weights={"right": 0.0, "short": 0.0, "rare": 0.0}))
    groups = sum(1 for _ in nothing.groups())
    assert nothing.dead(nothing.after) == groups == 18 and nothing.correlation is None
    assert nothing.dead(nothing.before) < groups


def test_groups_that_dynamic_sampling_replaced_are_counted_and_left_out(tmp_path):
    scorers = {"right": lambda group, c: float(group.prompt.group_id % 3 == 0 and len(c.token_ids) > 2)}
    run = Run(tmp_path, total=4, scorer=PlainScorer(**scorers), refill=2.0)
    run()
    stage = OnlineStage.model_validate({"id": "grpo", "kind": "online", "data": "x", "rewards": ["numeric"]})
    found = rescore(tmp_path / "grpo" / "rollouts", stage, Objectives())
    logged = len(read_rollouts(tmp_path / "grpo" / "rollouts"))
    assert found.replaced > 0 and len(found.rollouts) == 4 * 3 * 4 == logged - 4 * found.replaced
    assert found.replayed == 0.0


def test_the_file_has_both_advantages_and_every_score(tmp_path):
    folder, stage, _ = sampled(tmp_path, OWN)
    found: Rescored = rescore(folder, stage, NEW)
    write(found, tmp_path / "new.parquet")
    table = pyarrow.parquet.read_table(tmp_path / "new.parquet")
    assert table.column_names == [
        "step", "group_id", "sample", "version", "objective/right", "objective/short", "objective/rare", "advantage",
        "rescored", "trained",
    ]  # fmt: skip
    rows = table.to_pylist()
    assert len(rows) == 6 * 3 * 4 and any(row["objective/rare"] is None for row in rows)
    np.testing.assert_array_equal([row["rescored"] for row in rows], found.after)


def test_an_unknown_objective_and_a_run_without_rollouts_are_refused(tmp_path):
    folder, stage, _ = sampled(tmp_path, OWN)
    with pytest.raises(RecipeError, match=r"'wrong'[\s\S]*right, short, rare"):
        rescore(folder, stage, Objectives(weights={"wrong": 1.0}))
    with pytest.raises(RunFolderError, match="no rollouts"):
        rescore(tmp_path / "nowhere", stage, OWN)


# ------------------------------------------------------------------------------------------------ command line


def as_run(folder: Path, stage: OnlineStage) -> None:
    recipe = {"name": "r", "model": {"path": "m"}, "stages": [stage.model_dump(mode="json", by_alias=True)]}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))


def test_rescore_prints_weights_correlations_and_dead_groups(tmp_path, capsys):
    _, stage, _ = sampled(tmp_path, OWN)
    as_run(tmp_path, stage)
    assert main(["rescore", str(tmp_path), "--weights", "short=1", "--combine", "decoupled", "min_std=0.5"]) == 0
    said = capsys.readouterr().out
    assert "72 completions in 18 groups, steps 1 to 6 of 'grpo'" in said
    right = next(line.split() for line in said.splitlines() if line.startswith("right"))
    short = next(line.split() for line in said.splitlines() if line.startswith("short"))
    assert right[1:3] == ["1", "1"] and short[1:3] == ["0.2", "1"], "what is not named keeps the run's weight"
    assert "combine: weighted_sum in the run, decoupled now" in said and "groups without signal:" in said
    assert (tmp_path / "grpo" / "rescored.parquet").is_file()


@pytest.mark.parametrize("words", [["--combine", "sum"], ["--weights", "short"], ["nothing=1"], ["--stage", "x"]])
def test_what_rescore_cannot_do_is_refused(tmp_path, capsys, words):
    _, stage, _ = sampled(tmp_path, OWN)
    as_run(tmp_path, stage)
    assert main(["rescore", str(tmp_path), *words]) == 2
    assert "->" in capsys.readouterr().err or words == ["--combine", "sum"]
