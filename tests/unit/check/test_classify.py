"""What `align check` says of classify stages, and what `align classify` refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from align.cli.main import main
from align.errors import UserError
from tests.unit.check.test_check import plan_of
from tests.unit.check.workshop import Workshop
from tests.unit.model.tiny import write_tiny

STAGE = (
    "  - {id: judge, kind: classify, from: %s, labels: [bad, good], data: texts.jsonl, batch: {sequences: 5},"
    " eval: {data: texts.jsonl}}\n"
)
ROWS = [{"text": f"number {n}", "label": ("bad", "good")[n % 2]} for n in range(10)]


def add(shop: Workshop, stages: str) -> None:
    shop.write("texts.jsonl", "".join(json.dumps(row) + "\n" for row in ROWS))
    shop.write("recipe.yaml", shop.recipe.read_text() + stages)


@pytest.mark.parametrize("source", ["sft", "dpo"], ids=["full", "lora"])
def test_a_classify_stage_is_planned(workshop: Workshop, source: str) -> None:
    add(workshop, STAGE % source)
    plan = plan_of(workshop).stages[-1]
    text = "\n".join(plan.lines)
    assert f"starts from {source}; trains {'all weights' if source == 'sft' else 'LoRA of rank 8'}" in text
    assert "a score head: single_label of 2 (bad, good); loss classify" in text
    assert f"2 steps of 5 sequences; lr {1e-5 if source == 'sft' else 1e-4:g} cosine" in text
    assert "data: labels: bad 5 (50%), good 5 (50%)" in text
    assert plan.memory["trainer"].parts["logits"] == 0


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("labels=null", "num_labels=2"), "single_label of 2 (LABEL_0, LABEL_1)"),
        (("problem=multi_label",), "multi_label of 2 (bad, good)"),
        (("loss.label_smoothing=0.1", "loss.class_weights=[1, 3]"), "loss classify"),
        (("labels=[1, 2]",), "single_label of 2 (1, 2)"),
    ],
    ids=["numbered", "several", "loss options", "numerals"],
)
def test_outputs_are_said_in_several_ways(workshop: Workshop, overrides: tuple[str, ...], words: str) -> None:
    add(workshop, STAGE % "sft")
    if "2 (1, 2)" in words:
        workshop.write("texts.jsonl", "".join(json.dumps({"text": "a", "label": n % 2 + 1}) + "\n" for n in range(10)))
    if "LABEL" in words:
        workshop.write("texts.jsonl", "".join(json.dumps({"text": "a", "label": n % 2}) + "\n" for n in range(10)))
    plan = plan_of(workshop, *(f"stages.judge.{override}" for override in overrides))
    assert words in "\n".join(plan.stages[-1].lines)


ONLINE = "from: judge, batch: {groups: 2}, rewards: numeric, steps: 2"
REFUSED = {
    "no labels": ("", ("labels=null",), ("give `labels: [names]`, or `num_labels`",)),
    "two counts": ("", ("num_labels=3",), ("`labels` names 2 and `num_labels` is 3",)),
    "a label twice": ("", ("labels=[good, good]",), ("the same name",)),
    "truth values": ("", ("labels=[true, false]",), ("truth values", "put them in quotes")),
    "no choice": ("", ("labels=[good]",), ("is no choice", "regression")),
    "an unknown problem": ("", ("problem=several",), ("single_label",)),
    "an unknown label": ("", ("labels=[bad, fine]",), ("texts.jsonl:2", "unknown label 'good'", "bad, fine")),
    "a reference": ("", ("reference=start",), ("`reference` is given", "compares with none")),
    "another loss": (
        "",
        ("loss=sft",),
        ("a stage of kind classify has a score head", "'sft' needs a language model's"),
    ),
    "a pair's loss": ("", ("loss=reward_model",), ("'reward_model' learns from pairs", "kind classify has not")),
    "smoothing of several": (
        "",
        ("problem=multi_label", "loss.label_smoothing=0.1"),
        ("`label_smoothing` spreads one label", "`problem: multi_label`"),
    ),
    "weights of another number": ("", ("loss.class_weights=[1, 2, 3]",), ("has 3 numbers", "2 labels", "bad, good")),
    "weights of a regression": (
        "",
        ("problem=regression", "loss.class_weights=[1, 2]"),
        ("a regression has none",),
    ),
    "its loss elsewhere": (
        "  - {id: more, kind: sft, from: sft, loss: classify, data: sft.jsonl}\n",
        (),
        ("'classify' needs a score head", "use `kind: classify`"),
    ),
    "sft from it": ("  - {id: more, kind: sft, from: judge, data: sft.jsonl}\n", (), ("'judge' is a classifier",)),
    "online from it": (
        f"  - {{id: more, kind: online, {ONLINE}, data: sft.jsonl}}\n",
        (),
        ("'judge' is a classifier", "kind online needs a language model"),
    ),
    "a reward model from it": (
        "  - {id: more, kind: reward_model, from: judge, data: pairs.jsonl}\n",
        (),
        ("'judge' is a classifier, single_label of 2", "trains a reward model's one score"),
    ),
    "other labels from it": (
        STAGE.replace("id: judge", "id: more").replace("[bad, good]", "[good, bad]") % "judge",
        (),
        ("'judge' is a classifier", "single_label of 2 (good, bad)", "the same labels"),
    ),
    "its completions": (
        "  - {id: more, kind: evaluate, of: [sft, judge], rewards: numeric, data: sft.jsonl}\n",
        (),
        ("'judge' is a classifier", "kind evaluate needs", "`align classify`"),
    ),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_what_a_classifier_cannot_do_is_refused_with_a_way_round(workshop: Workshop, case: str) -> None:
    more, overrides, words = REFUSED[case]
    add(workshop, STAGE % "sft" + more)
    with pytest.raises(UserError) as caught:
        plan_of(workshop, *(f"stages.judge.{override}" for override in overrides))
    for word in words:
        assert word in str(caught.value), str(caught.value)


def test_a_classifier_is_merged_exported_and_trained_on(workshop: Workshop) -> None:
    files = "  - {id: merged-judge, kind: merge, from: judge}\n  - {id: release, kind: export, from: merged-judge}\n"
    add(workshop, STAGE % "dpo" + files + STAGE.replace("id: judge", "id: more") % "release")
    assert [stage.kind for stage in plan_of(workshop).stages[-4:]] == ["classify", "merge", "export", "classify"]


def classifier(folder: Path, **config: object) -> Path:
    write_tiny(folder)
    labels = {"id2label": {"0": "bad", "1": "good"}, "label2id": {"bad": 0, "good": 1}}
    known = json.loads((folder / "config.json").read_text())
    known |= {"architectures": ["Qwen3ForSequenceClassification"], **labels, **config}
    (folder / "config.json").write_text(json.dumps(known))
    return folder


def test_a_classifier_is_where_a_stage_of_its_labels_starts_and_no_other(workshop: Workshop, tmp_path: Path) -> None:
    add(workshop, "")
    folder = classifier(tmp_path / "classifier", problem_type="single_label_classification")
    head = f"name: small\nmodel: {{path: {folder}}}\nstages:\n" + STAGE.replace("from: %s, ", "")
    workshop.write("recipe.yaml", head)
    assert plan_of(workshop).stages[0].kind == "classify"
    for override in ("labels=[good, bad]", "problem=multi_label"):
        with pytest.raises(UserError, match=r"the model is a single_label of 2 \(bad, good\), and the stage trains a"):
            plan_of(workshop, f"stages.judge.{override}")
    rm = "  - {id: rm, kind: reward_model, data: pairs.jsonl}\n"
    workshop.write("recipe.yaml", head[: head.index("  - ")] + rm)
    with pytest.raises(UserError, match="the stage trains a reward model's one score"):
        plan_of(workshop)


# ------------------------------------------------------------------------------------------------- align classify


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ((), "has no score head"),
        (("--columns", "text"), "write text=review"),
        (("--out", "there.jsonl"), "the file exists"),
    ],
    ids=["a language model", "half a column", "a file that is there"],
)
def test_align_classify_says_what_is_wrong_before_it_loads_anything(
    more: tuple[str, ...],
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = classifier(tmp_path / "model") if "--columns" in more else write_tiny(tmp_path / "model")
    (tmp_path / "there.jsonl").write_text("")
    (tmp_path / "texts.jsonl").write_text(json.dumps(ROWS[0]) + "\n")
    assert main(["classify", str(folder), "texts.jsonl", "--out", "said.jsonl", *more]) == 2
    assert says in capsys.readouterr().err and not (tmp_path / "said.jsonl").exists()
