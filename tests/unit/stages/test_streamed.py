"""Stages over streams: trained as they are read, stopped and resumed; what they cannot do is refused beforehand."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from align.check.findings import Findings
from align.check.rules import check_recipe
from align.errors import DataError, Interrupted, UserError
from align.recipe.schema import Recipe
from tests.unit.stages.test_pipeline import PlainBackend, start
from tests.unit.stages.test_reward_model import MODEL, WORDS, LocalBackend, polite_pairs, write_rows


def recipe(folder: Path, data: Any, name: str = "run", **stage: Any) -> Recipe:
    said = [{"text": " ".join(random.Random(n).choices(WORDS, k=9))} for n in range(40)]
    return Recipe.model_validate(
        {
            "name": name,
            "output": str(folder / "runs"),
            "model": {
                "config": MODEL,
                "tokenizer": {"train_on": write_rows(folder / "words.jsonl", said), "vocab_size": 300},
                "dtype": "float32",
            },
            "stages": [
                {"id": "stage", "kind": "sft", "data": data, "optim": {"lr": 1e-2}, "adapter": {"rank": 4},
                 "steps": 6, "save": {"every": 2}} | stage
            ],
        }
    )  # fmt: skip


def said(rows: int, seed: int) -> list[dict[str, str]]:
    rng = random.Random(seed)
    return [{"prompt": " ".join(rng.choices(WORDS, k=3)), "completion": " " + rng.choice(WORDS)} for _ in range(rows)]


def mixed(folder: Path) -> list[dict[str, Any]]:
    paths = [write_rows(folder / f"{n}.jsonl", said(40, n)) for n in range(2)]
    return [
        {"path": path, "stream": True, "shuffle_buffer": 7, "weight": weight}
        for path, weight in zip(paths, (3.0, 1.0), strict=True)
    ]


def weights(made: Recipe) -> dict[str, np.ndarray]:
    return load_file(made.run_folder / "stage" / "adapter" / "adapter_model.safetensors")


def problems(made: Recipe) -> list[UserError]:
    found = Findings(None)
    check_recipe(made, found)
    return found.errors


@pytest.mark.parametrize("stop", [0, 2, 4])
def test_a_stopped_stage_goes_on_to_the_bit(tmp_path: Path, stop: int) -> None:
    stage: dict[str, Any] = {"batch": {"sequences": 5}}
    whole = recipe(tmp_path, mixed(tmp_path), "whole", **stage)
    start(whole, LocalBackend())
    made = recipe(tmp_path, mixed(tmp_path), **stage)
    assert not problems(made)
    with pytest.raises(Interrupted):
        start(made, LocalBackend(), stop_in=("stage", stop))
    _, lines = start(made, LocalBackend(), resume=True)
    assert f"stage: continues from step {stop + 1}" in lines.messages
    one, two = weights(whole), weights(made)
    assert one.keys() == two.keys() and all((one[name] == two[name]).all() for name in one)
    report = json.loads((made.run_folder / "stage" / "data.json").read_text())
    assert report["used"] == 30 and [source["used"] for source in report["sources"]] == [23, 7]


def test_pairs_are_streamed_too_and_held_out_rows_are_read_whole(tmp_path: Path) -> None:
    data = {"path": write_rows(tmp_path / "pairs.jsonl", polite_pairs(30, 0)), "stream": True, "shuffle_buffer": 8}
    held = write_rows(tmp_path / "held.jsonl", polite_pairs(6, 1))
    made = recipe(tmp_path, data, kind="preference", batch={"pairs": 4}, eval={"data": held, "every": 3})
    assert not problems(made)
    summary, lines = start(made, LocalBackend())
    assert summary["stages"]["stage"]["steps"] == 6 and "eval/loss" in summary["stages"]["stage"]["metrics"]
    assert any("stream, rows 1 to 8:" in line for line in lines.messages)


def test_a_row_that_the_loss_cannot_weigh_ends_the_stage_where_it_is_drawn(tmp_path: Path) -> None:
    rows = [{**row, "weight": 2.0 if n == 9 else 1.0} for n, row in enumerate(polite_pairs(12, 0))]
    data = {"path": write_rows(tmp_path / "rows.jsonl", rows), "stream": True, "shuffle_buffer": 4}
    made = recipe(tmp_path, data, kind="preference", loss={"name": "dpo", "variant": "aot"}, batch={"pairs": 4})
    with pytest.raises(DataError, match="takes no weights") as error:
        start(made, LocalBackend())
    assert str(error.value.where).endswith("rows.jsonl:10")


@pytest.mark.parametrize(
    ("stage", "key", "words"),
    [
        ({"steps": None, "epochs": 1}, "epochs", "is not known before it ends"),
        ({"steps": None}, "steps", "is not known before it ends"),
        ({"kind": "preference", "reference": "cached"}, "reference", "before the first step"),
        ({"kind": "preference", "loss": {"name": "modpo"}, "rewards": [{"use": "short"}]}, "rewards", "every pair"),
        ({"mix": {"exhausted": "all"}}, "mix", "streams have none"),
        ({"eval": {"data": {"path": "0.jsonl", "stream": True}, "every": 2}}, "eval.data", "read whole"),
        ({"data": [{"path": "0.jsonl", "stream": True}, "1.jsonl"]}, "data", "1 of 2 sources are streams"),
        ({"data": {"path": "rows.py:made", "stream": True}}, "data", "a generator's rows are made before"),
        (
            {"kind": "online", "data": {"path": "0.jsonl", "stream": True}, "rewards": [{"use": "short"}]},
            "data",
            "draws its prompts from all of them",
        ),
    ],
)
def test_what_needs_all_rows_beforehand_is_refused(tmp_path: Path, stage: dict[str, Any], key: str, words: str) -> None:
    found = problems(recipe(tmp_path, stage.pop("data", mixed(tmp_path)), **stage))
    assert any(words in error.what and key in str(error.where) for error in found), [str(e) for e in found]


def test_a_file_that_grew_is_noticed_by_a_resume_without_reading_all_of_it(tmp_path: Path) -> None:
    data = mixed(tmp_path)
    made = recipe(tmp_path, data, batch={"sequences": 5})
    with pytest.raises(Interrupted):
        start(made, PlainBackend(), stop_in=("stage", 2))
    with Path(data[0]["path"]).open("a") as f:
        f.write(json.dumps(said(1, 9)[0]) + "\n")
    with pytest.raises(UserError, match=r"0\.jsonl"):
        start(made, PlainBackend(), resume=True)


def test_mixing_without_weights_and_a_buffer_without_stream_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="give all of `data` a `weight`"):
        recipe(tmp_path, "0.jsonl", mix={"exhausted": "first"})
    with pytest.raises(ValueError, match="`shuffle_buffer` is of a stream"):
        recipe(tmp_path, {"path": "0.jsonl", "shuffle_buffer": 3})
