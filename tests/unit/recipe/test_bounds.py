"""A few lines of YAML make no more work than a recipe is worth, and every number and name in it can be used."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from align.errors import RecipeError
from align.recipe.load import load_recipe

RECIPE = """name: t
model: {path: models/x}
stages:
  - {id: sft, kind: sft, data: d.jsonl, optim: {lr: 1.0e-3}, steps: 3}
"""


def refused(tmp_path: Path, text: str, *overrides: str) -> RecipeError:
    path = tmp_path / "r.yaml"
    path.write_text(text, encoding="utf-8")
    begun = time.process_time()
    with pytest.raises(RecipeError) as error:
        load_recipe(path, overrides, cwd=tmp_path)
    assert time.process_time() - begun < 10
    assert len(str(error.value)) < 5000
    str(error.value).encode()
    return error.value


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("steps: 3", "steps: 1e26", "expected a whole number, got 1e+26"),
        ("steps: 3", "steps: 99999999999999999999", "less than or equal to 1000000000"),
        ("steps: 3", f"steps: {'9' * 6000}", "no number that a run can use"),
        ("steps: 3", "epochs: 1e300", "less than or equal to 1000000"),
        ("1.0e-3", ".inf", "`lr`: .inf is no number that a run can use"),
        ("1.0e-3", ".nan", ".nan is no number"),
        ("1.0e-3", "1e999", "1e999 is no number"),
        ("1.0e-3", "1e-3, betas: [1.5, 0.9]", "must be less than 1, got 1.5"),
        ("1.0e-3", "1e-3, eps: -1", "greater than or equal to 0"),
        ("steps: 3", "steps: 3, batch: {sequences: 1e20}", "expected a whole number"),
        ("steps: 3", "steps: 3, loss: {name: sft, weight: .inf}", ".inf is no number"),
        ("data: d.jsonl", "data: {path: d.jsonl, options: {x: [1, -.inf]}}", "-.inf is no number"),
        ("id: sft", "id: base", "'base' names a folder that the run itself writes"),
        ("id: sft", "id: Logs", "'Logs' names a folder that the run itself writes"),
        ("id: sft", "id: tensorboard", "names a folder that the run itself writes"),
        ("id: sft", f"id: {'a' * 300}", "at most 100 characters"),
        ("id: sft", "id: ..", "names a folder and is '..'"),
        ("id: sft", "id: a/b", "names a folder and is 'a/b'"),
        ("id: sft", 'id: "a\\0b"', "has a NUL character in it"),
        ("d.jsonl", '"d\\0.jsonl"', "has a NUL character in it"),
        ("d.jsonl", '"d\\ud83d.jsonl"', "half a character in it"),
        ("d.jsonl", f"{'d' * 300}.jsonl", "is a path of 306 characters"),
        ("models/x", f"{'m/' * 3000}x", "is a path of 6001 characters"),
        ("name: t", f"name: {'t' * 300}", "at most 200 characters"),
        ("name: t", "name: t\nseed: 99999999999999999999", "`seed` must be less than"),
        ("name: t", f"name: t\noutput: {'o' * 300}", "is a path of 300 characters"),
    ],
)
def test_a_number_or_name_that_nothing_can_use_is_refused_at_its_line(
    tmp_path: Path, old: str, new: str, says: str
) -> None:
    text = RECIPE.replace(old, new)
    error = refused(tmp_path, text)
    assert says in str(error)
    line = next(n for n, one in enumerate(text.splitlines(), 1) if new.splitlines()[-1] in one)
    assert f"r.yaml:{line}" in str(error)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("stages.sft.optim.lr=.inf", ".inf is no number that a run can use"),
        ("stages.sft.steps=1e26", "expected a whole number"),
        (f"stages.sft.steps={'9' * 5000}", "no number"),
        ('name="a\\0"', "the value has a NUL character"),
        ("seed=" + "[" * 5000, "nested too deeply"),
        ("seed=" + "[" * 60 + "]" * 60, "more than 50 levels deep"),
        ("seed=&a [*a]", "more than 50 levels deep"),
        (f"stages.{'9' * 5000}.steps=1", "has no"),
        ("stages.²=1", "has no '²'"),
        (f"output={'x' * 300}", "is a path of"),
    ],
)
def test_an_override_is_held_to_the_same(tmp_path: Path, override: str, says: str) -> None:
    assert says in str(refused(tmp_path, RECIPE, override))


def test_stages_that_differ_in_capitals_alone_are_refused(tmp_path: Path) -> None:
    text = RECIPE + RECIPE.splitlines()[-1].replace("id: sft", "id: SFT") + "\n"
    assert "differ in capitals only" in str(refused(tmp_path, text))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            "a0: &a0 [x, x, x, x, x, x, x, x, x]\n"
            + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 9)),
            "make more than 50000 values",
        ),
        (
            "a0: &a0 {k: x}\n" + "".join(f"a{n}: &a{n} {{p: *a{n - 1}, q: *a{n - 1}}}\n" for n in range(1, 40)),
            "make more than 50000 values",
        ),
        ("a: &a [*a]\n", "more than 50 levels deep"),
        ("a: &a {b: *a}\n", "more than 50 levels deep"),
        ("a: &a\n  <<: *a\n", "more than 50 levels deep"),
        ("a: " + "[" * 60 + "]" * 60, "more than 50 levels deep"),
        ("a: " + "[" * 50_000, "nested too deeply"),
        ("a: " + "{a: " * 50_000, "nested too deeply"),
        ("a:\n" + "".join(" " * n + "-\n" for n in range(1, 1500)), "nested too deeply"),
        ("a: " + "x" * 5_000_000, "at most 4194304"),
        ("a: \x00", "not valid YAML"),
        ('"\\0": 1', "a key with a NUL character"),
        ("!!set {a, b}", "the tag `tag:yaml.org,2002:set` is not used in recipes"),
        ("!!omap\na: 1\n", "is not used in recipes"),
    ],
)
def test_a_bomb_of_a_few_lines_is_refused_with_its_line(tmp_path: Path, text: str, says: str) -> None:
    assert says in str(refused(tmp_path, text))
