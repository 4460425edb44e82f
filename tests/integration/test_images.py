"""Images from rows to an exported, judged model: real Ray and vLLM on a tiny Qwen2.5-VL. One run is looked at by most
tests; a second, in which LoRA sits in the tower too, is killed and resumed."""

from __future__ import annotations

import base64
import importlib.util
import json
import signal
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from align.stages import processes
from align.stages.checkpoint import list_checkpoints
from tests.runs import Stopped, metrics, rollouts, run, stop_at, timeless, weights, write_jsonl

pytestmark = [pytest.mark.slow, pytest.mark.vllm]

CHECKOUT = Path(__file__).resolve().parents[2]
TOLERANCE = 1e-4
JUDGE = '''"""What it says of a picture can be computed again from the file that the rollouts name."""

from PIL import Image

from rewards import reward


@reward(max_error_rate=0)
def looks(samples):
    """How blue the picture is, in [0, 1]; -1 where there is none."""
    return [_blueness(s) for s in samples]


def _blueness(sample):
    shown = [part for m in sample.messages if isinstance(m["content"], list) for part in m["content"]]
    if not sample.media:
        assert all(part["type"] == "text" for part in shown), sample.messages
        return -1.0
    [medium] = sample.media
    assert medium["type"] == "image", medium
    assert [part["path"] for part in shown if part["type"] == "image"] == [medium["path"]], sample.messages
    with Image.open(medium["path"]) as picture:
        assert picture.mode == "RGB"
        return picture.resize((1, 1), Image.Resampling.BOX).getpixel((0, 0))[2] / 255


@reward
def brevity(samples):
    return [-0.1 * len(s.token_ids) for s in samples]
'''


def write_data(folder: Path) -> None:
    """sft.jsonl, pairs.jsonl and prompts.jsonl with pictures as files, a fourth of the rows without; and judge.py."""
    spec = importlib.util.spec_from_file_location("shapes", CHECKOUT / "recipes" / "shapes.py")
    assert spec is not None and spec.loader is not None
    shapes = sys.modules["shapes"] = importlib.util.module_from_spec(spec)  # dataclasses look their module up
    spec.loader.exec_module(shapes)
    write_jsonl(folder / "sft.jsonl", _rows(shapes.sft(rows=32), folder / "pictures" / "sft"))
    write_jsonl(folder / "pairs.jsonl", _rows(shapes.pairs(rows=16), folder / "pictures" / "pairs"))
    write_jsonl(folder / "prompts.jsonl", _rows(shapes.prompts(rows=16), folder / "pictures" / "prompts"))
    (folder / "judge.py").write_text(JUDGE)


def _rows(rows: Iterable[dict[str, Any]], pictures: Path) -> list[dict[str, Any]]:
    pictures.mkdir(parents=True)
    found = []
    for number, row in enumerate(rows):
        [uri] = row.pop("images")
        if number % 4 == 3:
            turns = row["messages" if "messages" in row else "prompt"]
            turns[0]["content"] = turns[0]["content"].replace("<image>", "")
        else:
            (pictures / f"{number}.png").write_bytes(base64.b64decode(uri.partition(",")[2]))
            row["images"] = [f"pictures/{pictures.name}/{number}.png"]
        found.append(row)
    return found


def write_recipe(folder: Path, name: str, stages: list[dict[str, Any]], **changes: Any) -> Path:
    recipe = {
        "name": name,
        "output": "runs",
        "model": {"path": "model", "dtype": "float32"},
        "report": {"tensorboard": False},
        "stages": stages,
        **changes,
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path


SFT = {  # the tower whole, the language model by LoRA
    "id": "sft", "kind": "sft", "data": "sft.jsonl", "batch": {"sequences": 8}, "steps": 8, "optim": {"lr": 3e-3},
    "adapter": {"kind": "lora", "rank": 4, "alpha": 8, "tune": {"vision": "full", "projector": "full"}},
    "eval": {"data": {"path": "sft.jsonl", "limit": 8}, "every": 8, "at_start": True},
}  # fmt: skip
DPO = {
    "id": "dpo", "kind": "preference", "from": "whole", "data": "pairs.jsonl", "batch": {"pairs": 8}, "steps": 4,
    "adapter": {"kind": "lora", "rank": 4, "alpha": 8}, "optim": {"lr": 1e-3},
}  # fmt: skip
GRPO = {
    "id": "grpo", "kind": "online", "from": "dpo", "data": "prompts.jsonl", "batch": {"groups": 4, "group_size": 4},
    "rollout": {"max_tokens": 8}, "rewards": [{"use": "judge.py:looks"}, {"use": "judge.py:brevity"}],
    "loss": {"name": "grpo", "kl": 0.01}, "optim": {"lr": 1e-3}, "steps": 2, "save": {"every": 1},
}  # fmt: skip
EXAM = {
    "id": "exam", "kind": "evaluate", "of": ["release"], "data": "prompts.jsonl",
    "rewards": [{"use": "judge.py:looks"}], "rollout": {"max_tokens": 8, "temperature": 0.0},
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.tiny_vlms import write_tiny_vlm

    found = tmp_path_factory.mktemp("images")
    write_tiny_vlm(found / "model", "qwen2_5_vl")
    write_data(found)
    return found


@pytest.fixture(scope="module")
def story(folder: Path) -> Path:
    """The run folder of sft -> merge -> dpo -> grpo -> merge -> export -> exam; the recipe lies two folders above."""
    stages = [
        SFT,
        {"id": "whole", "kind": "merge", "from": "sft"},
        DPO,
        GRPO,
        {"id": "merged", "kind": "merge", "from": "grpo"},
        {"id": "release", "kind": "export", "from": "merged"},
        EXAM,
    ]
    run(write_recipe(folder, "story", stages))
    return folder / "runs" / "story"


def test_every_stage_trained_on_its_pictures(story: Path) -> None:
    stages = json.loads((story / "summary.json").read_text())["stages"]
    assert list(stages) == ["sft", "whole", "dpo", "grpo", "merged", "release", "exam"]
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


SEEING = {  # the engine applies adapters to the language model alone: it is given merged weights
    **GRPO, "from": None, "steps": 3,
    "adapter": {"kind": "lora", "rank": 4, "alpha": 8, "tune": {"vision": "lora", "projector": "lora"}},
}  # fmt: skip


def test_lora_in_the_tower_agrees_with_the_engine_and_resumes_bit_equal_after_a_kill(folder: Path) -> None:
    recipe = write_recipe(folder, "broken", [SEEING])
    whole, broken = folder / "runs" / "seeing", folder / "runs" / "broken"
    killed = stop_at(recipe, lambda: bool(list_checkpoints(broken / "grpo" / "checkpoints")), signal.SIGKILL)
    assert killed == Stopped(-signal.SIGKILL, [], [])
    assert not (broken / "grpo" / "adapter").exists(), "it was killed before its end"
    assert "continues from step" in run(recipe, "--resume")

    run(write_recipe(folder, "seeing", [SEEING]))
    assert max(line["mismatch/max_abs"] for line in metrics(whole, "grpo")) <= TOLERANCE
    assert timeless(whole, "grpo") == timeless(broken, "grpo")
    assert weights(whole, "grpo") == weights(broken, "grpo")
    assert rollouts(whole, "grpo") == rollouts(broken, "grpo")
    assert any("visual" in name for name in _adapter_tensors(whole / "grpo" / "adapter"))
    assert not list((folder / "runs" / ".cache" / "media" / "leases").iterdir()), "the killed run's as well"


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
