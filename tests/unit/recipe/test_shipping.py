"""What is sent to a cluster with a recipe, and that it reads it there."""

from __future__ import annotations

from pathlib import Path

import pytest

from align.errors import RecipeError, UserError
from align.recipe import shipping
from align.recipe.load import load_recipe
from align.recipe.schema import Recipe
from align.recipe.shipping import RECIPE, pack

TEXT = """
name: sums
output: /shared/runs
model: {path: org/model, chat_template: chat.jinja}
stages:
  - {id: sft, kind: sft, data: [{path: data/a.jsonl}, {path: /shared/b.jsonl}], loss: {name: my_loss.py}}
  - {id: grpo, kind: online, from: sft, data: make.py:rows, rewards: [{use: plugins/mine.py:good}, {use: numeric}]}
"""
FILES = (
    "chat.jinja", "data/a.jsonl", "my_loss.py", "make.py", "plugins/mine.py", "plugins/beside.py", "data/unused.jsonl",
    "venv/lib.py", "package/__init__.py", "package/inner/deep.py", "plugins/words/__init__.py",
)  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "recipe"
    for name in FILES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"# {name}")
    (folder / "sums.yaml").write_text(TEXT)
    return folder


def packed(folder: Path, target: Path, *overrides: str) -> tuple[list[str], Recipe]:
    target.mkdir()
    copied = pack(load_recipe(folder / "sums.yaml", overrides), folder, target)
    return copied, load_recipe(target / RECIPE)


def test_what_the_recipe_names_beside_itself_and_what_plugins_can_import_is_sent(folder: Path, tmp_path: Path) -> None:
    copied, recipe = packed(folder, tmp_path / "sent", "seed=3")
    sent = {str(p.relative_to(tmp_path / "sent")) for p in (tmp_path / "sent").rglob("*") if p.is_file()}
    assert sent == {*copied, RECIPE}
    assert set(copied) == set(FILES) - {"data/unused.jsonl", "venv/lib.py"}
    assert (tmp_path / "sent" / "plugins" / "mine.py").read_text() == "# plugins/mine.py"
    there = tmp_path / "sent"
    assert recipe.seed == 3 and recipe.output == "/shared/runs" and recipe.model.path == "org/model"
    assert [source.path for source in recipe.stage("sft").data] == [f"{there}/data/a.jsonl", "/shared/b.jsonl"]
    assert recipe.stage("sft").loss[0].name == f"{there}/my_loss.py"
    assert recipe.stage("grpo").data[0].path == f"{there}/make.py:rows"
    assert [reward.use for reward in recipe.stage("grpo").rewards] == [f"{there}/plugins/mine.py:good", "numeric"]


def test_a_file_that_is_missing_and_one_too_many_are_named(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "data" / "a.jsonl").unlink()
    with pytest.raises(RecipeError, match=r"data/a.jsonl.*not there"):
        packed(folder, tmp_path / "missing")
    (folder / "data" / "a.jsonl").write_text("x" * 500)
    monkeypatch.setattr(shipping, "LARGEST_BYTES", 500)
    with pytest.raises(RecipeError, match="more than 0 MiB") as large:
        packed(folder, tmp_path / "large")
    assert "storage that the cluster mounts" in str(large.value.remedy)


def test_a_url_is_no_folder_for_runs(folder: Path) -> None:
    with pytest.raises(UserError, match=r"'s3://bucket/x' is a URL.*shared path"):
        load_recipe(folder / "sums.yaml", ["output=s3://bucket/x"])
