"""One recipe from data to an exported, judged model, on real Ray and vLLM; every test looks at the same run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from align.stages import processes
from align.stages.checkpoint import list_checkpoints, verify
from tests.runs import dpo, grpo, metrics, rollouts, run, run_any, sft, write_data, write_recipe

pytestmark = [pytest.mark.slow, pytest.mark.vllm]


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of sft -> dpo -> grpo -> merge -> export -> exam; the recipe lies two folders above."""
    folder = tmp_path_factory.mktemp("story")
    write_data(folder)
    stages = [
        sft(),
        dpo(),
        grpo(),
        {"id": "merged", "kind": "merge", "from": "grpo"},
        {"id": "release", "kind": "export", "from": "merged"},
        {
            "id": "exam", "kind": "evaluate", "of": ["sft", "release"], "data": "sums.jsonl",
            "rewards": [{"use": "rewards.py:correct"}], "rollout": {"max_tokens": 8, "temperature": 0.0},
        },
        {"id": "held", "kind": "evaluate", "of": ["dpo"], "data": "sums.jsonl"},
    ]  # fmt: skip
    run(write_recipe(folder, "story", stages, placement={"rewards": {"count": 2}}))
    return folder / "runs" / "story"


def summary(story: Path) -> dict[str, Any]:
    return dict(json.loads((story / "summary.json").read_text())["stages"])


def test_every_stage_is_in_the_summary_with_what_it_did(story: Path) -> None:
    stages = summary(story)
    assert list(stages) == ["sft", "dpo", "grpo", "merged", "release", "exam", "held"]
    assert {name: stages[name]["steps"] for name in ("sft", "dpo", "grpo")} == {"sft": 40, "dpo": 8, "grpo": 6}
    for name in ("sft", "dpo", "grpo"):
        assert stages[name]["tokens"] > 0 and stages[name]["seconds"] > 0 and stages[name]["tokens_per_second"] > 0


def test_the_loss_falls_and_preferences_are_learnt(story: Path) -> None:
    losses = [line["loss/total"] for line in metrics(story, "sft") if line["step"] > 0]
    assert sum(losses[-4:]) / 4 < 0.6 * losses[0]
    evaluated = {line["step"]: line["eval/loss"] for line in metrics(story, "sft") if "eval/loss" in line}
    assert list(evaluated) == [0, 20, 40] and evaluated[40] < evaluated[0]
    first, *_, last = metrics(story, "dpo")
    assert first["loss/total"] == pytest.approx(0.693147, abs=1e-5), "at the start policy and reference are equal"
    assert last["loss/total"] < first["loss/total"] and last["rewards/margins"] > 0


def test_each_turn_trained_on_what_its_own_version_sampled(story: Path) -> None:
    rows = rollouts(story, "grpo")
    assert len(rows) == 6 * 8 * 4
    assert all(row["version"] == row["step"] - 1 for row in rows)
    assert [line["staleness/max"] for line in metrics(story, "grpo")] == [0.0] * 6
    assert len({row["group_id"] for row in rows}) == 48, "a group id is drawn once"
    assert all(row["objective/brevity"] == pytest.approx(-0.1 * len(row["token_ids"])) for row in rows)


def test_trainer_and_engine_agree_on_every_token_of_every_version(story: Path) -> None:
    lines = metrics(story, "grpo")
    assert len(lines) == 6
    assert max(line["mismatch/max_abs"] for line in lines) < 1e-4
    assert all(line["tokens/scored"] > 0 for line in lines)


def test_a_users_rewards_py_beside_the_recipe_works(story: Path) -> None:
    line = metrics(story, "grpo")[0]
    assert "objective/correct/mean" in line and line["objective/brevity/mean"] < 0
    assert line["reward/correct/errors"] == 0.0
    assert line["reward/correct/latency_p95"] >= line["reward/correct/latency_p50"] > 0
    logs = story / "grpo" / "rewards"
    assert (logs / "0-correct.log").is_file() and (logs / "1" / "0-correct.log").is_file(), "two reward actors"


def test_greedy_evaluation_ran_inside_the_online_stage(story: Path) -> None:
    found = [line["step"] for line in metrics(story, "grpo") if "eval/accuracy" in line]
    assert found == [3, 6]


def test_the_exam_wrote_accuracy_and_length_per_stage(story: Path) -> None:
    stages = summary(story)
    for name in ("sft", "release"):
        assert 0.0 <= stages[name]["metrics"]["accuracy"] <= 1.0
        assert stages[name]["metrics"]["accuracy"] == stages[name]["metrics"]["correct"]
        assert 1.0 <= stages[name]["metrics"]["mean_length"] <= 8.0
        assert stages[name]["metrics"]["completions"] == 64.0
    assert stages["sft"]["metrics"]["loss/total"] > 0, "what training reported stays beside it"


def test_an_evaluation_without_rewards_reports_the_loss(story: Path) -> None:
    assert summary(story)["dpo"]["metrics"]["eval/loss"] > 0


def test_checkpoints_are_complete_and_pruned(story: Path) -> None:
    kept = {name: [p.name for p in list_checkpoints(story / name / "checkpoints")] for name in ("sft", "dpo", "grpo")}
    assert kept == {
        "sft": ["step-000032", "step-000040"],
        "dpo": ["step-000006", "step-000008"],
        "grpo": ["step-000004", "step-000006"],
    }
    for name in kept:
        for path in list_checkpoints(story / name / "checkpoints"):
            assert verify(path).step > 0


def test_the_artefacts_load_in_plain_transformers_and_peft(story: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for folder in ("base", "sft/model", "merged/model", "release/model"):
        model = AutoModelForCausalLM.from_pretrained(story / folder)
        tokenizer = AutoTokenizer.from_pretrained(story / folder)
        asked = [{"role": "user", "content": "1 + 2 ="}]
        ids = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt")["input_ids"]
        assert model(ids).logits.shape[-1] == model.config.vocab_size
    base = AutoModelForCausalLM.from_pretrained(story / "sft" / "model")
    assert PeftModel.from_pretrained(base, str(story / "grpo" / "adapter")).peft_config["default"].r == 4


def test_what_the_run_is_stands_in_run_json(story: Path) -> None:
    state = json.loads((story / "run.json").read_text())
    assert {entry["state"] for entry in state["stages"].values()} == {"finished"}
    assert state["versions"]["torch"] and state["threads"]["trainer"] >= 1 and state["threads"]["rollout"] >= 1
    prints = state["stages"]["grpo"]["fingerprint"]
    assert all(len(digest) == 64 for digest in prints["data"].values())
    assert all(len(digest) == 64 for digest in prints["plugins"].values()) and len(prints["plugins"]) == 2
    assert state["stages"]["grpo"]["start"]["base"] == str(story / "sft" / "model")


def test_nothing_of_the_run_is_left_behind(story: Path) -> None:
    state = json.loads((story / "run.json").read_text())
    assert state["processes"] == []
    assert processes.descendants("left") == []
    assert not [p for p in story.rglob("*") if p.name.startswith((".writing", ".removing", ".merged"))]
    assert not [p for p in story.iterdir() if p.name.startswith("align-")]


def test_the_closing_table_shows_every_judged_stage(story: Path) -> None:
    text = (story.parents[1] / "story.log").read_text()
    table = text[text.rindex("stage") :]
    assert "correct" in table and "length" in table and "release" in table
    assert "Traceback" not in text


def test_running_it_again_needs_resume_or_another_name(story: Path) -> None:
    recipe = story.parents[1] / "story.yaml"
    code, text = run_any(recipe)
    assert code == 2
    message = text[text.rindex("error:") :]
    assert "--resume" in message and "name=" in message and str(story) in message


def test_resuming_a_finished_run_changes_nothing(story: Path) -> None:
    recipe = story.parents[1] / "story.yaml"
    before = summary(story)
    assert "finished before, kept" in run(recipe, "--resume")
    assert summary(story) == before


def test_a_placement_that_cannot_fit_is_refused_with_the_resource_named(story: Path) -> None:
    recipe = story.parents[1] / "story.yaml"
    code, text = run_any(recipe, "placement.trainer.cpus=4096", "name=huge")
    assert code == 2
    message = text[text.rindex("error:") :]
    assert "4096" in message and "CPU" in message and "Traceback" not in message
