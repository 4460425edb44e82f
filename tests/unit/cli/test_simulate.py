"""`align simulate` from its command line: a table with its inputs, JSON, and mistakes answered."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from align.cli.main import main
from tests.unit.check.workshop import Workshop, open_workshop
from tests.unit.simulate.test_inputs import write_run

FAST = ["--steps", "5"]


@pytest.fixture
def shop(tmp_path: Path) -> Workshop:
    return open_workshop(tmp_path)


def said(capsys: pytest.CaptureFixture[str], *words: Any) -> str:
    assert main(["simulate", *map(str, words)]) == 0
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], *words: Any) -> str:
    assert main(["simulate", *map(str, words)]) == 2
    err = capsys.readouterr().err
    assert "Traceback" not in err
    return err


def test_it_prints_every_input_with_its_source_a_line_per_staleness_and_a_recommendation(
    shop: Workshop, capsys: pytest.CaptureFixture[str]
) -> None:
    out = said(capsys, shop.recipe, *FAST, "--engines", 3, "--staleness", "0,1", "--train-s", 2.5)
    lines = {line.split()[0]: line.split() for line in out.splitlines() if line}
    assert lines["engines"][1:3] == ["3", "flag"] and lines["train_s"][1:3] == ["2.5", "flag"]
    assert lines["engine_slots"][1:3] == ["256", "recipe"] and lines["publish_s"][2] == "default"
    assert "restart_s" not in lines, "no engine fails"
    assert {"0", "1"} <= lines.keys() and "2" not in lines
    assert lines["recommended:"][1] == "staleness" and out.count("assumed:") == 2


def test_json_says_the_same_to_a_program(shop: Workshop, capsys: pytest.CaptureFixture[str]) -> None:
    words = [shop.recipe, "--json", *FAST, "--failure-s", 500, "stages.grpo.batch.groups=4"]
    found = json.loads(said(capsys, *words))
    assert [one["staleness"] for one in found["outcomes"]] == [0, 1, 2] and found["groups"] == 4
    assert found["inputs"]["failure_s"] == {"value": 500.0, "source": "flag"}
    assert found["recommended"]["staleness"] in (0, 1, 2)
    assert sum(found["outcomes"][1]["ages"].values()) == pytest.approx(1.0)
    assert json.loads(said(capsys, *words)) == found, "the same command says the same"


def test_devices_are_divided_and_the_table_is_of_the_best_split(
    shop: Workshop, capsys: pytest.CaptureFixture[str]
) -> None:
    out = said(capsys, shop.recipe, *FAST, "--devices", 4, "--staleness", "0,1")
    assert "devices for the trainer" in out and "inversely proportional" in out
    found = json.loads(said(capsys, shop.recipe, *FAST, "--devices", 4, "--json"))
    assert [(s["trainers"], s["engines"]) for s in found["splits"]] == [(1, 3), (2, 2), (3, 1)]
    assert found["recommended"]["trainers"] + found["recommended"]["engines"] == 4


def test_a_finished_run_gives_the_inputs(shop: Workshop, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(shop.folder / "runs" / "before")
    out = said(capsys, shop.recipe, *FAST, "--from", run)
    assert "train_s       3" in out and "the run's 48 groups" in out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--staleness", "a"], "not a list of whole numbers such as 0,1,2"),
        (["--engines", "0"], "'0' is not a whole number of at least 1"),
        (["--train-s", "-1"], "'-1' is not a number of at least 0"),
        (["--engine-speed", "0"], "'0' is not a number above 0"),
        (["--silent", "2"], "'2' is not a number from 0 to 1"),
        (["--engines", "2", "--devices", "4"], "not allowed with"),
        (["--devices", "1"], "cannot be divided"),
        (["--engine-speed", "50", "--engine-peak", "20"], "cannot reach 20 tokens/s"),
        (["--stage", "sft"], "--stage chooses among: grpo"),
        (["--from", "nowhere"], "no recipe.yaml"),
        (["--environment-s", "2"], "no completion waits for an environment"),
    ],
)
def test_a_flag_that_makes_no_sense_is_answered_with_what_would(
    words: list[str], says: str, shop: Workshop, capsys: pytest.CaptureFixture[str]
) -> None:
    assert says in refused(capsys, shop.recipe, *words)


def test_a_recipe_without_an_online_stage_has_nothing_to_simulate(
    shop: Workshop, capsys: pytest.CaptureFixture[str]
) -> None:
    text = shop.recipe.read_text()
    shop.write("recipe.yaml", text[: text.index("  - id: dpo")])
    assert "only online stages are simulated" in refused(capsys, shop.recipe)
