"""Whole stages over data that people have: a last batch of one row, rows that begin alike, weights, equal answers."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from align.cli.main import main
from align.recipe.schema import Recipe
from align.stages.context import Context
from tests.unit.stages.test_pipeline import start
from tests.unit.stages.test_reward_model import MODEL, WORDS, LocalBackend, write_rows

START = "You are a careful reader of short texts. "


def recipe(folder: Path, rows: list[dict[str, Any]], **stage: Any) -> Recipe:
    data = write_rows(folder / "data.jsonl", rows)
    words = write_rows(
        folder / "words.jsonl", [{"text": START + " ".join(random.Random(n).choices(WORDS, k=9))} for n in range(40)]
    )
    return Recipe.model_validate(
        {
            "name": "run",
            "output": str(folder / "runs"),
            "model": {"config": MODEL, "tokenizer": {"train_on": words, "vocab_size": 300}, "dtype": "float32"},
            "stages": [{"id": "stage", "data": data, "optim": {"lr": 1e-2}, "adapter": {"rank": 4}, **stage}],
        }
    )


@pytest.mark.parametrize("reference", ["start", "cached"])
def test_kto_trains_to_the_end_whatever_its_last_batch_is(tmp_path: Path, reference: str) -> None:
    """`cached`: the variant without reference point, of rows that begin alike."""
    rng = random.Random(0)
    rows = [
        {"prompt": f"{START}{word}?", "completion": " " + " ".join(rng.choices(WORDS, k=3)), "label": n % 2 == 0}
        for n, word in enumerate(WORDS[:7])
    ]
    loss = {"name": "kto"} | ({"variant": "apo_zero_unpaired"} if reference == "cached" else {})
    made = recipe(tmp_path, rows, kind="preference", loss=loss, reference=reference, batch={"sequences": 3}, epochs=2)
    summary, lines = start(made, LocalBackend())
    assert summary["stages"]["stage"]["steps"] == 6 and "idle" not in summary["stages"]["stage"]
    if reference == "start":
        assert [value for _, value in lines.of("policy/without_reference_point")] == [0.0, 0.0, 1.0] * 2


def test_the_classify_verb_answers_rows_that_begin_alike_as_it_answers_each_alone(tmp_path: Path) -> None:
    rng = random.Random(1)
    rows = [
        {"text": (START if n % 4 else "") + " ".join(rng.choices(WORDS, k=4)), "label": ("red", "blue")[n % 2]}
        for n in range(12)
    ]
    made = recipe(tmp_path, rows, kind="classify", labels=["red", "blue"], batch={"sequences": 4}, steps=2)
    summary, _ = start(made, LocalBackend())
    folder, base = summary["stages"]["stage"]["artefacts"]["adapter"], str(made.run_folder / "base")

    def asked(some: list[dict[str, Any]], name: str) -> list[list[float]]:
        texts, out = write_rows(tmp_path / f"{name}.jsonl", some), tmp_path / f"{name}.out"
        assert main(["classify", folder, texts, "--base", base, "--out", str(out)]) == 0
        answers = [json.loads(line) for line in out.read_text().splitlines()]
        return [list(answer["log_probs"].values()) for answer in answers]

    together = asked([{**row, "weight": n % 3} for n, row in enumerate(rows)], "all")
    assert len(together) == 12, "a row of weight 0 is answered too"
    for n in (0, 1, 7):
        np.testing.assert_allclose(asked([rows[n]], f"row{n}"), [together[n]], atol=2e-6)


def test_pairs_with_equal_answers_after_the_cut_train_nothing_and_the_run_says_so(tmp_path: Path) -> None:
    """Also where the data let them pass: the step itself knows."""
    rows = [{"prompt": f"{word}?", "chosen": f" {word}", "rejected": " stone"} for word in WORDS[:3]]
    made = recipe(tmp_path, rows, kind="preference", loss={"name": "dpo"}, batch={"pairs": 2}, steps=5)
    read = Context.trees

    async def equal(self: Context, *args: Any, **options: Any) -> list[Any]:
        return [replace(tree, branches=(tree.branches[0],) * 2) for tree in await read(self, *args, **options)]

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Context, "trees", equal)
        summary, lines = start(made, LocalBackend())
    entry = summary["stages"]["stage"]
    assert list(entry["idle"].values()) == [5] and "both sides of the pairs" in next(iter(entry["idle"]))
    said = [line for line in lines.messages if "trained" in line]
    assert (
        said[0].startswith("stage: step 1 trained nothing") and "nothing was trained in any of its 5 steps" in said[-1]
    )
    run = json.loads((made.run_folder / "run.json").read_text())
    assert run["stages"]["stage"]["idle"] == entry["idle"]
    assert [value for _, value in lines.of("train/idle")] == [1.0] * 5
