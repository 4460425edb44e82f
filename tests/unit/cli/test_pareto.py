"""`align pareto` from its command line: a table, a picture, one page that needs nothing else, and runs it refuses."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from align.cli.main import main
from tests.unit.experiments.build import EXAM, GRPO, write_examined

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """Three runs of a sweep: one good and harmful, one harmless, one worse than the first on both."""
    chance = np.random.default_rng(0)
    noise = chance.normal(0, 0.1, (40, 2))
    for name, helpful, harm in (("a", 3.0, 2.0), ("b", 1.0, 0.5), ("c", 2.0, 2.5)):
        write_examined(tmp_path / "sweep" / name, noise + np.array([helpful, harm]))
    return tmp_path / "sweep"


def test_the_front_of_a_sweep_is_told_drawn_and_written_for_programs(sweep, capsys):
    assert main(["pareto", str(sweep), "--reference", "helpful=0,harm=3"]) == 0
    said = capsys.readouterr().out
    rows = {line.split()[1]: line for line in said.splitlines() if line[:1].isdigit() and "[" in line}
    assert "yes" in rows["a"] and "yes" in rows["b"] and "dominated" in rows["c"]
    assert "harm (cost)" in said and "w helpful" in said and "0.7" in rows["a"]
    assert "beyond the reference point helpful 0, harm 3" in said
    found = json.loads((sweep / "front.json").read_text())
    assert [point["label"] for point in found["points"] if point["on_front"]] == ["a", "b"]
    harm = found["points"][0]["objectives"]["harm"]
    assert harm["low"] < 2.0 < harm["high"] and 1.9 < harm["mean"] < 2.1, "a cost keeps its own sign"
    assert found["hypervolume"]["value"] == pytest.approx(3 * 1 + 1 * 1.5, abs=0.2)
    assert (sweep / "front.png").read_bytes().startswith(PNG)


class Page(HTMLParser):
    """What a page would fetch, and the tags it has."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.tags: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.fetched += [value or "" for name, value in attrs if name in ("src", "srcset", "href", "data")]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_stands_alone_in_light_and_dark_with_every_recipe(sweep):
    assert main(["pareto", str(sweep)]) == 0
    page = Page()
    text = (sweep / "front.html").read_text()
    page.feed(text)
    assert len(page.fetched) == 2 and all(one.startswith("data:image/png;base64,") for one in page.fetched)
    assert page.fetched[0] != page.fetched[1] and "prefers-color-scheme: dark" in text
    assert not {"script", "link", "iframe"} & set(page.tags) and "http" not in text
    assert page.tags.count("tr") == 4 and page.tags.count("details") == 3
    assert "helpful: 0.7" in page.text and "dominated" in page.text


def test_one_run_gives_a_model_for_each_stage_that_it_examines(tmp_path, capsys):
    run = write_examined(tmp_path / "one", [[1, 2], [2, 1]])
    assert main(["pareto", str(run), "--out", str(tmp_path / "out")]) == 0
    assert "grpo" in capsys.readouterr().out and (tmp_path / "out" / "front.png").is_file()


def test_a_run_of_a_sweep_that_is_not_finished_is_named_and_left_out(sweep, capsys):
    write_examined(sweep / "d", [[1, 2]], finished=False)
    assert main(["pareto", str(sweep)]) == 0
    assert "left out: d, whose 'exam' is not finished" in capsys.readouterr().out


def test_judging_by_what_was_trained_on_is_said(tmp_path, capsys):
    run = write_examined(tmp_path / "run", [[1, 2]] * 4, stages=[GRPO, {**EXAM, "rewards": ["numeric"]}])
    (run / "grpo").mkdir()
    (run / "exam" / "rollouts" / "grpo").rename(run / "grpo" / "rollouts")
    (run / "exam" / "rollouts" / "grpo").symlink_to(run / "grpo" / "rollouts")
    assert main(["pareto", str(run)]) == 0
    said = capsys.readouterr().out
    assert "4 of the 4 prompts of 'exam' are among those that 'grpo' trained on" in said
    assert "judges by rewards that 'grpo' trains on" in said


@pytest.mark.parametrize(
    ("stages", "words", "wanted"),
    [
        ([GRPO], [], "no evaluate stage with rewards"),
        ([GRPO, {**EXAM, "rewards": []}], [], "kind: evaluate"),
        ([GRPO, EXAM], ["--of", "sft"], "--of chooses among: grpo"),
        ([GRPO, EXAM], ["--stage", "test"], "--stage chooses among: exam"),
        ([GRPO, EXAM], ["--objectives", "helpful,kind"], "choose among: helpful, harm"),
        ([GRPO, EXAM], ["--reference", "helpful"], "--reference"),
    ],
)
def test_what_cannot_be_judged_is_refused_with_a_remedy(tmp_path, capsys, stages, words, wanted):
    run = write_examined(tmp_path / "run", [[1, 2]], stages=stages)
    assert main(["pareto", str(run), *words]) == 2
    assert wanted in capsys.readouterr().err


def test_a_folder_without_runs_is_refused(tmp_path, capsys):
    assert main(["pareto", str(tmp_path)]) == 2
    assert "neither a run nor a folder of runs" in capsys.readouterr().err
