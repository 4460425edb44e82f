"""What README.md shows is true of the code: its recipe loads, its commands parse, its reward scores."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml

from align.cli.main import _parse
from align.recipe.load import load_recipe
from rewards import Sample

ROOT = Path(__file__).resolve().parents[3]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def block(language: str) -> str:
    found = re.search(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    assert found, f"README.md has no {language} block"
    return found[1]


COMMANDS = re.findall(r"^    (align .+)$", README, re.MULTILINE)


def test_the_recipe_loads_and_its_stages_build_on_each_other(tmp_path: Path) -> None:
    path = tmp_path / "sums.yaml"
    path.write_text(block("yaml"))
    recipe = load_recipe(path)
    assert [stage.kind for stage in recipe.stages] == ["sft", "preference", "online", "evaluate", "merge", "export"]
    assert recipe.stage("grpo").batch.group_size == 8


def test_the_overrides_in_its_commands_change_the_recipe(tmp_path: Path) -> None:
    path = tmp_path / "sums.yaml"
    path.write_text(block("yaml"))
    arguments = _parse(shlex.split(next(line for line in COMMANDS if "seed=3" in line))[1:])
    recipe = load_recipe(path, arguments.overrides)
    assert (recipe.seed, recipe.name, recipe.stage("grpo").rollout.temperature) == (3, "sums-3", 0.9)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_is_one_that_the_command_line_takes(command: str) -> None:
    assert callable(_parse(shlex.split(command, comments=True)[1:]).verb)


def test_its_verbs_are_those_of_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    named = set(re.findall(r"^\| `align (\w+)", README, re.MULTILINE))
    with pytest.raises(SystemExit):
        _parse(["--help"])
    listed = re.findall(r"^    (\w+)  +\S", capsys.readouterr().out, re.MULTILINE)
    assert named == set(listed)


def test_its_reward_scores_a_shorter_completion_higher() -> None:
    scope: dict = {}
    exec(block("python"), scope)
    short, long = scope["brevity"]([Sample("Yes."), Sample("Yes, of course it is.")])
    assert short > long


def test_its_built_in_rewards_are_all_there_are() -> None:
    listed = re.search(r"`rewards/builtins/` ours: (.*?)\. ", README, re.DOTALL)
    assert listed
    there = {path.stem for path in (ROOT / "rewards" / "builtins").glob("[a-z]*.py")}
    assert set(re.findall(r"`(\w+)`", listed[1])) == there


def test_make_has_the_targets_that_it_names() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"\bmake ([a-z]+)\b", README)) <= targets


def test_recipes_and_files_that_it_names_exist() -> None:
    named = re.findall(r"`((?:recipes|align|rewards|tests)/[\w./-]+?)/?`", README)
    assert named
    assert [name for name in named if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_of_the_project_loads(path: Path) -> None:
    assert load_recipe(path).name
    assert yaml.safe_load(path.read_text())["name"]
