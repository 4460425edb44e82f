"""The classify stage from recipe to folder: real data preparation, pipeline and trainer; no Ray."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from align.cli.main import main
from align.errors import Interrupted, ModelError
from align.model.score_head import MEANING
from align.recipe.inputs import Model
from align.recipe.load import load_recipe
from align.recipe.schema import Recipe
from tests.unit.stages.test_pipeline import start
from tests.unit.stages.test_reward_model import KINDS, MODEL, WORDS, LocalBackend, write_rows

RECIPES = Path(__file__).resolve().parents[3] / "recipes"
COLOURS = ("red", "blue", "green")
WORTH = {"red": 1.0, "blue": -1.0, "green": 0.5}


def coloured(rows: int, seed: int, problem: str) -> list[dict[str, Any]]:
    """Texts that name colours among other words. single_label: the one that is named; multi_label: all that are, by
    name; regression: the sum of what they are worth."""
    rng, found = random.Random(seed), []
    for _ in range(rows):
        others = rng.choices([w for w in WORDS if w not in COLOURS], k=rng.randint(2, 6))
        named = rng.sample(COLOURS, 1 if problem == "single_label" else rng.randint(0, 3))
        words = [*others, *named]
        rng.shuffle(words)
        worth = sum(WORTH[colour] for colour in named)
        label: Any = {"single_label": named[0] if named else None, "multi_label": named, "regression": worth}
        found.append({"text": " ".join(words), "label": label[problem]})
    return found


def make_recipe(folder: Path, problem: str, adapter: dict[str, Any], name: str = "run") -> Recipe:
    train = write_rows(folder / "train.jsonl", coloured(640, 0, problem))
    held = write_rows(folder / "held.jsonl", coloured(150, 1, problem))
    lr = 3e-3 if adapter.get("kind") == "full" else 1e-2
    best = {"regression": {"metric": "eval/mse", "mode": "min"}}.get(problem, {"metric": "eval/f1_macro"})
    labels = {} if problem == "regression" else {"labels": list(COLOURS)}
    return Recipe.model_validate(
        {
            "name": name,
            "output": str(folder / "runs"),
            "model": {"config": MODEL, "tokenizer": {"train_on": train, "vocab_size": 300}, "dtype": "float32"},
            "stages": [
                {"id": "judge", "kind": "classify", "problem": problem, "data": train, "batch": {"sequences": 16},
                 "epochs": 2, "adapter": adapter, "optim": {"lr": lr}, "eval": {"data": held, "every": "50%"},
                 "save": {"every": "50%", "best": best}, **labels},
                {"id": "merged", "kind": "merge", "from": "judge@best"},
            ],
        }
    )  # fmt: skip


PROBLEMS = {"single_label": "lora", "multi_label": "full", "regression": "lora"}


@pytest.fixture(scope="module", params=list(PROBLEMS))
def finished(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Recipe, Any]:
    problem = request.param
    recipe = make_recipe(tmp_path_factory.mktemp(problem), problem, KINDS[PROBLEMS[problem]])
    summary, _ = start(recipe, LocalBackend())
    return problem, recipe, summary["stages"]["judge"]


def held(recipe: Recipe) -> list[dict[str, Any]]:
    lines = Path(recipe.stages[0].eval.data[0].path).read_text().splitlines()  # type: ignore[union-attr]
    return [json.loads(line) for line in lines]


def test_it_learns_what_the_labels_mean_and_says_so_of_texts_it_has_not_seen(
    finished: tuple[str, Recipe, Any],
) -> None:
    problem, _, stage = finished
    metrics = stage["metrics"]
    if problem == "regression":
        assert metrics["eval/mse"] < 0.05 and metrics["eval/pearson"] > 0.95
    else:
        assert metrics["eval/accuracy"] > 0.9 and metrics["eval/f1_macro"] > 0.9 and metrics["eval/f1/green"] > 0.9


@torch.no_grad()
def logits(model: Any, base: Path, texts: list[str]) -> torch.Tensor:
    """f32[n, K] of plain transformers, right-padded."""
    tokenizer = AutoTokenizer.from_pretrained(base, padding_side="right")
    found: torch.Tensor = model.eval()(**tokenizer(texts, return_tensors="pt", padding=True)).logits
    return found


def test_anybody_loads_the_folder_with_its_labels_and_gets_what_align_classify_writes(
    finished: tuple[str, Recipe, Any], tmp_path: Path
) -> None:
    problem, recipe, _ = finished
    folder, rows = recipe.run_folder / "merged" / "model", held(recipe)
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    names = ["LABEL_0"] if problem == "regression" else list(COLOURS)
    assert list(model.config.id2label.values()) == names
    assert model.config.problem_type.startswith(problem)
    assert model.config.pad_token_id == AutoTokenizer.from_pretrained(folder).pad_token_id
    said, out = logits(model, folder, [row["text"] for row in rows]), tmp_path / "said.jsonl"
    assert main(["classify", str(folder), recipe.stages[0].eval.data[0].path, "--out", str(out)]) == 0  # type: ignore[union-attr]
    answers = [json.loads(line) for line in out.read_text().splitlines()]
    key, expected = {
        "single_label": ("log_probs", said.log_softmax(-1)),
        "multi_label": ("log_probs", torch.nn.functional.logsigmoid(said)),
        "regression": ("scores", said),
    }[problem]
    ours = torch.tensor([[answer[key][name] for name in names] for answer in answers])
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)
    if problem == "single_label":
        assert [answer["label"] for answer in answers] == [COLOURS[k] for k in said.argmax(-1)]
        assert [answer["expected"] for answer in answers] == [row["label"] for row in rows]
    if problem == "multi_label":
        assert all(set(a["expected"]) == set(row["label"]) for a, row in zip(answers, rows, strict=True))


def test_an_adapter_says_what_its_outputs_mean_and_is_asked_without_a_merge(
    finished: tuple[str, Recipe, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    problem, recipe, stage = finished
    if "adapter" not in stage["artefacts"]:
        pytest.skip("this one was trained whole")
    adapter, base, rows = Path(stage["artefacts"]["adapter"]), recipe.run_folder / "base", held(recipe)
    assert json.loads((adapter / MEANING).read_text())["problem_type"].startswith(problem)
    outputs = len(recipe.stages[0].score_head.names)
    plain = AutoModelForSequenceClassification.from_pretrained(base, num_labels=outputs)
    plain.config.pad_token_id = 0
    theirs = logits(PeftModel.from_pretrained(plain, adapter), base, [row["text"] for row in rows])
    texts = write_rows(tmp_path / "texts.jsonl", [{"text": row["text"]} for row in rows])
    assert main(["classify", str(adapter), texts, "--base", str(base), "--out", str(tmp_path / "said.jsonl")]) == 0
    answers = [json.loads(line) for line in (tmp_path / "said.jsonl").read_text().splitlines()]
    values = [list((answer.get("log_probs") or answer["scores"]).values()) for answer in answers]
    expected = theirs.log_softmax(-1) if problem == "single_label" else theirs
    torch.testing.assert_close(torch.tensor(values), expected, atol=1e-4, rtol=1e-4)
    assert "expected" not in answers[0] and "accuracy" not in capsys.readouterr().out


def test_the_numbers_that_align_classify_prints_are_those_of_the_stage(
    finished: tuple[str, Recipe, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    problem, recipe, stage = finished
    folder = Path(next(iter(stage["artefacts"].values())))
    data = recipe.stages[0].eval.data[0].path  # type: ignore[union-attr]
    command = ["classify", str(folder), data, "--out", str(tmp_path / "said.jsonl")]
    assert main([*command, "--base", str(recipe.run_folder / "base")]) == 0
    printed = capsys.readouterr().out
    for name in ("mse", "mae", "pearson") if problem == "regression" else ("accuracy", "f1_macro", "f1/red"):
        found = re.search(rf"^  {name} (\S+)$", printed, re.MULTILINE)
        assert found and float(found[1]) == pytest.approx(stage["metrics"][f"eval/{name}"], abs=1e-3)
    assert main(command) == 2, "the file is there"


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_stopped_stage_ends_with_the_weights_and_metrics_of_an_undisturbed_one(kind: str, tmp_path: Path) -> None:
    def shortened(name: str) -> Recipe:
        recipe = make_recipe(tmp_path, "single_label", KINDS[kind], name)
        save = recipe.stages[0].save.model_copy(update={"best": None, "every": 10})  # type: ignore[union-attr]
        judge = recipe.stages[0].model_copy(update={"steps": 6, "epochs": None, "eval": None, "save": save})
        return recipe.model_copy(update={"stages": (judge,)})

    whole, again = shortened("whole"), shortened("again")
    _, undisturbed = start(whole, LocalBackend())
    with pytest.raises(Interrupted):
        start(again, LocalBackend(), stop_in=("judge", 2))
    _, resumed = start(again, LocalBackend(), resume=True)
    folder, file = ("model", "model") if kind == "full" else ("adapter", "adapter_model")
    mine, theirs = (load_file(r.run_folder / "judge" / folder / f"{file}.safetensors") for r in (whole, again))
    assert mine.keys() == theirs.keys() and any("score" in name for name in mine)
    assert all(torch.equal(value, theirs[name]) for name, value in mine.items())
    assert resumed.timeless() == [step for step in undisturbed.timeless() if step[0] > 3]


def stages(recipe: Recipe, *more: dict[str, Any]) -> Recipe:
    """The recipe's classify stage in short, and others after it."""
    judge = recipe.model_dump(mode="json", by_alias=True, exclude_none=True)["stages"][0]
    judge |= {"steps": 2, "save": {"every": 10}}
    judge.pop("epochs"), judge.pop("eval")
    made = [{**judge, **change} for change in more]
    return Recipe.model_validate({**recipe.model_dump(mode="json", by_alias=True, exclude_none=True), "stages": made})


def test_a_classifier_starts_from_a_language_model_and_goes_on_from_itself_under_its_labels(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path, "single_label", KINDS["full"])
    more = stages(recipe, {"id": "one"}, {"id": "two", "from": "one"})
    start(more, LocalBackend())
    first, second = (load_file(more.run_folder / name / "model" / "model.safetensors") for name in ("one", "two"))
    moved = (first["score.weight"] - second["score.weight"]).abs().max()
    assert 0 < moved < 0.05, "the second goes on with the first one's head"
    other = stages(recipe, {"id": "three", "labels": ["green", "blue", "red"]})
    model = Model(path=str(more.run_folder / "one" / "model"))
    with pytest.raises(ModelError, match=r"a classifier of 3 labels.*green, blue, red"):
        start(other.model_copy(update={"model": model, "name": "other"}), LocalBackend())


def test_the_adapter_of_a_classifier_is_continued_under_its_labels_only(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path, "single_label", KINDS["lora"])
    first = stages(recipe, {"id": "one"})
    start(first, LocalBackend())
    model = Model(path=str(first.run_folder / "base"), adapter=str(first.run_folder / "one" / "adapter"))
    again = stages(recipe, {"id": "two"}).model_copy(update={"model": model, "name": "again"})
    start(again, LocalBackend())
    other = stages(recipe, {"id": "two", "problem": "multi_label"}).model_copy(update={"model": model, "name": "other"})
    Path(recipe.stages[0].data[0].path).write_text(  # type: ignore[union-attr]
        "".join(json.dumps(row) + "\n" for row in coloured(20, 0, "multi_label"))
    )
    with pytest.raises(ModelError, match="the adapter has a head for a single_label of 3"):
        start(other, LocalBackend())


@pytest.mark.slow
def test_the_recipe_runs_as_it_stands_and_learns(tmp_path: Path) -> None:
    recipe = load_recipe(RECIPES / "classify.yaml", [f"output={tmp_path}"])
    summary, _ = start(recipe, LocalBackend())
    metrics = summary["stages"]["reviews"]["metrics"]
    assert metrics["eval/accuracy"] > 0.95 and metrics["eval/f1_macro"] > 0.95
    assert np.isfinite(metrics["loss/total"])
