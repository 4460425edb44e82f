"""What the guides show is true of the code: snippets run, recipes load, commands run or are taken by the real parser,
figures are those of the entries that they link to, and tables name what there is."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from align.cli.main import _parse, main
from align.losses import load, names
from align.plugins import REWARDS
from align.recipe.load import load_recipe
from align.recipe.schema import Recipe
from align.recipe.sharding import STRATEGIES
from align.recipe.stages import Stage
from tests.guides import (
    NAMES,
    ROOT,
    Block,
    anchors,
    blocks_of,
    commands_of,
    first_cells,
    prose_of,
    section,
    text_of,
)

ALL = [block for guide in NAMES for block in blocks_of(guide)]


def of(language: str) -> list[Block]:
    return [block for block in ALL if block.language == language]


@pytest.fixture
def workshop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """A function of a guide that makes what its reader has: our recipes and examples, and the files that it shows."""

    def make(guide: str) -> Path:
        shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
        for example in (ROOT / "examples").glob("*.*"):
            shutil.copy(example, tmp_path)
        for block in blocks_of(guide):
            if block.title:
                (tmp_path / block.title).write_text(block.text, encoding="utf-8")
        monkeypatch.chdir(tmp_path)
        return tmp_path

    return make


# ------------------------------------------------------------------------------------------------ snippets and recipes


@pytest.mark.parametrize("block", of("python"), ids=str)
def test_a_python_snippet_runs(block: Block, workshop: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(workshop(block.guide))
    before = set(sys.modules)
    exec(compile(block.text, str(block), "exec"), {"__name__": "snippet"})
    for name in set(sys.modules) - before:  # a file of this guide is not that of another
        if (getattr(sys.modules[name], "__file__", None) or "").startswith(str(Path.cwd())):
            del sys.modules[name]


@pytest.mark.parametrize("block", of("json"), ids=str)
def test_rows_are_json_a_line(block: Block) -> None:
    assert all(isinstance(json.loads(line), dict) for line in block.text.splitlines())


ONLINE = {"rewards", "rollout", "objectives", "staleness", "overdue", "dynamic_sampling", "updates_per_batch"}


def whole(fragment: Any) -> dict[str, Any]:
    """A fragment in a recipe where it belongs: top-level keys, stages, or keys of one stage."""
    recipe: dict[str, Any] = {"name": "guide", "model": {"path": "base"}}
    first = {"id": "sft", "kind": "sft", "data": "train.jsonl", "save": {"best": {"metric": "eval/loss"}}}
    if isinstance(fragment, list):
        return {**recipe, "stages": [*([] if fragment[0]["id"] == "sft" else [first]), *fragment]}
    if fragment.keys() <= Recipe.model_fields.keys():
        return {**recipe, "stages": [first], **fragment}
    stage = {"id": "stage", "kind": _kind_for(fragment), "data": "rows.jsonl", **fragment}
    if stage["kind"] == "online":
        stage.setdefault("rewards", ["numeric"])
    return {**recipe, "stages": [stage]}


def _kind_for(fragment: dict[str, Any]) -> str:
    if fragment.keys() & ONLINE:
        return "online"
    losses = fragment.get("loss", [])
    terms = losses if isinstance(losses, list) else [losses]
    records = [_record(dict(term)) for term in terms]
    return {"pair": "preference", "group": "online"}.get(records[0], "sft") if records else "sft"


def _record(term: dict[str, Any]) -> str:
    module = load(term.pop("name"))
    term.pop("weight", None)
    return module.needs(module.Config(**term)).record


@pytest.mark.parametrize("block", of("yaml"), ids=str)
def test_a_recipe_or_a_part_of_one_loads_and_its_losses_take_their_options(
    block: Block, workshop: Callable[[str], Path]
) -> None:
    path = workshop(block.guide) / "whole.yaml"
    fragment = yaml.safe_load(block.text)
    path.write_text(block.text if block.title else yaml.safe_dump(whole(fragment)), encoding="utf-8")
    recipe = load_recipe(path)
    for stage in recipe.stages:
        for term in getattr(stage, "loss", ()):
            module = load(term.name)
            assert module.needs(module.Config(**term.options)).record


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_of_the_project_loads_and_its_guide_names_it(path: Path) -> None:
    assert load_recipe(path).name == yaml.safe_load(path.read_text())["name"]
    assert path.name in first_cells(text_of("recipes/README.md"))


# ------------------------------------------------------------------------------------------------ commands

PLAIN = ("git clone ", "python3 -m venv ", "pip install pre-commit")
BENCH_FLAGS = "".join(path.read_text() for path in sorted((ROOT / "tests" / "bench").glob("*.py")))


def runs_in_seconds(line: str) -> bool:
    _, verb, *words = [*shlex.split(line), ""]
    if not line.startswith("align "):
        return False
    return (
        verb == "rewards"
        or (verb == "check" and "--suite" not in words)
        or (verb == "simulate" and "--from" not in words)
    )


QUICK = [
    pytest.param(block, line, id=f"{block}: {line}")
    for block in of("sh")
    for line in commands_of(block)
    if runs_in_seconds(line)
]


@pytest.mark.parametrize(("block", "line"), QUICK)
def test_a_command_of_seconds_succeeds(
    block: Block,
    line: str,
    workshop: Callable[[str], Path],
    tiny_model_folder: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, words = workshop(block.guide), shlex.split(line)[1:]
    model = _offline(folder / words[1], tiny_model_folder) if words[0] == "check" else []
    assert main([*words, *model]) == 0, capsys.readouterr().err


def _offline(recipe: Path, tiny_model_folder: Callable[..., Path]) -> list[str]:
    """A small model in the place of one from the hub."""
    from_hub = "path" in yaml.safe_load(recipe.read_text())["model"]
    return [f"model.path={tiny_model_folder(max_position_embeddings=2048)}"] if from_hub else []


@pytest.mark.parametrize("block", of("sh"), ids=str)
def test_every_command_is_one_that_its_program_takes(block: Block) -> None:
    for line in commands_of(block):
        words = shlex.split(line)
        if words[0] == "align":
            assert _parse(words[1:])
        elif words[:2] == ["python", "-m"]:
            assert_module_takes(words[2], words[3:])
        elif words[0] == "make":
            assert words[1] in re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        elif line.startswith("pip install -e"):
            (extra,) = re.findall(r"\[(\w+)\]", line)
            assert extra in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        else:
            assert line.startswith(PLAIN), f"nothing here says that {line!r} works"


def assert_module_takes(module: str, words: list[str]) -> None:
    if module == "pytest":
        assert all((ROOT / word).exists() for word in words if not word.startswith("-"))
        return
    path = ROOT / module.replace(".", "/")
    file = path / "__main__.py" if path.is_dir() else path.with_suffix(".py")
    assert file.is_file(), f"there is no module {module}"
    flags = BENCH_FLAGS if module.startswith("tests.bench") else file.read_text()
    missing = [word for word in words if word.startswith("--") and f'"{word}"' not in flags]
    assert not missing or (module == "align.cli.doctor" and _parse(["doctor", *words]))


def test_the_overrides_in_readmes_commands_change_its_recipe(workshop: Callable[[str], Path]) -> None:
    folder = workshop("README.md")
    line = next(line for block in blocks_of("README.md", "sh") for line in commands_of(block) if "seed=3" in line)
    recipe = load_recipe(folder / "sums.yaml", _parse(shlex.split(line)[1:]).overrides)
    assert (recipe.seed, recipe.name, recipe.stage("grpo").rollout.temperature) == (3, "sums-3", 0.9)


# ------------------------------------------------------------------------------------------------ figures, links, files


@pytest.mark.parametrize("row", re.findall(r"^\| .*/results/.*$", text_of("README.md"), re.MULTILINE))
def test_a_figure_of_readme_is_that_of_its_entry(row: str) -> None:
    link = re.search(r"\]\((tests/\w+/results/[^)]+\.json)\)", row)
    assert link
    entry = json.loads((ROOT / link[1]).read_text())
    assert entry["proved"], "what was not proved is no figure to show"
    newer = [path.name for path in (ROOT / link[1]).parent.glob(f"*-{entry['name']}*.json")]
    if times := re.search(r"\| (\d+\.\d)x as fast as TRL", row):
        assert float(times[1]) == round(entry["figures"]["ratio"]["median"], 1)
        assert max(newer)[:10] == entry["date"], f"{max(newer)} is newer"


@pytest.mark.parametrize("guide", NAMES)
def test_links_lead_somewhere(guide: str) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", prose_of(guide)):
        place, _, fragment = target.partition("#")
        if place.startswith("http"):
            continue
        path = (ROOT / guide).parent / place if place else ROOT / guide
        assert path.exists(), f"{guide} links to {target}"
        if fragment:
            assert fragment in anchors(str(path.resolve().relative_to(ROOT))), f"{guide} links to {target}"


@pytest.mark.parametrize("guide", NAMES)
def test_files_of_the_tree_that_it_names_exist(guide: str) -> None:
    tops = ("align", "recipes", "rewards", "rollout", "tests", "examples")
    rooms = (ROOT, (ROOT / guide).parent)
    for name in re.findall(r"`((?:\.\./)?[\w.-]+/[\w./-]*)`", prose_of(guide)):
        a_file = "." in name.removeprefix("../") or name.endswith("/")  # and not the name of a metric
        known = a_file and (name.removeprefix("../").split("/")[0] in tops or name.endswith(".py"))
        assert not known or any((room / name).exists() for room in rooms), f"{guide} names {name}"


@pytest.mark.parametrize("guide", NAMES)
def test_a_guide_begins_with_something_that_runs(guide: str) -> None:
    first = blocks_of(guide)[0]
    assert first.language in ("sh", "python")
    assert first.line < 40


def test_nothing_to_type_stands_outside_a_block() -> None:
    for guide in NAMES:
        assert not re.findall(r"^ {4,}(?:align|python|make|pip) .*", prose_of(guide), re.MULTILINE)


def test_the_front_door_is_short() -> None:
    assert len(text_of("README.md").splitlines()) <= 160


# ------------------------------------------------------------------------------------------------ tables name what is


def test_verbs_are_those_of_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        _parse(["--help"])
    listed = re.findall(r"^    (\w+)  +\S", capsys.readouterr().out, re.MULTILINE)
    named = [words.split()[1] for words in first_cells(section("recipes/README.md", "Verbs"))]
    assert set(named) == set(listed)


def test_kinds_of_stages_are_all_there_are() -> None:
    kinds = {get_args(kind.model_fields["kind"].annotation)[0] for kind in get_args(get_args(Stage)[0])}
    assert set(first_cells(section("recipes/README.md", "Stages"))) - {"kind"} == kinds


def test_losses_are_all_there_are() -> None:
    table = re.findall(r"^\|.*", section("recipes/README.md", "Losses"), re.MULTILINE)
    named = set(re.findall(r"`(\w+)`", "\n".join(row.split("|", 2)[2] for row in table)))
    assert set(names()) == named


def test_rewards_are_all_there_are() -> None:
    there = {path.stem for path in (ROOT / "rewards" / "builtins").glob("[a-z]*.py")}
    assert set(first_cells(section("rewards/README.md", "Ours"))) - {"reward"} == there | set(REWARDS)


def test_strategies_are_all_there_are() -> None:
    assert set(first_cells(section("recipes/README.md", "Several ranks"))) - {"strategy"} == set(STRATEGIES)


def test_proofs_and_benches_are_all_there_are() -> None:
    proofs = {path.stem.removeprefix("prove_") for path in (ROOT / "tests" / "prove").glob("prove_*.py")}
    assert set(first_cells(section("tests/README.md", "Proofs"))) == proofs
    runnable = {path.stem for path in (ROOT / "tests" / "bench").glob("*.py") if '"__main__"' in path.read_text()}
    shown = set(re.findall(r"-m tests\.bench\.(\w+)", section("tests/README.md", "Benches")))
    assert shown >= runnable - {"vision"}


def test_hooks_before_a_commit_run_what_is_installed_and_fetch_nothing() -> None:
    repos = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    hooks = [hook for repo in repos for hook in repo["hooks"]]
    assert {repo["repo"] for repo in repos} == {"local"} and {hook["language"] for hook in hooks} == {"system"}
    installed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["dev"]
    assert all(any(tool.startswith(hook["entry"].split()[0]) for tool in installed) for hook in hooks)
