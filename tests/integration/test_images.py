"""Images from rows to an exported, judged model: real Ray and vLLM on a tiny Qwen2.5-VL. One run is looked at by most
tests; its last stage has LoRA in the tower too. Kills and resumes are proved by tests/prove/prove_resume.py."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from align.stages import processes
from tests.image_runs import DPO, EXAM, GRPO, SEEING, SFT, write_data, write_recipe
from tests.runs import metrics, rollouts, run

pytestmark = [pytest.mark.slow, pytest.mark.vllm]

TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("images")
    write_data(found)
    return found


@pytest.fixture(scope="module")
def story(folder: Path) -> Path:
    """The run folder of sft -> merge -> dpo -> grpo -> merge -> export -> exam, and of GRPO with LoRA in the tower; the
    recipe lies two folders above."""
    stages = [
        SFT,
        {"id": "whole", "kind": "merge", "from": "sft"},
        DPO,
        GRPO,
        {"id": "merged", "kind": "merge", "from": "grpo"},
        {"id": "release", "kind": "export", "from": "merged"},
        EXAM,
        {**SEEING, "id": "seeing", "from": "whole", "steps": 2},
    ]
    run(write_recipe(folder, "story", stages))
    return folder / "runs" / "story"


def test_every_stage_trained_on_its_pictures(story: Path) -> None:
    stages = json.loads((story / "summary.json").read_text())["stages"]
    assert list(stages) == ["sft", "whole", "dpo", "grpo", "merged", "release", "exam", "seeing"]
    evaluated = {line["step"]: line["eval/loss"] for line in metrics(story, "sft") if "eval/loss" in line}
    assert evaluated[8] < evaluated[0]
    first, *_, last = metrics(story, "dpo")
    assert first["loss/total"] == pytest.approx(0.693147, abs=1e-5), "at the start policy and reference are equal"
    assert last["loss/total"] < first["loss/total"]


def test_the_tower_changed_where_it_was_tuned_and_nowhere_else(folder: Path, story: Path) -> None:
    from safetensors.numpy import load_file

    def tower(model: Path) -> dict[str, bytes]:
        parts = [tensors for file in model.glob("*.safetensors") for tensors in load_file(file).items()]
        return {name: tensor.tobytes() for name, tensor in parts if "visual." in name}

    base, tuned, released = (tower(m) for m in (folder / "model", story / "whole/model", story / "release/model"))
    assert base.keys() == tuned.keys() and len(base) > 20
    assert all(base[name] != tuned[name] for name in base if name.endswith("weight"))
    assert tuned == released


def test_trainer_and_engine_agree_on_every_token_after_pictures(story: Path) -> None:
    lines = metrics(story, "grpo")
    assert len(lines) == 2
    assert max(line["mismatch/max_abs"] for line in lines) <= TOLERANCE
    assert all(line["tokens/scored"] > 0 for line in lines)


def test_rewards_saw_the_pictures_that_the_rollouts_name(story: Path) -> None:
    rows = rollouts(story, "grpo")
    assert len(rows) == 2 * 4 * 4
    assert sum(not row["media"] for row in rows) not in (0, len(rows)), "with and without"
    for row in rows:
        if not row["media"]:
            assert row["objective/looks"] == -1.0
            continue
        with Image.open(row["media"][0]) as picture:
            blue = picture.resize((1, 1), Image.Resampling.BOX).getpixel((0, 0))[2] / 255  # type: ignore[index]
        assert row["objective/looks"] == pytest.approx(blue, abs=1e-6)
    assert len({row["objective/looks"] for row in rows}) > 3
    assert [line["reward/looks/errors"] for line in metrics(story, "grpo")] == [0.0, 0.0]


def test_the_exam_of_the_exported_model_showed_it_pictures(story: Path) -> None:
    found = json.loads((story / "summary.json").read_text())["stages"]["release"]["metrics"]
    assert found["completions"] == 16.0 and -1 < found["looks"] < 1


def test_the_exported_model_reads_a_picture_in_plain_transformers(folder: Path, story: Path) -> None:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(story / "release" / "model")
    processor = AutoProcessor.from_pretrained(story / "release" / "model")
    turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What colour is it?"}]}
    text = processor.apply_chat_template([turn], add_generation_prompt=True)
    with Image.open(folder / "pictures" / "sft" / "0.png") as picture:
        inputs = processor(text=[text], images=[picture], return_tensors="pt")
    assert model(**inputs).logits.isfinite().all()


def test_nothing_of_the_run_is_left_behind(folder: Path, story: Path) -> None:
    assert json.loads((story / "run.json").read_text())["processes"] == []
    assert processes.descendants("left") == []
    media = folder / "runs" / ".cache" / "media"
    assert len(list(media.glob("*.png"))) > 24 and not list(media.glob(".*"))
    assert not list((media / "leases").iterdir())
    assert "Traceback" not in (folder / "story.log").read_text()


def test_lora_in_the_tower_agrees_with_the_engine(story: Path) -> None:
    lines = metrics(story, "seeing")
    assert len(lines) == 2 and max(line["mismatch/max_abs"] for line in lines) <= TOLERANCE
    assert any("visual" in name for name in _adapter_tensors(story / "seeing" / "adapter"))


def _adapter_tensors(adapter: Path) -> list[str]:
    from safetensors import safe_open

    with safe_open(adapter / "adapter_model.safetensors", framework="np") as file:
        return list(file.keys())


def test_two_ranks_with_pictures_in_some_rows_report_what_one_does(folder: Path, story: Path) -> None:
    run(write_recipe(folder, "two", [SFT], placement={"trainer": {"ranks": 2, "threads": 1}}))
    ours, theirs = metrics(folder / "runs" / "two", "sft"), metrics(story, "sft")
    assert len(ours) == len(theirs)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.keys() - {"comm/bytes", "time/communicate"} == other.keys()
        for name in ("loss/total", "optim/grad_norm", "eval/loss", "tokens/scored"):
            if name in other:
                assert mine[name] == pytest.approx(other[name], rel=2e-3, abs=1e-4), (mine["step"], name)
