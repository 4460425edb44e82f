"""Overrides reach stages by id and rewards by name, and mistakes are answered like those in a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from align.errors import RecipeError
from align.recipe.load import load_recipe

RECIPE = """\
name: tiny
model: {path: owner/name}
stages:
  - {id: sft, kind: sft, data: a.jsonl}
  - {id: dpo, kind: preference, from: sft, data: [{path: b.jsonl, limit: 3}, c.jsonl]}
  - id: grpo
    kind: online
    from: dpo
    data: a.jsonl
    rewards: [numeric, {use: "my.py:helpful"}, {use: "my.py:f", as: polite}]
"""


@pytest.fixture
def load(tmp_path: Path) -> Any:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return lambda *overrides: load_recipe(path, overrides, cwd=tmp_path)


def test_values_are_yaml(load: Any) -> None:
    recipe = load("seed=3", "name=second", "stages.sft.optim.lr=1e-5", "stages.grpo.rollout.stop=[a, b]")
    assert (recipe.seed, recipe.name) == (3, "second")
    assert recipe.stage("sft").optim.lr == 1e-5 and recipe.stage("grpo").rollout.stop == ("a", "b")


def test_stages_are_found_by_id_and_rewards_by_name(load: Any) -> None:
    grpo = load(
        "stages.grpo.rollout.workers=2",
        "stages.grpo.rewards.helpful.timeout_s=5",
        "stages.grpo.rewards.polite.timeout_s=6",
        "stages.grpo.rewards.numeric.batch=7",
    ).stage("grpo")
    assert grpo.rollout.workers == 2
    assert [(r.name, r.timeout_s, r.batch) for r in grpo.rewards] == [
        ("numeric", None, 7),
        ("helpful", 5, None),
        ("polite", 6, None),
    ]


def test_shorthands_open_into_the_map_they_stand_for(load: Any) -> None:
    recipe = load("stages.sft.data.limit=5", "stages.dpo.data.1.limit=9", "stages.dpo.loss.beta=0.3")
    assert recipe.stage("sft").data[0].path.endswith("a.jsonl") and recipe.stage("sft").data[0].limit == 5
    assert [s.limit for s in recipe.stage("dpo").data] == [3, 9]
    assert recipe.stage("dpo").loss[0].name == "dpo" and recipe.stage("dpo").loss[0].options == {"beta": 0.3}


def test_a_later_override_wins(load: Any) -> None:
    assert load("seed=3", "seed=4").seed == 4


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("stages.gpro.steps=1", ("no 'gpro'", "did you mean 'grpo'", "sft, dpo, grpo")),
        ("sft.optim.lr=1", ("`sft` is a stage", "write stages.sft.optim.lr=1")),
        ("stages.grpo.rewards.helpfull.batch=1", ("no 'helpfull'", "numeric, helpful, polite")),
        ("stages.sft.optm.lr=1", ("unknown key `optm`", "did you mean `optim`")),
        ("stages.sft.optim.lr=fast", ("expected a number", "'fast'")),
        ("stages.dpo.data.7.limit=1", ("no '7'",)),
        ("name.first=x", ("'tiny', not a map",)),
        ("seed", ("key=value",)),
        ("=3", ("key=value",)),
        ("a..b=3", ("key=value",)),
        ("seed={", ("not valid YAML",)),
        ("model={path: a, path: b}", ("stands twice",)),
    ],
)
def test_a_wrong_override_is_named_with_what_would_be_right(load: Any, override: str, says: tuple[str, ...]) -> None:
    with pytest.raises(RecipeError) as caught:
        load(override)
    said = str(caught.value)
    assert f"override `{override}`" in said
    for words in says:
        assert words in said
