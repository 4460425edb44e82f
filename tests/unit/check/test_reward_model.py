"""What `align check` says of reward_model stages: the plan, and every combination that could not run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from align.errors import UserError
from tests.unit.check.test_check import plan_of
from tests.unit.check.workshop import Workshop
from tests.unit.model.tiny import write_tiny

STAGE = "  - {id: rm, kind: reward_model, from: %s, data: pairs.jsonl, batch: {pairs: 5}, eval: {data: pairs.jsonl}}\n"


def add(shop: Workshop, stages: str) -> None:
    shop.write("recipe.yaml", shop.recipe.read_text() + stages)


@pytest.mark.parametrize("source", ["sft", "dpo"], ids=["full", "lora"])
def test_a_reward_model_stage_is_planned(workshop: Workshop, source: str) -> None:
    add(workshop, STAGE % source)
    plan = plan_of(workshop).stages[-1]
    text = "\n".join(plan.lines)
    trained = "all weights and a score head" if source == "sft" else "LoRA of rank 8"
    assert f"starts from {source}; trains {trained}" in text and "a score head; loss reward_model" in text
    assert "reference: none" in text
    assert f"2 steps of 5 pairs; lr {1e-5 if source == 'sft' else 1e-4:g} cosine" in text  # 10 rows
    assert plan.steps == 2
    assert plan.memory["trainer"].parts["logits"] == 0 < plan.memory["trainer"].parts["activations"]
    assert [role.name for role in plan.roles] == ["trainer"]


def test_an_override_reaches_the_default_loss(workshop: Workshop) -> None:
    add(workshop, STAGE % "sft")
    plan_of(workshop, "stages.rm.loss.centre=0.01")
    with pytest.raises(UserError, match="center"):
        plan_of(workshop, "stages.rm.loss.center=0.01")


ONLINE = "from: rm, batch: {groups: 2}, rewards: numeric, steps: 2"
REFUSED = {
    "a reference": ("", ("stages.rm.reference=start",), ("`reference` is given", "compares with none")),
    "another loss": (
        "",
        ("stages.rm.loss=dpo",),
        ("a stage of kind reward_model has a score head", "'dpo' needs a language model's", "kind: preference"),
    ),
    "a likelihood term": ("", ("stages.rm.loss=[reward_model, sft]",), ("'sft' needs a language model's",)),
    "its loss elsewhere": (
        "",
        ("stages.dpo.loss=reward_model",),
        ("'reward_model' needs a score head", "kind preference has not", "use `kind: reward_model`"),
    ),
    "a batch in sequences": ("", ("stages.rm.batch={sequences: 4}",), ("counted in pairs", "batch: {pairs: 4}")),
    "preference from it": (
        "  - {id: more, kind: preference, from: rm, data: pairs.jsonl}\n",
        (),
        ("'rm' is a reward model", "kind preference needs a language model"),
    ),
    "sft from it": ("  - {id: more, kind: sft, from: rm, data: sft.jsonl}\n", (), ("'rm' is a reward model",)),
    "online from it": (
        f"  - {{id: more, kind: online, {ONLINE}, data: sft.jsonl}}\n",
        (),
        ("'rm' is a reward model", "kind online needs a language model"),
    ),
    "its completions": (
        "  - {id: more, kind: evaluate, of: [sft, rm], rewards: numeric, data: sft.jsonl}\n",
        (),
        ("'rm' is a reward model", "kind evaluate needs", "give 'rm' an `eval: {data: ...}`"),
    ),
    "its loss in an evaluation": (
        "  - {id: more, kind: evaluate, of: [sft], loss: reward_model, data: pairs.jsonl}\n",
        (),
        ("'reward_model' needs a score head, which a stage of kind evaluate has not",),
    ),
    "another adapter": (
        "",
        ("stages.rm.from=dpo", "stages.rm.adapter={rank: 4}"),
        ("under another configuration", "put a merge stage between"),
    ),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_what_a_reward_model_cannot_do_is_refused_with_a_way_round(workshop: Workshop, case: str) -> None:
    stages, overrides, words = REFUSED[case]
    add(workshop, STAGE % "sft" + stages)
    with pytest.raises(UserError) as caught:
        plan_of(workshop, *overrides)
    for word in words:
        assert word in str(caught.value), str(caught.value)


def test_a_reward_model_is_where_another_one_may_start_and_nothing_else(workshop: Workshop, tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "rm")
    config = json.loads((folder / "config.json").read_text())
    config |= {"architectures": ["Qwen3ForSequenceClassification"], "id2label": {"0": "LABEL_0"}}
    (folder / "config.json").write_text(json.dumps(config))
    text = workshop.recipe.read_text()
    head, stages = text[: text.index("model:")] + f"model: {{path: {folder}}}\n", text[text.index("stages:") :]
    workshop.write("recipe.yaml", head + stages)
    with pytest.raises(UserError, match="the model is a Qwen3ForSequenceClassification: it scores"):
        plan_of(workshop)
    workshop.write("recipe.yaml", head + "stages:\n" + STAGE.replace("from: %s, ", ""))
    assert plan_of(workshop).stages[0].kind == "reward_model"


def test_a_tokenizer_without_padding_token_is_refused(workshop: Workshop, tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "model")
    settings = json.loads((folder / "tokenizer_config.json").read_text()) | {"pad_token": None}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    workshop.write(
        "recipe.yaml", f"name: small\nmodel: {{path: {folder}}}\nstages:\n" + STAGE.replace("from: %s, ", "")
    )
    with pytest.raises(UserError, match="no padding token"):
        plan_of(workshop)


@pytest.mark.parametrize("kind", ["reward_model", "preference"])
def test_a_reward_models_adapter_is_continued_by_a_reward_model_stage_only(
    workshop: Workshop, tmp_path: Path, kind: str
) -> None:
    folder = write_tiny(tmp_path / "model")
    (tmp_path / "adapter").mkdir()
    config = {"peft_type": "LORA", "task_type": "SEQ_CLS", "modules_to_save": ["score"], "r": 4, "lora_alpha": 8,
              "target_modules": ["q_proj"]}  # fmt: skip
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    workshop.write(
        "recipe.yaml",
        f"name: small\nmodel: {{path: {folder}, adapter: {tmp_path / 'adapter'}}}\nstages:\n"
        f"  - {{id: more, kind: {kind}, data: pairs.jsonl}}\n",
    )
    if kind == "reward_model":
        assert "LoRA of rank 4" in plan_of(workshop).stages[0].lines[0]
    else:
        with pytest.raises(UserError, match="the adapter is a reward model's"):
            plan_of(workshop)


def test_a_reward_model_is_merged_and_exported_and_stays_one(workshop: Workshop) -> None:
    files = "  - {id: merged-rm, kind: merge, from: rm}\n  - {id: release, kind: export, from: merged-rm}\n"
    add(workshop, STAGE % "dpo" + files + STAGE.replace("id: rm", "id: more") % "release")
    assert [stage.kind for stage in plan_of(workshop).stages[-4:]] == [
        "reward_model",
        "merge",
        "export",
        "reward_model",
    ]
    with pytest.raises(UserError, match="'merged-rm' is a reward model: it scores"):
        plan_of(workshop, "stages.more.kind=preference", "stages.more.from=merged-rm")
